"""What a run will do, shown before any weight loads: an example, lengths against the limits, tokens, memory."""

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from rich.table import Table
from rich.text import Text
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gkd.config.training import GKDArguments, StudentArguments
from gkd.data.batch import IGNORE
from gkd.data.encoding import RowEncoder, never_stops
from gkd.data.loading import token_lengths
from gkd.io.console import Console, printable
from gkd.io.terminal import visible
from gkd.models.pairing import Pairing
from gkd.training.memory import GIB, ModelSize, Shape, advice, estimate


def show(
    encoded: Dataset | IterableDataset, pairing: Pairing, student_args: StudentArguments, args: GKDArguments
) -> None:
    """Prints the preflight, from the encoded rows and the models' configs alone."""
    encoder = pairing.encoder
    console = Console(soft_wrap=True)
    console.rule("preflight")
    console.print("First row; what is scored stands in [black on green]⟦brackets⟧[/]:", highlight=False)
    console.print(rendered(next(iter(encoded)), encoder.tokenizer))
    lengths = token_lengths(encoded) if isinstance(encoded, Dataset) else None
    if lengths is not None:
        console.print(_length_table(lengths, encoder, args))
    console.print(_token_table(encoder, pairing.teacher_tokenizer))
    if args.lmbda < 1 and not args.seq_kd and (warning := never_stops(encoded, encoder.stop_ids)):
        console.print(Text(f"warning: {warning}.", style="yellow"))
    try:
        console.print(_memory_table(lengths, pairing.configs, student_args, args))
    except Exception as error:  # an unknown architecture: no reason to stop a run
        console.print(printable(f"memory: not estimated ({type(error).__name__}: {error})"))


def rendered(row: dict, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The row's text as the student reads it; scored tokens in brackets, on green."""
    text, start = Text(), 0
    ids, scored = row["input_ids"], [label != IGNORE for label in row["labels"]]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or scored[end] != scored[start]:
            part = visible(tokenizer.decode(ids[start:end]))
            text.append(*((f"⟦{part}⟧", "black on green") if scored[start] else (part, "")))
            start = end
    if not any(scored):
        text.append(" (no answer: a model writes it)", style="italic")
    return text


def _length_table(lengths: dict[str, np.ndarray], encoder: RowEncoder, args: GKDArguments) -> Table:
    table = Table(title=f"Tokens of {len(lengths['prompt']):,} rows")
    for column in ("", "median", "90%", "99%", "longest", "limit", "rows cut"):
        table.add_column(column, justify="left" if not column else "right")
    room = None if encoder.max_length is None else encoder.max_length - encoder.max_new_tokens
    rows = (("prompt", room, "prompt_cut"), ("dataset's answer", args.max_length, "answer_cut"))
    for name, limit, cut in rows:
        values = lengths["prompt" if name == "prompt" else "answer"]
        values = values[values > 0]
        if len(values):
            marks = [f"{np.percentile(values, p):.0f}" for p in (50, 90, 99, 100)]
            shown = "none" if limit is None else f"{limit:,}" + (" with its prompt" if name != "prompt" else "")
            table.add_row(name, *marks, shown, f"{lengths[cut].sum():,}")
    table.caption = f"a generated answer has at most {args.max_new_tokens} tokens (--max_new_tokens)"
    return table


def _token_table(encoder: RowEncoder, teacher_tokenizer: PreTrainedTokenizerBase | None) -> Table:
    tokenizer = encoder.tokenizer
    table = Table(show_header=False)
    stops = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(encoder.stop_ids))
    table.add_row("an answer ends with", printable(stops))
    if teacher_tokenizer is None:
        agreement = "the teacher has no tokenizer to compare with"
    elif teacher_tokenizer.chat_template == tokenizer.chat_template:
        agreement = "the same for student and teacher"
    else:
        agreement = (
            "[yellow]the templates differ; both models read the student's (--chat_template_path sets another)[/]"
        )
    table.add_row("tokens", "the same for student and teacher" if teacher_tokenizer else agreement)
    table.add_row("chat template", agreement)
    return table


def _memory_table(
    lengths, configs: list[PretrainedConfig], student_args: StudentArguments, args: GKDArguments
) -> Table:
    targets = student_args.lora_target_modules
    rank = student_args.lora_r if student_args.use_peft or student_args.student_adapter else 0
    student = ModelSize.of(configs[0], rank, targets, args.trust_remote_code)
    teacher = None  # of --teacher_cache
    if len(configs) > 1:
        teacher = ModelSize.of(configs[1], trust_remote_code=args.teacher_trust_remote_code)
    shape = Shape(args.per_device_train_batch_size, args.max_length or 1024, args.max_new_tokens)
    if lengths is not None:
        generated = args.max_new_tokens if args.lmbda > 0 or args.seq_kd else 0
        answers = int(lengths["answer"].max()) if args.lmbda < 1 and not args.seq_kd else 0
        width = int(lengths["prompt"].max()) + generated
        if answers:
            width = max(width, int((lengths["prompt"] + lengths["answer"]).max()))
        shape = Shape(args.per_device_train_batch_size, width, max(generated, answers, 1))
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    size = min(gpus, default=80 * GIB)
    estimated = estimate(student, teacher, student_args, args, shape, args.world_size, size)
    table = Table(title="Peak memory of a GPU, estimated", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in estimated.resident.items():
        table.add_row(name, f"{size / GIB:.2f} GiB")
    phase = max(estimated.phases, key=estimated.phases.get)
    for name, size in estimated.phases.items():
        table.add_row(f"{'' if name == phase else '('}{name}{'' if name == phase else ')'}", f"{size / GIB:.2f} GiB")
    if args.fsdp:
        table.add_row("[yellow]FSDP's sharding is not counted[/]", "")
    table.add_row("[bold]peak: the sum, phases in brackets left out[/]", f"[bold]{estimated.peak / GIB:.2f} GiB[/]")
    if not gpus:
        table.caption = "no GPU here to compare with"
        return table
    table.add_row("GPU", f"{size / GIB:.2f} GiB")
    if estimated.peak >= 0.95 * size:  # the CUDA context and fragmentation take the rest
        table.caption = f"[red]That will not fit. Try {advice(estimated, student_args, args)}.[/]"
    return table
