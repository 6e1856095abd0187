"""What a run will do, shown before any weight loads: an example, lengths against the limits, tokens, memory."""

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gkd.config.training import GKDArguments, StudentArguments
from gkd.data.batch import IGNORE
from gkd.data.encoding import RowEncoder, never_stops
from gkd.data.loading import token_lengths
from gkd.io.console import Console, printable
from gkd.io.terminal import visible
from gkd.models.cross_vocabulary import CrossVocabulary, Survey
from gkd.models.pairing import Loaded, Pairing
from gkd.models.sharding import ranks_of_machine
from gkd.training.memory import GIB, Estimate, ModelSize, Shape

_SHOWN_TOKENS = 16  # of the example of two tokenizers

_COARSE = (
    "weighs what the student says outside of the teacher's likeliest tokens, of which only the whole mass is known: most of "
    "the divergence may be missing. --beta 0 loses little; exact "
)
_EXACT = {
    False: "are gkd serve (--teacher_url) and gkd cache --keep hidden.",
    True: "is the teacher here or behind gkd serve.",
}


def show(
    encoded: Dataset | IterableDataset,
    pairing: Pairing,
    student_args: StudentArguments,
    args: GKDArguments,
    head_size: tuple[int, int] | None = None,
    coarse: bool = False,
    survey: Survey | None = None,
) -> None:
    """Prints the preflight, from the encoded rows and the models' configs alone.

    Args:
        head_size, coarse: of the teacher, see `gkd.teachers.base.Teacher`.
        survey: of the rows, if the teacher has another tokenizer.
    """
    encoder = pairing.encoder
    console = Console(soft_wrap=True)
    console.rule("preflight")
    console.print("First row; what is scored stands in [black on green]⟦brackets⟧[/]:", highlight=False)
    first = next(iter(encoded))
    console.print(rendered(first, encoder.tokenizer))
    if (read := first.get("teacher_prompt_ids", first["prompt_ids"])) != first["prompt_ids"]:
        console.print("The teacher reads in place of its prompt:")
        console.print(printable((encoder.reader or encoder).tokenizer.decode(read)))
    lengths = token_lengths(encoded) if isinstance(encoded, Dataset) else None
    if lengths is not None:
        console.print(_length_table(lengths, encoder, args))
    console.print(_token_table(encoder, pairing.teacher_tokenizer, pairing.cross))
    if survey is not None and survey.example is not None:
        _show_crossing(console, pairing.cross, survey)
    if args.student_writes:
        console.print("Whether the student's own text will pay: gkd diagnose STUDENT TEACHER ROWS", highlight=False)
    if args.is_supervised and not args.seq_kd and (warning := never_stops(encoded, encoder.stop_ids)):
        console.print(Text(f"warning: {warning}.", style="yellow"))
    if coarse and (args.divergence, args.beta) != ("jsd", 0):
        what = f"--beta {args.beta:g}" if args.divergence == "jsd" else f"--divergence {args.divergence}"
        exact = _EXACT[pairing.cross is not None]
        console.print(Text(f"warning: {what} {_COARSE}{exact}", style="yellow"))
    try:
        estimate, gpus = _estimate(lengths, pairing.models, student_args, args, head_size)
        console.print(_memory_table(estimate, gpus))
        if gpus and (advice := estimate.vllm_advice()):
            console.print(Text(advice))
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
        table.add_column(column, justify="right" if column else "left")
    room = None if encoder.max_length is None else encoder.max_length - encoder.max_new_tokens
    rows = ("prompt", "prompt", room, ""), ("answer", "dataset's answer", args.max_length, " with its prompt")
    rows += (("teacher_prompt", "teacher's prompt", encoder.teacher_window, " with an answer"),)
    for key, name, limit, more in rows:
        values = lengths[key][lengths[key] > 0] if key in lengths else ()
        if len(values):
            marks = (f"{np.percentile(values, p):.0f}" for p in (50, 90, 99, 100))
            shown = "none" if limit is None else f"{limit:,}{more}"
            table.add_row(name, *marks, shown, f"{np.sum(lengths.get(f'{key}_cut', 0)):,}")
    table.caption = f"a generated answer has at most {args.max_new_tokens} tokens (--max_new_tokens)"
    return table


