"""A trained student as a folder that needs neither gkd nor peft: merged, saved, read back and compared, described."""

import gc
import importlib.util
import json
import re
import warnings
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from trl import get_quantization_config

from gkd.checkpoints import STATE, checkpoints_in, state_of
from gkd.collator import RowEncoder, stop_token_ids
from gkd.data import load_rows
from gkd.fallback import one_line
from gkd.models import load_pretrained, load_trained
from gkd.record_fields import usable
from gkd.results import WHERE, figure_names, read_results, text_of, title_of
from gkd.run_folder import has_model
from gkd.run_record import NAME, NoRecord, mapping, read_record
from gkd.terminal import code_in_markdown, in_markdown
from gkd.weight_checks import adapter_config, rehearse_trained
from gkd.whole_file import appearing

_ROWS, _TOKENS = 8, 128  # of the run's data, for the comparison
_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "用一句话解释什么是光合作用：植物利用阳光把水和二氧化碳变成糖。",
    "Q: A train leaves at 9:40 and travels 2 hours and 35 minutes. When does it arrive?\nA: At 12:15.",
)
# Transformers refuses to save them beside do_sample=False.
_SAMPLING = "temperature top_p top_k min_p top_h typical_p epsilon_cutoff eta_cutoff".split()
# The card tells them in its own words, or they mean nothing on another machine.
_NOT_IN_CARD = """model_name_or_path teacher_model_name_or_path dataset_name eval_dataset_name output_dir
    logging_dir run_name accelerator_config""".split()
_LOCAL_PATH = re.compile(r'"(/|~|[A-Za-z]:\\)')


