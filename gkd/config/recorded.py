"""What commands accept from the record of a run or a teacher cache, which somebody may have sent: data, never code."""

import shlex
from collections.abc import Callable
from numbers import Real
from typing import Any

from gkd.config.generation import GENERATION_BACKENDS
from gkd.config.values import DTYPES
from gkd.io.terminal import visible
from gkd.metrics.divergences import DIVERGENCE_FLAGS, DIVERGENCES
from gkd.metrics.names import METRICS

_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_choice(*choices: str) -> Callable[[Any], bool]:
    return lambda value: value in choices


def _is_template_variables(value: Any) -> bool:
    return isinstance(value, dict) and all(name.isidentifier() for name in value)


_is_text, _is_switch = _is_a(str), _is_a(bool)

# Every flag that a record may set, with a check of its value; see _NEVER_NULL.
_FLAGS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        "model_name_or_path model_revision student_adapter teacher_model_name_or_path teacher_revision teacher_adapter "
        "dataset_name dataset_config dataset_train_split dataset_test_split eval_dataset_name".split(),
        _is_text,
    ),
    **dict.fromkeys("lmbda kd_ratio temperature loss_temperature eval_temperature".split(), _is_number),
    **dict.fromkeys(DIVERGENCE_FLAGS[1:], _is_number),
    **dict.fromkeys("max_length max_new_tokens per_device_eval_batch_size seed".split(), _is_whole),
    **dict.fromkeys(
        "seq_kd system_as_user load_best_model_at_end load_in_4bit load_in_8bit use_bnb_nested_quant teacher_load_in_4bit "
        "teacher_load_in_8bit".split(),
        _is_switch,
    ),
    "dtype": _is_choice(*DTYPES),
    "teacher_dtype": _is_choice(*DTYPES),
    "bnb_4bit_quant_type": _is_choice("fp4", "nf4"),
    "bnb_4bit_quant_storage": _is_choice("uint8", "float16", "float32", "bfloat16", "int8", "float64"),
    "divergence": _is_choice(*DIVERGENCES),
    "train_on": _is_choice("last_turn", "all_turns"),
    "generation_backend": _is_choice(*GENERATION_BACKENDS),
    "chat_template_kwargs": _is_template_variables,
    "metrics": lambda value: isinstance(value, list) and all(name in METRICS for name in value),
    "teacher_model_init_kwargs": _is_a(dict),
}
# Flags that always have a value in a record; for the others null says that they were not given.
_NEVER_NULL = {name for name, fits in _FLAGS.items() if fits in (_is_number, _is_whole, _is_switch)} - {"max_length"}
_NEVER_NULL |= {"teacher_dtype", "bnb_4bit_quant_type", "train_on", "generation_backend", "divergence"}
# Arguments of the teacher's from_pretrained. `attn_implementation` is a choice, since a kernel of the hub is code.
_LOADING: dict[str, Callable[[Any], bool]] = {
    "dtype": _is_choice(*DTYPES),
    "revision": _is_text,
    "subfolder": _is_text,
    "variant": _is_text,
    "attn_implementation": _is_choice(*_ATTENTION),
}


def usable(arguments: Any, where: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments that a command may use; and by flag, as a phrase, those that apply only if they are typed again.

    Args:
        arguments: those of the record.
        where: the record's path, for errors.

    Raises:
        ValueError: a value that its flag can't have.
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: its arguments are no JSON object, so train_gkd.py has not written it.")
    accepted, left_out = {}, {}
    for name, fits in _FLAGS.items():
        if name not in arguments:
            continue
        value = arguments[name]
        if not (name not in _NEVER_NULL if value is None else fits(value)):
            shown = "null" if value is None else f"{value!r:.60}"
            raise ValueError(f"{where}: {shown} is no value of --{name}. Mend the record, or leave it out there.")
        accepted[name] = value
    if accepted.get("teacher_model_init_kwargs"):
        recorded = accepted["teacher_model_init_kwargs"]
        accepted["teacher_model_init_kwargs"] = {k: v for k, v in recorded.items() if k in _LOADING and _LOADING[k](v)}
        if rest := recorded.keys() - accepted["teacher_model_init_kwargs"].keys():
            left_out["teacher_model_init_kwargs"] = f"{', '.join(sorted(rest))} of --teacher_model_init_kwargs"
    if arguments.get("scorer"):
        left_out["scorer"] = f"--scorer {shlex.quote(str(arguments['scorer']))}"
    left_out |= {n: f"--{n}" for n in ("trust_remote_code", "teacher_trust_remote_code") if arguments.get(n) is True}
    return accepted, {name: visible(phrase) for name, phrase in left_out.items()}