def _show_crossing(console: Console, cross: CrossVocabulary, survey: Survey) -> None:
    """How the first rows' answers align, with an example, and a warning of those that the teacher does not read whole."""
    console.print(
        f"{survey.aligned / survey.tokens:.1%} of the answers' tokens begin where one of the teacher's does:"
    )
    for lexicon, ids in zip((cross.student, cross.teacher), survey.example, strict=True):
        console.print(
            printable(" | ".join(visible(lexicon.tokenizer.decode([index])) for index in ids[:_SHOWN_TOKENS]))
        )
    if survey.lost:
        text = (
            f"warning: {len(survey.lost)} of {survey.rows} answers have text that {survey.changed}, the first in row "
            f"{survey.lost[0]}: from there on nothing is compared."
        )
        console.print(Text(text, style="yellow"))


def _token_table(
    encoder: RowEncoder, teacher_tokenizer: PreTrainedTokenizerBase | None, cross: CrossVocabulary | None = None
) -> Table:
    tokenizer = encoder.tokenizer
    table = Table(show_header=False)
    stops = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(encoder.stop_ids))
    table.add_row("an answer ends with", printable(stops))
    tokens = template = "the same for student and teacher"
    if teacher_tokenizer is None:
        tokens = template = "the teacher has no tokenizer to compare with"
    elif cross is not None:
        tokens = "{:.1%} of the student's and {:.1%} of the teacher's are in the other vocabulary too".format(
            *cross.shares
        )
        template = "each model reads its own"
    elif teacher_tokenizer.chat_template != tokenizer.chat_template:
        template = (
            "[yellow]the templates differ; both models read the student's (--chat_template_path sets another)[/]"
        )
    table.add_row("tokens", tokens)
    table.add_row("chat template", template)
    return table


def _estimate(
    lengths: dict[str, np.ndarray] | None,
    models: tuple[Loaded, ...],
    student_args: StudentArguments,
    args: GKDArguments,
    head_size: tuple[int, int] | None,
) -> tuple[Estimate, list[int]]:
    """Of the smallest GPU, and the bytes of all that there are here; 80 GiB where there is none."""
    rank = student_args.lora_r if student_args.use_peft or student_args.student_adapter else 0
    first, *others = models
    student = ModelSize.of(first.config, rank, student_args.lora_target_modules, args.trust_remote_code)
    teachers = [
        replace(
            ModelSize.of(model.config, trust_remote_code=args.teacher_trust_remote_code),
            lora=model.adapters,
            readers=model.readers,
        )
        for model in others
    ]
    width, completion = args.max_length or 1024, args.max_new_tokens
    if lengths is not None:
        generated = args.max_new_tokens if args.student_writes or args.seq_kd else 0
        answers = int(lengths["answer"].max()) if args.is_supervised and not args.seq_kd else 0
        width = int(max(lengths[name].max() for name in ("prompt", "teacher_prompt") if name in lengths)) + generated
        completion = max(generated, answers, 1)
        if answers:
            width = max(width, int((lengths["prompt"] + lengths["answer"]).max()))
    shape = Shape(args.per_device_train_batch_size, width, completion)
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    gpu = min(gpus, default=80 * GIB)
    ranks, local = args.world_size, ranks_of_machine(args.world_size)
    return Estimate(student, teachers, student_args, args, shape, ranks, gpu, local, head_size), gpus


def _memory_table(estimate: Estimate, gpus: list[int]) -> Table:
    table = Table(title="Peak memory of a GPU, estimated", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in estimate.resident.items():
        table.add_row(name, f"{size / GIB:.2f} GiB")
    highest = max(estimate.phases, key=estimate.phases.get)
    for name, size in estimate.phases.items():
        table.add_row(name if name == highest else f"({name})", f"{size / GIB:.2f} GiB")
    if estimate.args.fsdp:
        table.add_row("[yellow]FSDP's sharding is not counted[/]", "")
    table.add_row("[bold]peak: the sum, phases in brackets left out[/]", f"[bold]{estimate.peak / GIB:.2f} GiB[/]")
    if not gpus:
        table.caption = "no GPU here to compare with"
        return table
    gpu = estimate.device_memory
    table.add_row("GPU", f"{gpu / GIB:.2f} GiB")
    if estimate.peak >= 0.95 * gpu:  # the CUDA context and fragmentation take the rest
        table.caption = f"[red]That will not fit. Try {estimate.advice()}.[/]"
    return table