def find_model(run: str, checkpoint: str | None) -> Path:
    """The folder in `run` with the weights to export.

    Args:
        run: folder of a run, of a checkpoint, or of any model or adapter.
        checkpoint: "last", "best", a step, or None for the final model, else the last checkpoint.

    Raises:
        ValueError: there is no such folder, model or checkpoint.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"{run}: no such folder.")
    if checkpoint is None and has_model(folder):
        return folder
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        lacks = "no checkpoint" if checkpoint else "neither a model nor an adapter nor a checkpoint"
        raise ValueError(f"{run} holds {lacks}.")
    if checkpoint == "best":
        found = folder / _best_checkpoint(folder, Path(checkpoints[0]))
    else:
        found = Path(checkpoints[0]) if checkpoint in (None, "last") else folder / f"checkpoint-{checkpoint}"
    if not has_model(found):
        there = ", ".join(Path(path).name for path in reversed(checkpoints) if has_model(path))
        raise ValueError(
            f"{found} holds neither a model nor an adapter. There is: {there or 'no checkpoint that does'}."
        )
    return found


def _best_checkpoint(folder: Path, last: Path) -> str:
    for place in (folder, last):
        best = state_of(place).get("best_model_checkpoint") if (place / STATE).is_file() else None
        if isinstance(best, str) and best:
            return Path(best).name  # the run's folder may have moved since
    raise ValueError(
        f"{folder} knows no best checkpoint: it was trained without --load_best_model_at_end or --metric_for_best_model."
    )


@dataclass(frozen=True)
class Source:
    """What is exported, checked before any weights load.

    Args:
        folder: with an adapter or a whole model.
        record: of its run, {} where there is none.
        base: the model that the adapter belongs to, None for a whole model.
        config: of the base, or of the whole model.
        quantization: of the base while it was trained.
        step: how many optimizer steps had been done, as far as that is known.
    """

    folder: Path
    record: dict[str, Any]
    base: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    quantization: BitsAndBytesConfig | None
    trust_remote_code: bool
    teacher_trust_remote_code: bool = False
    step: int | None = None

    @classmethod
    def open(cls, folder: Path, trust_remote_code: bool, teacher_trust_remote_code: bool = False) -> "Source":
        """Raises ValueError if the base model, the tokenizer or bitsandbytes is missing, or the record or state of the run is damaged."""
        try:
            record = read_record(folder)
        except NoRecord:
            record = {}
        step = state_of(folder).get("global_step") if (folder / STATE).is_file() else None
        arguments, _ = usable(record.get("arguments", {}), folder / NAME)
        base = quantization = None
        where, options = str(folder), {}
        if (folder / "adapter_config.json").is_file():
            adapter = adapter_config(str(folder))
            where = base = adapter.base_model_name_or_path
            options = {"revision": adapter.revision or arguments.get("model_revision", "main")}
            if arguments.get("load_in_4bit") or arguments.get("load_in_8bit"):
                if importlib.util.find_spec("bitsandbytes") is None:
                    raise ValueError(
                        f"{folder}: trained on a quantized base, which needs bitsandbytes: pip install -e '.[quantization]'."
                    )
                quantization = get_quantization_config(SimpleNamespace(**arguments))
        try:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
        except (OSError, ValueError) as error:
            what = f"an adapter on {base}, whose config" if base else "its config"
            raise ValueError(f"{folder}: {what} can't be loaded: {error}") from error
        places = [str(p) for p in (folder, folder.parent) if (p / "tokenizer_config.json").is_file()]
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                [*places, where][0], trust_remote_code=trust_remote_code, **options
            )
        except Exception as error:  # the tokenizers library raises bare ones
            raise ValueError(f"{folder}: its tokenizer can't be loaded: {one_line(error)}") from error
        rehearse_trained(str(folder), {"trust_remote_code": trust_remote_code, **options})
        trusted = trust_remote_code, teacher_trust_remote_code
        return cls(folder, record, base, config, tokenizer, quantization, *trusted, step)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the record that an export may act on."""
        return usable(self.record.get("arguments", {}), self.folder / NAME)[0]

    @property
    def is_quantized(self) -> bool:
        """Whether the base was quantized by the run's flags, or lies packed on disk."""
        return self.quantization is not None or hasattr(self.config, "quantization_config")

    def load(self, dtype: torch.dtype, device: str) -> nn.Module:
        """The model as it was trained: the adapter beside its base, and the weights of a quantized base unpacked."""
        options = {"trust_remote_code": self.trust_remote_code}
        if self.base is not None:
            adapter = adapter_config(str(self.folder))
            options["revision"] = adapter.revision or self.arguments.get("model_revision", "main")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # `merge` unties them
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing`", FutureWarning
            )  # peft asks by the old name
            if not self.is_quantized:
                model = load_trained(str(self.folder), dtype, **options)
            else:  # in the dtype of the training, which is part of what the packed weights mean
                stored = self.arguments.get("dtype", "auto")
                base = load_pretrained(self.base, self.quantization, dtype=stored, **options)
                model = PeftModel.from_pretrained(base.dequantize(torch.float32), self.folder)
        _cast(model, dtype)
        return model.to(device).eval()


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: `Module.to` would round the frequencies of rotary embeddings too, which stay fp32 in use."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def merge(model: PeftModel) -> nn.Module:
    """Adds the adapter to the base's weights, in place, and returns the base."""
    base = model.get_base_model()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in (inputs, outputs)):
        # A head tied to the embeddings holds the same tensor: what is added to one would be added to both.
        shared = {id(parameter) for parameter in inputs.parameters()}
        for module in outputs.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in shared:
                    setattr(module, name, nn.Parameter(parameter.detach().clone()))
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    return model.merge_and_unload()


def _complete_generation_config(model: nn.Module, source: Source) -> None:
    """Every stop token that the run knew, a pad token, and nothing that can't be saved."""
    holders = [source.tokenizer, model.config, model.generation_config]
    teacher = source.arguments.get("teacher_model_name_or_path")
    load_config = partial(AutoConfig.from_pretrained, trust_remote_code=source.teacher_trust_remote_code)
    for load in (load_config, GenerationConfig.from_pretrained) if teacher else ():
        try:
            holders.append(load(teacher, local_files_only=True))
        except (OSError, ValueError):  # the teacher may be gone; its stop tokens are a help, no need
            continue
    config = model.generation_config
    config._from_model_config = False  # or transformers 4 would take the stop tokens of config.json instead
    config.eos_token_id = stop_token_ids(*holders)
    pad = source.tokenizer.pad_token_id
    config.pad_token_id = config.eos_token_id[0] if pad is None else pad
    if not config.do_sample:
        for name in _SAMPLING:
            setattr(config, name, None)


def sample_tokens(source: Source) -> tuple[list[list[int]], str]:
    """At least 4 sequences for the comparison, and where they come from: the run's data, or texts of ours."""
    arguments, tokenizer = source.arguments, source.tokenizer
    samples = []
    try:
        folded = arguments.get("system_as_user", False)  # runs from before this flag have none
        encoder = RowEncoder(tokenizer, None, 0, "last_turn", [], arguments.get("chat_template_kwargs"), folded)
        place = [arguments[name] for name in ("dataset_name", "dataset_train_split", "dataset_config")]
        rows = load_rows(*place, streaming=True)
        samples = [encoder(dict(row))["input_ids"][-_TOKENS:] for row in islice(rows, _ROWS)]
    except (
        KeyError,
        ValueError,
        OSError,
    ):  # no record, or data that has moved: any text tells whether weights are right
        samples = []
    if len(samples) >= 4:
        return samples, arguments["dataset_name"]
    return samples + [tokenizer(text)["input_ids"][:_TOKENS] for text in _TEXTS], "built-in texts"


@torch.no_grad()
def centred_logits(model: nn.Module, samples: list[list[int]]) -> list[torch.Tensor]:
    """Logits less their mean over the vocabulary, which softmax ignores: one (tokens, vocabulary) in fp32 a sample."""
    device = next(model.parameters()).device
    found = (model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in samples)
    return [logits - logits.mean(-1, keepdim=True) for logits in found]


def rms(logits: list[torch.Tensor], other: list[torch.Tensor] | None = None) -> float:
    """Root mean square of centred logits, or of their difference from the other ones."""
    differences = logits if other is None else [a - b for a, b in zip(logits, other, strict=True)]
    return torch.cat([difference.flatten() for difference in differences]).double().square().mean().sqrt().item()


@dataclass(frozen=True)
class Check:
    """RMS of differences between centred logits, relative to the RMS of the unmerged model's in fp32.

    Args:
        error: of the exported model, read back, from the unmerged one.
        noise: of the unmerged model in the exported dtype from itself in fp32: what rounding alone does.
        effect: of the base without the adapter from the unmerged model; None for a whole model, as the next.
        to_base: of the exported model from the base.
    """

    error: float
    noise: float
    effect: float | None = None
    to_base: float | None = None

    def raise_if_bad(self) -> None:
        """Raises ValueError if the exported model does not compute what was trained."""
        if self.effect is not None and self.effect > self.noise and self.to_base < self.error:
            raise ValueError(f"The exported model is nearer to its base than to the trained student: {self}")
        if not self.error <= 2 * self.noise + 1e-4:  # so that NaN fails
            raise ValueError(f"The exported model does not compute what was trained: {self}")

    def __str__(self) -> str:
        text = f"its logits are {self.error:.2e} off the trained student's; rounding to its dtype alone makes {self.noise:.2e}"
        if self.effect is not None:
            text += (
                f"; the adapter changed them by {self.effect:.2e}, and the export is {self.to_base:.2e} off the base"
            )
        return f"{text} (relative RMS)."


@dataclass(frozen=True)
class Exported:
    parameters: int
    gib: float
    dtype: str
    check: Check
    samples: str


def export(source: Source, out: Path, name: str, dtype: str, device: str) -> Exported:
    """Merges, saves, reads back, compares and describes; `out` appears when all of it went well.

    One model is in memory at a time.

    Args:
        out: must not exist, or be empty.
        name: how the card calls the model.
        dtype: of the exported weights; "auto" is that of the base, or of the whole model, on disk.

    Raises:
        ValueError: the exported model does not compute what was trained.
    """
    stored = source.config.dtype or source.config.get_text_config().dtype or torch.float32
    target = stored if dtype == "auto" else getattr(torch, dtype)
    samples, where = sample_tokens(source)
    with appearing(out) as folder:
        # The merge is computed in fp32, so weights are rounded once.
        model = source.load(torch.float32, device)
        reference, base = centred_logits(model, samples), None
        if source.base is not None:
            with model.disable_adapter():
                base = centred_logits(model, samples)
            model = merge(model)
        _cast(model, target)
        _complete_generation_config(model, source)
        model.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        parameters = model.num_parameters()
        del model
        gc.collect()  # peft's wrappers refer to each other

        unit, noise = rms(reference), 0.0
        if target != torch.float32:
            noise = rms(centred_logits(source.load(target, device), samples), reference) / unit
            gc.collect()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=source.trust_remote_code
        ).to(device)
        found = centred_logits(model.eval(), samples)
        check = Check(rms(found, reference) / unit, noise)
        if base is not None:
            check = replace(check, effect=rms(base, reference) / unit, to_base=rms(found, base) / unit)
        check.raise_if_bad()

        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
        exported = Exported(parameters, size, str(target).removeprefix("torch."), check, where)
        (folder / "README.md").write_text(str(model_card(source, name, exported)), encoding="utf-8")
    return exported


def model_card(source: Source, name: str, exported: Exported) -> ModelCard:
    """README.md: what was trained on what and how, held-out figures where there are some, how to use it.

    Each value is shown as the text that it is: a record may have come from anywhere.
    """
    arguments = source.arguments
    student = arguments.get("model_name_or_path", source.base)
    metadata = ModelCardData(
        base_model=student if student and _is_hub_id(student) else None,
        tags=["gkd", "knowledge-distillation"],
        pipeline_tag="text-generation",
        library_name="transformers",
    )
    trained = "all" if source.base is None else "a LoRA adapter, merged"
    environment = Environment(
        loader=PackageLoader("gkd", ""),
        finalize=lambda value: value if isinstance(value, Markup) else in_markdown(value),
    )
    text = environment.get_template("model_card.md.j2").render(
        card_data=Markup(metadata.to_yaml()),
        name=name,
        name_in_code=Markup(name),
        student=_public(student),
        arguments={**arguments, "teacher_model_name_or_path": _public(arguments.get("teacher_model_name_or_path"))}
        if arguments
        else {},
        trained=f"{trained}, on a quantized base that is unpacked here" if source.is_quantized else trained,
        data=_data(source.record),
        step=source.step,
        parameters=f"{exported.parameters:,}",
        dtype=exported.dtype,
        evaluations=_evaluations(source.folder),
        chat=source.tokenizer.chat_template is not None,
        flags={Markup(flag): Markup(code_in_markdown(value)) for flag, value in _changed_flags(source.record).items()},
        versions=mapping(source.record.get("versions")),
    )
    return ModelCard(text)


def _data(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the record says of the rows of each part of the data."""
    parts = {part: rows for part, rows in mapping(record.get("data")).items() if isinstance(rows, dict)}
    return {part: {**rows, "name": _public(str(rows.get("name")))} for part, rows in parts.items()}


def _changed_flags(record: dict[str, Any]) -> dict[str, Any]:
    """Flags that the run's user gave, as far as they mean something on another machine."""
    arguments, changed = mapping(record.get("arguments")), record.get("changed")
    names = [name for name in changed if name in arguments] if isinstance(changed, list) else []
    return {
        name: arguments[name]
        for name in names
        if name.isidentifier()
        and name not in _NOT_IN_CARD
        and arguments[name] not in (None, [])
        and not _LOCAL_PATH.search(json.dumps(arguments[name]))
    }


def _public(name: str | None) -> str | None:
    """A hub id as it is, a local path without the folders above it: nobody else's disk has them."""
    return Path(name).name if name and (Path(name).exists() or Path(name).is_absolute()) else name


def _is_hub_id(name: str) -> bool:
    """The hub refuses a card whose base_model is a local folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _evaluations(folder: Path) -> list[tuple[str, list[dict[str, Any]], list[list[str]]]]:
    """For each held-out dataset: its name, the results of before, this model and teacher, and the rows of a table."""
    is_run = (folder / NAME).is_file()
    step = None if is_run else folder.name.removeprefix("checkpoint-")
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in read_results(folder if is_run else folder.resolve().parent):
        model = entry["model"]
        if model not in ("before", "teacher"):
            is_this = model == ("after" if is_run else f"step {step}")
            model = "this" if is_this else None
        tables.setdefault(entry["data"], {})[model] = entry
    found = []
    for data, entries in tables.items():
        if "this" not in entries:
            continue
        columns = [entries[model] for model in ("before", "this", "teacher") if model in entries]
        columns = [column for column in columns if column["settings"] == entries["this"]["settings"]]
        rows = []
        for name in figure_names(columns):
            # Numbers, formatted by us.
            cells = [Markup(text_of(name, c["metrics"][name])) if name in c["metrics"] else "" for c in columns]
            rows.append([f"{title_of(name)}, {WHERE[name.split('/')[0]]}", *cells])
        found.append((_public(data), columns, rows))
    return found
