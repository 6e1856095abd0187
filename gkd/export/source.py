"""What is exported: a run, a checkpoint, an adapter or a whole model."""

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase
from trl import get_quantization_config

from gkd.config.recorded import usable
from gkd.io.errors import one_line
from gkd.io.paths import checkpoints_in
from gkd.models.loading import load_pretrained, load_trained
from gkd.models.weights import adapter_config, rehearse_trained
from gkd.runs.checkpoints import STATE, state_of
from gkd.runs.folder import has_model
from gkd.runs.record import NAME, NoRecord, read_record


def find_model(run: str, checkpoint: str | None) -> Path:
    """The folder with the weights to export, see `gkd.export.exporter.export`.

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
    chosen = Path(checkpoints[0]) if checkpoint in (None, "last") else folder / f"checkpoint-{checkpoint}"
    if checkpoint == "best":
        states = (state_of(place) for place in (folder, Path(checkpoints[0])) if (place / STATE).is_file())
        named = (name for state in states if isinstance(name := state.get("best_model_checkpoint"), str) and name)
        if (best := next(named, None)) is None:
            why = "it was trained without --load_best_model_at_end or --metric_for_best_model"
            raise ValueError(f"{folder} knows no best checkpoint: {why}.")
        chosen = folder / Path(best).name  # the run's folder may have moved since
    if not has_model(chosen):
        names = ", ".join(Path(path).name for path in reversed(checkpoints) if has_model(path))
        there = names or "no checkpoint that does"
        raise ValueError(f"{chosen} holds neither a model nor an adapter. There is: {there}.")
    return chosen


@dataclass(frozen=True)
class Source:
    """What is exported, checked before any weights load."""

    folder: Path  # with an adapter or a whole model
    record: dict[str, Any]  # of its run, {} where there is none
    arguments: dict[str, Any]  # those of the record that an export may use
    step: int | None  # optimizer steps done, if known
    base: str | None  # the model that the adapter belongs to, None for a whole model
    options: dict[str, Any]  # of from_pretrained, for the base or the whole model
    config: PretrainedConfig  # of the base, or of the whole model
    tokenizer: PreTrainedTokenizerBase
    quantization: BitsAndBytesConfig | None  # of the base during training

    @classmethod
    def open(cls, folder: Path, trust_remote_code: bool) -> "Source":
        """Reads what `folder` holds.

        Raises:
            ValueError: base model, tokenizer or bitsandbytes is missing, or the run's record or state is damaged.
        """
        try:
            record = read_record(folder)
        except NoRecord:
            record = {}
        step = state_of(folder).get("global_step") if (folder / STATE).is_file() else None
        arguments, _ = usable(record.get("arguments", {}), folder / NAME)
        base = quantization = None
        options = {"trust_remote_code": trust_remote_code}
        if (folder / "adapter_config.json").is_file():
            adapter = adapter_config(str(folder))
            base = adapter.base_model_name_or_path
            options["revision"] = adapter.revision or arguments.get("model_revision", "main")
            if arguments.get("load_in_4bit") or arguments.get("load_in_8bit"):
                if importlib.util.find_spec("bitsandbytes") is None:
                    raise ValueError(
                        f"{folder}: trained on a quantized base, which needs bitsandbytes: pip install -e '.[quantization]'."
                    )
                quantization = get_quantization_config(SimpleNamespace(**arguments))
        try:
            config = AutoConfig.from_pretrained(base or str(folder), **options)
        except (OSError, ValueError) as error:
            what = f"an adapter on {base}, whose config" if base else "its config"
            raise ValueError(f"{folder}: {what} can't be loaded: {error}") from error
        places = [str(p) for p in (folder, folder.parent) if (p / "tokenizer_config.json").is_file()]
        try:
            tokenizer = AutoTokenizer.from_pretrained([*places, base or str(folder)][0], **options)
        except Exception as error:  # the tokenizers library raises bare ones
            raise ValueError(f"{folder}: its tokenizer can't be loaded: {one_line(error)}") from error
        rehearse_trained(str(folder), options)
        return cls(folder, record, arguments, step, base, options, config, tokenizer, quantization)

    @property
    def is_quantized(self) -> bool:
        """Whether the base was quantized by the run's flags, or is stored quantized."""
        return self.quantization is not None or hasattr(self.config, "quantization_config")

    def load(self, dtype: torch.dtype, device: str) -> nn.Module:
        """The model as it was trained: the adapter on its base, a quantized base dequantized."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # `merge` unties them
            # peft uses this old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            if not self.is_quantized:
                model = load_trained(str(self.folder), dtype, **self.options)
            else:  # in the dtype of training, since dequantized values depend on it
                stored = self.arguments.get("dtype", "auto")
                base = load_pretrained(self.base, self.quantization, dtype=stored, **self.options)
                model = PeftModel.from_pretrained(base.dequantize(torch.float32), self.folder)
        cast(model, dtype)
        return model.to(device).eval()


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters only: `Module.to` would also round the frequencies of rotary embeddings, which stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
