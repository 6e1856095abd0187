"""The two models: a student that trains (full, LoRA or QLoRA) and a frozen teacher with settings of its own."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file
from trl import get_peft_config, get_quantization_config

from gkd.arguments import GKDArguments, StudentArguments
from gkd.fallback import one_line
from gkd.paths import check_adapter, check_model, not_loaded, read_text
from gkd.pickles import check_weights
from gkd.weight_checks import adapter_config, check_attention, refuse_incomplete

logger = logging.getLogger(__name__)

# Of `cached_file`: no exception for a file that is not there.
_TOLD_NOTHING = dict.fromkeys(
    (f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors")), False
)


def load_tokenizers(
    student_args: StudentArguments, args: GKDArguments, with_teacher: bool = True
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    """The student's tokenizer, with a pad token (its EOS where it has none, as TRL does), and the teacher's.

    The teacher's is None where its folder has none: then only the sizes of the vocabularies can be compared. It is also
    None without `with_teacher`.

    Raises:
        ValueError: naming the model whose tokenizer can't be loaded.
    """
    name = student_args.model_name_or_path
    check_model("--model_name_or_path", name)
    if with_teacher:
        check_model("--teacher_model_name_or_path", args.teacher_model_name_or_path)
        if args.teacher_adapter is not None:
            check_adapter("--teacher_adapter", args.teacher_adapter)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=student_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises bare ones
        raise ValueError(not_loaded("--model_name_or_path", name, error, "its tokenizer")) from error
    apply_token_flags(tokenizer, args)
    if not with_teacher:
        return tokenizer, None
    options = {"revision": args.teacher_revision, "trust_remote_code": args.teacher_trust_remote_code}
    return tokenizer, optional_tokenizer(args.teacher_model_name_or_path, **options)


_TOKENIZER_FILES = "tokenizer.json tokenizer_config.json tokenizer.model vocab.json vocab.txt spiece.model".split()


def optional_tokenizer(name: str, revision: str | None = None, **options: Any) -> PreTrainedTokenizerBase | None:
    """A model's tokenizer; None where it comes without one.

    Raises:
        ValueError: it has one that can't be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", **options)
    except Exception as error:  # the tokenizers library raises bare ones
        reason = one_line(error)
    try:
        files = (cached_file(name, file, revision=revision, **_TOLD_NOTHING) for file in _TOKENIZER_FILES)
        file = next(filter(None, files), None)
    except (OSError, ValueError):  # no such model, which is told elsewhere
        file = None
    if file is not None:
        raise ValueError(f"{name}: its tokenizer can't be loaded: {reason}")
    return None


def apply_token_flags(tokenizer: PreTrainedTokenizerBase, args: GKDArguments) -> None:
    """--eos_token, --pad_token and --chat_template_path, before a row is encoded: TRL's own turn comes after that.

    Raises:
        ValueError: a token that the vocabulary lacks, or no template at the path.
    """
    for flag in ("eos_token", "pad_token"):
        token = getattr(args, flag)
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"--{flag} {token!r} is not in the student's vocabulary.")
            setattr(tokenizer, flag, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    path = args.chat_template_path
    if path is not None:
        if Path(path).is_file():
            tokenizer.chat_template = read_text(path)
        else:
            try:
                tokenizer.chat_template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
            except Exception as error:  # the tokenizers library raises bare ones
                flag = "--chat_template_path"
                if not Path(path).exists() and path.startswith((".", "/", "~")):
                    raise ValueError(f"{flag} {path}: no such file or folder.") from error
                raise ValueError(not_loaded(flag, path, error, "its chat template")) from error
        if tokenizer.chat_template is None:
            raise ValueError(f"--chat_template_path {path}: no chat template there.")
        args.chat_template_path = None  # it is in the tokenizer now; TRL would take the other's special tokens as well


def keep_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any] | None) -> None:
    """Makes `--chat_template_kwargs` the defaults of the template itself, so that whoever serves the student has them."""
    if kwargs and isinstance(tokenizer.chat_template, str):
        names = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
            for name, value in kwargs.items()
        )
        # Templates are rendered with trim_blocks: the line feed is dropped, and how the template begins stays as it is.
        tokenizer.chat_template = f"{names}\n{tokenizer.chat_template}"


def load_configs(
    student_args: StudentArguments, args: GKDArguments, with_teacher: bool = True
) -> list[tuple[PretrainedConfig, GenerationConfig | None]]:
    """Config and generation config of student and teacher: what can be checked before the weights are read.

    Raises:
        ValueError: no model there, pickled weights that would run code (`gkd.pickles`), or an architecture that can't
            be trained.
    """
    places = {
        "--model_name_or_path": (student_args.model_name_or_path, student_args.model_revision, args.trust_remote_code)
    }
    if with_teacher:
        teacher = (args.teacher_model_name_or_path, args.teacher_revision, args.teacher_trust_remote_code)
        places["--teacher_model_name_or_path"] = teacher
    adapters = (getattr(student_args, "student_adapter", None), args.teacher_adapter)
    for folder in (*(name for name, *_ in places.values()), *filter(None, adapters)):
        check_weights(folder)
    configs = []
    for flag, (name, revision, trusted) in places.items():
        config = read_config(flag, name, revision=revision, trust_remote_code=trusted)
        check_architecture(config, name)
        configs.append((config, read_generation_config(flag, name, revision=revision)))
    student = configs[0][0].get_text_config()
    if getattr(args, "router_aux_loss_coef", 0) and not hasattr(student, "output_router_logits"):
        raise ValueError(
            f"--router_aux_loss_coef {args.router_aux_loss_coef}: {student.model_type} is no mixture of experts that "
            "tells its routers' choices."
        )
    return configs


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

    `gkd.heads.check_projection` judges the others by what they compute.

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


def lora_config(student_args: StudentArguments) -> LoraConfig | None:
    """TRL's LoRA configuration, on all linear layers but the head unless --lora_target_modules says otherwise."""
    config = get_peft_config(student_args)
    if config is not None and config.target_modules is None and config.target_parameters is None:
        config.target_modules = "all-linear"
    if config is not None and student_args.model_revision != "main":
        config.revision = student_args.model_revision  # kept in adapter_config.json
    return config


def add_lora(model: nn.Module, config: PeftConfig, args: GKDArguments) -> PeftModel:
    """Wraps the student with a fresh adapter, as TRL's SFTTrainer does.

    Under ZeRO-3 the adapter keeps the dtype of the base weights, since parameters of two dtypes break its gathering.
    """
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    keep_dtype = zero3 and not getattr(model, "is_quantized", False)
    return get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype)


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
