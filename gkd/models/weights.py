"""Checks from config and file headers, before weights are read, that a model and its adapter load completely."""

import json
import logging
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.logging import is_progress_bar_enabled

from gkd.io.errors import one_line

logger = logging.getLogger(__name__)

# Options of `from_pretrained` that select other files than `shapes_in` reads.
_OTHER_FILES = {"subfolder", "variant", "gguf_file", "use_safetensors", "state_dict"}
# Options about devices, which do not apply on the meta device.
_PLACES = (
    "device_map max_memory offload_folder offload_buffers quantization_config tp_plan tp_size distributed_config "
    "device_mesh use_kernels kernel_config"
).split()


def rehearse(name: str, options: dict[str, Any]) -> nn.Module | None:
    """Loads a causal language model without its weights, on the meta device; None if it can't be built without values.

    transformers' own loader does it, so names are handled as in the real load (merged experts, tied weights, keys that
    may be missing). Only safetensors on disk are checked, and no packed weights. `options` are those of
    `gkd.models.loading.load_pretrained`, without a quantization. Raises ValueError if it does not take them, a file is torn
    or missing, or a tensor is missing or of another shape.
    """
    shapes = None if _OTHER_FILES & options.keys() else shapes_in(name, "model")
    if is_deepspeed_zero3_enabled():  # its loader needs the devices
        return None
    options = {key: value for key, value in options.items() if key not in _PLACES}
    revision, trusted = options.pop("revision", None), options.pop("trust_remote_code", False)
    source, dtype = {"revision": revision, "trust_remote_code": trusted}, options.pop("dtype", None)
    try:
        plain = AutoConfig.from_pretrained(name, **source)
    except Exception as error:
        raise ValueError(f"{name}: its config can't be loaded: {one_line(error)}") from error
    check_attention(plain, name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, trust_remote_code=trusted)
    except Exception as error:  # the code of some architectures needs values
        logger.info("%s is not built on the meta device: %s", name, one_line(error))
        return None
    try:
        config, rest = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **source, **options)
        if getattr(config, "quantization_config", None) is not None:  # packed weights have other names, and need a GPU
            return model
        rest |= {"config": config, "device_map": {"": "meta"}, "output_loading_info": True}
        rest["dtype"] = "float32" if dtype in (None, "auto") else dtype
        with _quiet():
            type(model).from_pretrained(None, state_dict={}, **rest)
    except Exception as error:  # bad values raise many classes
        raise ValueError(f"{name} can't be loaded as the flags say: {one_line(error)}") from error
    if shapes is None:
        return model
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        with _quiet():
            _, info = type(model).from_pretrained(None, state_dict=state, ignore_mismatched_sizes=True, **rest)
    except Exception as error:  # a conversion needs values; the real load is checked afterwards
        logger.info("The names of the weights of %s are not compared: %s", name, one_line(error))
        return model
    refuse_incomplete(name, info)
    return model


def rehearse_trained(folder: str, options: dict[str, Any]) -> None:
    """`rehearse` for the models of `load_trained`, and `check_adapter_weights` for an adapter. Raises as these do."""
    if not (Path(folder) / "adapter_config.json").is_file():
        rehearse(folder, options)
        return
    config = adapter_config(folder)
    if config.revision is not None:
        options = {**options, "revision": config.revision}
    check_adapter_weights(folder, rehearse(config.base_model_name_or_path, options))


