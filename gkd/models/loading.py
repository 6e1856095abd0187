"""Loads the two models: a student that trains (full, LoRA or QLoRA) and a frozen teacher with separate settings."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import get_balanced_memory
from peft import PeftModel
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import get_quantization_config

from gkd.config.training import GKDArguments, StudentArguments
from gkd.io.errors import one_line
from gkd.io.paths import not_loaded
from gkd.io.pickles import check_weights
from gkd.models.heads import base_of
from gkd.models.weights import adapter_config, check_attention, refuse_incomplete

logger = logging.getLogger(__name__)


def read_configs(flag: str, name: str, **options: Any) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """A model's config, and its generation config if it has one; `options` go to `from_pretrained`.

    Raises ValueError, which names the model's `flag`, if there is no config, one can't be read, or it asks for code.
    """
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except Exception as error:  # bad values in it raise many classes
        raise ValueError(not_loaded(flag, name, error)) from error
    check_attention(config, name)
    try:
        return config, GenerationConfig.from_pretrained(name, **options)
    except OSError:  # many base models have none
        return config, None
    except Exception as error:
        raise ValueError(not_loaded(flag, name, error, "its generation config")) from error


def stored_dtype(config: PretrainedConfig, name: str) -> torch.dtype:
    """The dtype that a flag names; auto: that of a model's weights, float32 where its config does not say."""
    return (config.get_text_config().dtype or torch.float32) if name == "auto" else getattr(torch, name)


# Multimodal models and their text models, whose `base_model` is not the body.
_BODY_NOT_FOUND = ("llama4", "llama4_text", "mllama", "mllama_text_model")


def check_architecture(config: PretrainedConfig, name: str) -> None:
    """Raises ValueError for a config that is no decoder-only language model, or of an unsupported architecture.

    `gkd.models.heads.check_projection` later checks what the loaded model computes.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        why = f"{kind} is an encoder-decoder"
    elif kind in _BODY_NOT_FOUND:
        why = f"{kind} (a text model inside a multimodal one) is not supported yet"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        why = f"{kind} is no causal language model"
    elif isinstance(layers := getattr(config.get_text_config(), "num_hidden_layers", None), int) and layers < 1:
        why = f"its config has {layers} layers"
    else:
        return
    raise ValueError(f"{name}: {why}; gkd trains decoder-only language models.")


def context_window(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read; None if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def keep_within_window(args: GKDArguments, windows: list[int | None]) -> None:
    """Lowers `max_length` to the smaller of the models' context windows that are known, with a warning.

    Raises ValueError if `max_new_tokens` leaves no room for a prompt.
    """
    window = min(filter(None, windows), default=None)
    if window is None or (args.max_length is not None and args.max_length <= window):
        return
    if args.generates and args.max_new_tokens >= window:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in the models' window of {window}."
        )
    logger.warning("--max_length %s is more than the models' window: %d is taken.", args.max_length, window)
    args.max_length = window


def load_pretrained(name: str, quantization: BitsAndBytesConfig | None = None, **kwargs) -> nn.Module:
    """A causal language model by name or folder; `kwargs` go to `from_pretrained`.

    Raises ValueError if `name` is a LoRA adapter, its weights would run code or lack a tensor, or its architecture can't
    be trained.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} is a LoRA adapter, not a model: give its base model as the model and this folder as "
            "--student_adapter or --teacher_adapter."
        )
    check_weights(name)
    kwargs.setdefault("trust_remote_code", False)  # with None, transformers asks on the terminal
    source = {"revision", "trust_remote_code", "token", "cache_dir", "subfolder", "code_revision", "local_files_only"}
    config = AutoConfig.from_pretrained(name, **{option: kwargs[option] for option in source & kwargs.keys()})
    check_attention(config, name)
    check_architecture(config, name)
    if quantization is not None:  # bitsandbytes packs the weights during loading, on their final device
        state = PartialState()
        device = state.local_process_index if state.device.type == "cuda" else state.device.type
        kwargs.setdefault("device_map", {"": device})
    kwargs["output_loading_info"] = True
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, **kwargs)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:  # bad values in a config
        raise ValueError(f"{name} can't be loaded: {type(error).__name__}: {one_line(error)}") from error
    refuse_incomplete(name, info)
    return model


