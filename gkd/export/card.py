"""The model card of an exported student."""

import functools
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from gkd.export.check import Exported
from gkd.export.source import Source
from gkd.io.terminal import code_in_markdown, in_markdown
from gkd.metrics.divergences import divergence_name
from gkd.metrics.names import WHERE, figure_names, text_of, title_of
from gkd.runs.record import NAME, data_in, mapping, on_text_alone
from gkd.runs.results import read_results

# Flags that the card's text covers, or that mean nothing on another machine.
_NOT_IN_CARD = """model_name_or_path teacher_model_name_or_path teachers teacher_url teacher_timeout dataset_name eval_dataset_name output_dir
    teacher_logprobs_url teacher_logprobs_requests teacher_text_url teacher_text_requests logging_dir run_name accelerator_config""".split()
_LOCAL_PATH = re.compile(r'"(/|~|[A-Za-z]:\\)')


def model_card(source: Source, name: str, exported: Exported) -> ModelCard:
    """README.md: what was trained on what and how, held-out figures where there are some, how to use it.

    Each value is shown literally: somebody else may have written the record.
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
    template = _templates().get_template("model_card.md.j2")
    text = template.render(
        card_data=Markup(metadata.to_yaml()),
        name=name,
        name_in_code=Markup(name),
        student=_public(student),
        teacher=_teacher(arguments),
        text_of=_text_of(source.record),
        arguments=arguments,
        divergence=divergence_name([arguments.get("divergence")]),
        trained=f"{trained}, on a quantized base that is unpacked here" if source.is_quantized else trained,
        data={part: {**rows, "name": _public(str(rows.get("name")))} for part, rows in data_in(source.record).items()},
        step=source.step,
        parameters=f"{exported.parameters:,}",
        dtype=exported.dtype,
        evaluations=_evaluations(source.folder),
        chat=source.tokenizer.chat_template is not None,
        flags={Markup(flag): Markup(code_in_markdown(value)) for flag, value in _changed_flags(source.record).items()},
        versions=mapping(source.record.get("versions")),
    )
    return ModelCard(text)


@functools.cache
def _templates() -> Environment:
    """Compiles the card once in a process."""
    return Environment(
        loader=PackageLoader("gkd.export"),
        finalize=lambda value: value if isinstance(value, Markup) else in_markdown(value),
    )


def _teacher(arguments: dict[str, Any]) -> str:
    if names := [str(word).partition("=")[0] for word in arguments.get("teachers") or []]:
        return f"one for each row: {', '.join(names)}"
    return _public(arguments.get("teacher_model_name_or_path")) or "behind a server"


def _text_of(record: dict[str, Any]) -> str | None:
    """The model on whose text alone a run trained; None if it had a teacher to compare with."""
    recorded = mapping(record.get("arguments"))
    return str(recorded.get("teacher_text_model")) if on_text_alone(recorded) else None


def _changed_flags(record: dict[str, Any]) -> dict[str, Any]:
    """The flags that the run's user gave, without those that mean nothing on another machine."""
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
    """A hub id as it is; of a local path only the last part, since nobody else has the folders above it."""
    return Path(name).name if name and (Path(name).exists() or Path(name).is_absolute()) else name


def _is_hub_id(name: str) -> bool:
    """Whether `name` may be a card's base_model: the hub refuses a card that names a local folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _evaluations(folder: Path) -> list[tuple[str, list[dict[str, Any]], list[list[str]]]]:
    """For each held-out dataset: its name, the results of before, this model and teacher, and the rows of a table."""
    is_run = (folder / NAME).is_file()
    this = "after" if is_run else f"step {folder.name.removeprefix('checkpoint-')}"
    by_data: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in read_results(folder if is_run else folder.resolve().parent):
        by_data.setdefault(entry["data"], {})[entry["model"]] = entry
    tables = []
    for data, entries in by_data.items():
        if this not in entries:
            continue
        columns = [entries[model] for model in ("before", this, "teacher") if model in entries]
        columns = [column for column in columns if column["settings"] == entries[this]["settings"]]
        rows = []
        for name in figure_names(columns):
            # Safe: numbers that gkd formats.
            cells = [Markup(text_of(name, c["metrics"][name])) if name in c["metrics"] else "" for c in columns]
            rows.append([f"{title_of(name, columns)}, {WHERE[name.split('/')[0]]}", *cells])
        tables.append((_public(data), columns, rows))
    return tables