def adapter_config(folder: str, with_base: bool = True) -> PeftConfig:
    """An adapter's config. Raises ValueError if it can't be read, or names no base model while `with_base`."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # bad JSON raises many classes
        raise ValueError(f"{folder}: adapter_config.json can't be read: {one_line(error)}") from error
    base, revision = config.base_model_name_or_path, config.revision
    if with_base and not (base and isinstance(base, str)):
        raise ValueError(
            f"{folder}: adapter_config.json names no base model: write its base_model_name_or_path there."
        )
    if not isinstance(revision, str | None):
        raise ValueError(f"{folder}: adapter_config.json has no such revision: {revision!r:.60}.")
    return config


def check_attention(config: PretrainedConfig, name: str) -> None:
    """Raises ValueError if a config asks for an attention from the hub, ORG/NAME, which is code."""
    for part in (config, config.get_text_config()):
        wanted = getattr(part, "_attn_implementation", None)
        if isinstance(wanted, str) and "/" in wanted:
            raise ValueError(
                f"{name}: its config.json asks for the attention {wanted}, which is code from the hub. Take it out there; "
                "--attn_implementation names one of your choice."
            )


def refuse_incomplete(name: str, info: dict[str, Any]) -> None:
    """Raises ValueError if `info`, the loader's `output_loading_info`, shows weights that are missing or misshapen."""
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{name}: its weights lack {missing[0]}{more}, which would be random. Copy or download the model anew."
        )
    for key, stored, wanted in sorted(info["mismatched_keys"], key=lambda item: item[0]):
        raise ValueError(
            f"{name}: {key} has the shape {list(stored)} in its weights, but {list(wanted)} by its config.json. Take "
            "both from the same model."
        )


def shapes_in(folder: str, kind: str) -> dict[str, list[int]] | None:
    """The shapes of all tensors in a folder's files, None if they are not safetensors.

    `kind` is `model` or `adapter_model`, how the files' names begin. Raises ValueError for a file that is missing or torn.
    """
    whole, index = (Path(folder) / f"{kind}.safetensors{end}" for end in ("", ".index.json"))
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} can't be read: {one_line(error)}. Copy or download it anew.") from error
        files = [index.with_name(part) for part in sorted(parts)]
    else:
        return None
    shapes: dict[str, list[int]] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing, which {index.name} names. Copy or download it anew.")
        try:
            with safe_open(file, framework="pt") as tensors:  # also compares the file's size with its header
                shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not whole: {one_line(error)}. Copy or download it anew.") from error
    return shapes


def adapter_parameters(folder: str) -> int:
    """The number of parameters of an adapter; 0 if its files have no header that tells it. Raises as `shapes_in`."""
    return sum(map(math.prod, (shapes_in(folder, "adapter_model") or {}).values()))


def check_adapter_weights(folder: str, model: nn.Module | None) -> None:
    """Compares a LoRA adapter with its base `model`, which is on the meta device and gets the adapter.

    Raises ValueError for an adapter that is torn or incomplete, or belongs to another model or kind.
    """
    config = adapter_config(folder, with_base=False)
    if config.is_prompt_learning:
        raise ValueError(f"{folder}: a {config.peft_type.value} adapter; only LoRA is supported.")
    stored = shapes_in(folder, "adapter_model")
    if stored is None and not (Path(folder) / "adapter_model.bin").is_file():
        raise ValueError(f"{folder}: no weights there, neither adapter_model.safetensors nor adapter_model.bin.")
    if model is None:
        return
    config.base_model_name_or_path = None  # no warning about a base that has moved
    try:
        wanted = get_peft_model_state_dict(get_peft_model(model, config), save_embedding_layers=False)
    except ValueError as error:
        raise ValueError(f"{folder} does not fit the model: {one_line(error)}") from error
    except Exception as error:  # some kinds of adapters need values
        logger.info("%s is not compared with its model: %s", folder, one_line(error))
        return
    for key, tensor in wanted.items():
        if stored is not None and stored.get(key) != list(tensor.shape):
            problem = f"has the shape {stored[key]}, not {list(tensor.shape)}" if key in stored else "is missing"
            raise ValueError(f"{folder} does not fit the model: {key} {problem}.")


@contextmanager
def _quiet():
    """Silences transformers' progress bar and its report of missing weights."""
    level, bar = transformers.logging.get_verbosity(), is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()