def load_trained(
    folder: str, dtype: torch.dtype | str = "auto", quantization: BitsAndBytesConfig | None = None, **kwargs
) -> nn.Module:
    """The model that a run wrote: a whole one, or the base with the LoRA adapter in `folder`, not merged.

    Raises ValueError if the adapter's base model can't be found, or weights would run code.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        return load_pretrained(folder, quantization, dtype=dtype, **kwargs).eval()
    check_weights(folder)
    config = adapter_config(folder)
    if config.revision is not None:
        kwargs["revision"] = config.revision
    try:
        model = load_pretrained(config.base_model_name_or_path, quantization, dtype=dtype, **kwargs)
    except OSError as error:
        base = config.base_model_name_or_path
        raise ValueError(f"{folder}: an adapter on {base}, which can't be loaded: {error}") from error
    # peft would cast the adapter to fp32; the caller's dtype is kept.
    model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=dtype == "auto")
    return model.eval()


def student_options(student_args: StudentArguments, args: GKDArguments) -> dict[str, Any]:
    """The options of `load_student` for `load_pretrained`, without the quantization."""
    return {
        "dtype": student_args.dtype,
        "revision": student_args.model_revision,
        "attn_implementation": student_args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }


def load_student(student_args: StudentArguments, args: GKDArguments) -> nn.Module:
    """The student, with the adapter of `--student_adapter` if there is one, ready to train."""
    quantization = get_quantization_config(student_args)
    model = load_pretrained(student_args.model_name_or_path, quantization, **student_options(student_args, args))
    if student_args.student_adapter is not None:
        model = PeftModel.from_pretrained(model, student_args.student_adapter, is_trainable=True)
        for config in model.peft_config.values():  # may name another copy of the base
            config.base_model_name_or_path = student_args.model_name_or_path
            config.revision = None if student_args.model_revision == "main" else student_args.model_revision
    return model


def teacher_options(args: Any) -> dict[str, Any]:
    """The options of `load_teacher` for `load_pretrained`, without quantization and device."""
    return {
        "dtype": args.teacher_dtype,
        "revision": args.teacher_revision,
        "trust_remote_code": args.teacher_trust_remote_code,
        **(args.teacher_model_init_kwargs or {}),
    }


def load_teacher(args: GKDArguments) -> nn.Module:
    """The frozen teacher. Its dtype, quantization, revision and adapter have flags of their own."""
    quantization = None
    if args.teacher_load_in_4bit or args.teacher_load_in_8bit:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        quantization = BitsAndBytesConfig(**nf4 if args.teacher_load_in_4bit else {"load_in_8bit": True})
    options = teacher_options(args)
    devices = args.teacher_devices
    if len(devices) > 1:  # read onto them directly: CPU memory may have no room for all
        options = {"device_map": "balanced", "max_memory": _room(devices), **options}
    elif quantization is not None and devices:
        options.setdefault("device_map", {"": devices[0]})
    model = load_pretrained(args.teacher_model_name_or_path, quantization, **options)
    if args.teacher_adapter is not None:
        model = PeftModel.from_pretrained(model, args.teacher_adapter)
        if quantization is None:  # in packed weights the adapter would be lost to rounding
            model = model.merge_and_unload()
    return freeze(model)


def move(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Moves a model to a device; packed weights stay where they are loaded."""
    return model if getattr(model, "is_quantized", False) else model.to(device)


def _room(devices: list[torch.device]) -> dict[int, int]:
    """Bytes of each GPU that a teacher may take."""
    return {device.index: int(0.9 * torch.cuda.mem_get_info(device)[0]) for device in devices}


def spread(model: nn.Module, devices: list[torch.device]) -> None:
    """Puts whole layers on each of several GPUs, if they are not there yet; hidden states come back to the first."""
    base = base_of(model)
    if not getattr(base, "hf_device_map", None):
        whole = base._no_split_modules
        room = get_balanced_memory(base, _room(devices), no_split_module_classes=whole)
        parts = infer_auto_device_map(base, room, no_split_module_classes=whole)
        dispatch_model(base, parts, skip_keys=base._skip_keys_device_placement, force_hooks=True)
    back = AlignDevicesHook(devices[0], io_same_device=True, skip_keys=base._skip_keys_device_placement)
    add_hook_to_module(base.base_model, back, append=True)


def is_spread(model: nn.Module) -> bool:
    """Whether its layers are on several devices."""
    return len(set((getattr(base_of(model), "hf_device_map", None) or {}).values())) > 1


def freeze(model: nn.Module) -> nn.Module:
    """Sets evaluation mode (no dropout), and switches gradients off."""
    return model.eval().requires_grad_(False)


def size_of(model: nn.Module) -> tuple[int, int]:
    """Numbers of parameters and bytes as loaded, without adapters; those that ZeRO-3 shards count in full."""
    parameters = size = 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            stored = getattr(parameter, "ds_numel", parameter.numel())
            packed = parameter.element_size() * 2 if type(parameter).__name__ == "Params4bit" else 1
            parameters, size = parameters + stored * packed, size + stored * parameter.element_size()
    return parameters, size


def compile_layers(model: nn.Module, backend: str | None, mode: str | None) -> None:
    """Compiles each decoder layer in place: the layers share one compilation, and the module tree is unchanged."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=backend or "inductor", mode=mode)
