"""The two models: a student that trains (full, LoRA or QLoRA) and a frozen teacher with settings of its own."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
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
from gkd.models.weights import adapter_config, check_attention, refuse_incomplete

logger = logging.getLogger(__name__)


def read_config(flag: str, name: str, **options: Any) -> PretrainedConfig:
    """A model's config; `options` go to `from_pretrained`.

    Raises:
        ValueError: none there, or one that can't be read or asks for code, by the flag that names the model.
    """
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except Exception as error:  # of whatever class a value in it leads to
        raise ValueError(not_loaded(flag, name, error)) from error
    check_attention(config, name)
    return config


def read_generation_config(flag: str, name: str, **options: Any) -> GenerationConfig | None:
    """None where there is none, as with many base models. Raises ValueError for one that can't be read."""
    try:
        return GenerationConfig.from_pretrained(name, **options)
    except OSError:
        return None
    except Exception as error:
        raise ValueError(not_loaded(flag, name, error, "its generation config")) from error


# Text models of a multimodal one, whose body transformers does not find by `base_model`.
_BODY_NOT_FOUND = ("llama4", "llama4_text", "mllama", "mllama_text_model")


def check_architecture(config: PretrainedConfig, name: str) -> None:
    """Refuses by its config what is no model that reads a text from left to right, or can't be taken apart yet.

    `gkd.models.heads.check_projection` judges the others by what they compute.

    Raises:
        ValueError: naming the model.
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


def keep_within_window(args: GKDArguments, configs: list[PretrainedConfig]) -> None:
    """Lowers `max_length` to what both models can read: longer prompts lose their oldest text, as --max_length says.

    Raises:
        ValueError: `max_new_tokens` leaves no room for a prompt.
    """
    windows = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    window = min((size for size in windows if size), default=None)
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

    Raises:
        ValueError: `name` is a folder with a LoRA adapter, with weights that would run code or lack a tensor, or with an
            architecture that can't be trained.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} is a LoRA adapter, not a model: give its base model as the model and this folder as "
            "--student_adapter or --teacher_adapter."
        )
    check_weights(name)
    kwargs.setdefault("trust_remote_code", False)  # None would ask on a terminal
    place = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "code_revision", "local_files_only")
    config = AutoConfig.from_pretrained(name, **{option: kwargs[option] for option in place if option in kwargs})
    check_attention(config, name)
    check_architecture(config, name)
    if quantization is not None:  # bitsandbytes packs the weights while they load, on the device where they stay
        state = PartialState()
        place = state.local_process_index if state.device.type == "cuda" else state.device.type
        kwargs.setdefault("device_map", {"": place})
    kwargs["output_loading_info"] = True
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, **kwargs)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:  # of what a config says
        raise ValueError(f"{name} can't be loaded: {type(error).__name__}: {one_line(error)}") from error
    refuse_incomplete(name, info)
    return model


def load_trained(
    folder: str, dtype: torch.dtype | str = "auto", quantization: BitsAndBytesConfig | None = None, **kwargs
) -> nn.Module:
    """A model that a run has written: whole, or its base with the LoRA adapter in `folder`, which is not merged.

    Raises:
        ValueError: the adapter's base model is not where it was; weights that would run code.
    """
    check_weights(folder)
    adapter = Path(folder) / "adapter_config.json"
    if not adapter.is_file():
        return load_pretrained(folder, quantization, dtype=dtype, **kwargs).eval()
    config = adapter_config(folder)
    base = config.base_model_name_or_path
    if config.revision is not None:
        kwargs["revision"] = config.revision
    try:
        model = load_pretrained(base, quantization, dtype=dtype, **kwargs)
    except OSError as error:
        raise ValueError(f"{folder}: an adapter on {base}, which can't be loaded: {error}") from error
    # peft would give the adapter fp32 weights; the caller says which dtype it wants.
    model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=dtype == "auto")
    return model.eval()


def student_options(student_args: StudentArguments, args: GKDArguments) -> dict[str, Any]:
    """What `load_student` hands to `load_pretrained`, beside the quantization."""
    return {
        "dtype": student_args.dtype,
        "revision": student_args.model_revision,
        "attn_implementation": student_args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }


def load_student(student_args: StudentArguments, args: GKDArguments) -> nn.Module:
    """The student in its own dtype and quantization; with `--student_adapter`, training goes on from that adapter."""
    quantization = get_quantization_config(student_args)
    model = load_pretrained(student_args.model_name_or_path, quantization, **student_options(student_args, args))
    if student_args.student_adapter is not None:
        model = PeftModel.from_pretrained(model, student_args.student_adapter, is_trainable=True)
        for config in model.peft_config.values():  # what was saved elsewhere may name another copy of the base
            config.base_model_name_or_path = student_args.model_name_or_path
            config.revision = None if student_args.model_revision == "main" else student_args.model_revision
    return model


def teacher_options(args: Any) -> dict[str, Any]:
    """What `load_teacher` hands to `load_pretrained`, beside the quantization and its device."""
    return {
        "dtype": args.teacher_dtype,
        "revision": args.teacher_revision,
        "trust_remote_code": args.teacher_trust_remote_code,
        **(args.teacher_model_init_kwargs or {}),
    }


def load_teacher(args: GKDArguments) -> nn.Module:
    """The frozen teacher, independent of the student's dtype, quantization, revision and adapter."""
    quantization = None
    if args.teacher_load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif args.teacher_load_in_8bit:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    options = teacher_options(args)
    if quantization is not None and getattr(args, "teacher_device", None) is not None:  # eval_gkd.py has no such flag
        options.setdefault("device_map", {"": args.teacher_device})
    model = load_pretrained(args.teacher_model_name_or_path, quantization, **options)
    if args.teacher_adapter is not None:
        model = PeftModel.from_pretrained(model, args.teacher_adapter)
        if quantization is None:  # merging into packed weights would round the adapter away
            model = model.merge_and_unload()
    return freeze(model)


def move(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A model on a device; packed weights stay where they were loaded to."""
    return model if getattr(model, "is_quantized", False) else model.to(device)


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode (so no dropout) and no gradients."""
    return model.eval().requires_grad_(False)


def size_of(model: nn.Module) -> tuple[int, int]:
    """Parameters and bytes as loaded, without adapters, which merge into the rest; ZeRO-3's spread weights whole."""
    parameters = size = 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            stored = getattr(parameter, "ds_numel", parameter.numel())
            packed = parameter.element_size() * 2 if type(parameter).__name__ == "Params4bit" else 1
            parameters, size = parameters + stored * packed, size + stored * parameter.element_size()
    return parameters, size


def compile_layers(model: nn.Module, backend: str | None, mode: str | None) -> None:
    """torch.compile for each decoder layer, in place: they share one compilation, and the module tree stays as it is."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=backend or "inductor", mode=mode)
