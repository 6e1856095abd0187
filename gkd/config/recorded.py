"""What commands accept from the record of a run or a teacher cache, which somebody may have sent: data, never code."""

import shlex
from collections.abc import Callable
from numbers import Real
from typing import Any

from gkd.config.generation import GENERATION_BACKENDS
from gkd.config.teacher import CROSSINGS, SERVERS
from gkd.config.values import DTYPES
from gkd.io.terminal import visible
from gkd.metrics.divergences import DIVERGENCE_FLAGS, DIVERGENCES
from gkd.metrics.names import METRICS

# Every flag that a record may set, with the type, the choices or a check of its value; see _NEVER_NULL.
_FLAGS: dict[str, type | tuple[str, ...] | Callable[[Any], bool]] = {
    **dict.fromkeys(
        "model_name_or_path model_revision student_adapter teacher_model_name_or_path teacher_revision teacher_adapter "
        "dataset_name dataset_config dataset_train_split dataset_test_split eval_dataset_name".split(),
        str,
    ),
    "lmbda": lambda value: value == "auto" or _fits(value, Real),
    **dict.fromkeys("kd_ratio temperature loss_temperature eval_temperature vllm_memory".split(), Real),
    **dict.fromkeys(DIVERGENCE_FLAGS[1:], Real),
    **dict.fromkeys("max_length max_new_tokens per_device_eval_batch_size seed".split(), int),
    **dict.fromkeys(
        "seq_kd system_as_user load_best_model_at_end load_in_4bit load_in_8bit use_bnb_nested_quant teacher_load_in_4bit "
        "teacher_load_in_8bit".split(),
        bool,
    ),
    "dtype": DTYPES,
    "teacher_dtype": DTYPES,
    "bnb_4bit_quant_type": ("fp4", "nf4"),
    "bnb_4bit_quant_storage": ("uint8", "float16", "float32", "bfloat16", "int8", "float64"),
    "divergence": tuple(DIVERGENCES),
    "train_on": ("last_turn", "all_turns"),
    "cross_tokenizer": CROSSINGS,
    "generation_backend": tuple(GENERATION_BACKENDS),
    "chat_template_kwargs": lambda value: isinstance(value, dict) and all(name.isidentifier() for name in value),
    "metrics": lambda value: isinstance(value, list) and all(name in METRICS for name in value),
    "teacher_model_init_kwargs": dict,
    "teachers": lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value),
}
# Flags that always have a value in a record; for the others null says that they were not given.
_NEVER_NULL = {name for name, kind in _FLAGS.items() if kind in (Real, int, bool)} - {"max_length"}
_NEVER_NULL |= {
    "lmbda",
    "teacher_dtype",
    "bnb_4bit_quant_type",
    "train_on",
    "generation_backend",
    "divergence",
    "cross_tokenizer",
}
# Arguments of the teacher's from_pretrained. `attn_implementation` is a choice, since a kernel of the hub is code.
_LOADING = {
    "dtype": DTYPES,
    **dict.fromkeys(("revision", "subfolder", "variant"), str),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, one of several choices, or passes a check. A switch is no number."""
    if isinstance(kind, type):
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return value in kind if isinstance(kind, tuple) else kind(value)


def usable(arguments: Any, where: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """A record's arguments that a command may use; and by flag, as a phrase, those that apply only if typed again.

    Raises ValueError, which names the record's path `where`, for a value that its flag can't have.
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: its arguments are no JSON object, so train_gkd.py has not written it.")
    accepted, left_out = {}, {}
    for name, kind in _FLAGS.items():
        if name not in arguments:
            continue
        value = accepted[name] = arguments[name]
        if name in _NEVER_NULL if value is None else not _fits(value, kind):
            shown = "null" if value is None else f"{value!r:.60}"
            raise ValueError(f"{where}: {shown} is no value of --{name}. Mend the record, or leave it out there.")
    if recorded := accepted.get("teacher_model_init_kwargs"):
        kept = {k: v for k, v in recorded.items() if k in _LOADING and _fits(v, _LOADING[k])}
        accepted["teacher_model_init_kwargs"] = kept
        if rest := recorded.keys() - kept.keys():
            left_out["teacher_model_init_kwargs"] = f"{', '.join(sorted(rest))} of --teacher_model_init_kwargs"
    if arguments.get("scorer"):
        left_out["scorer"] = f"--scorer {shlex.quote(str(arguments['scorer']))}"
    for name in SERVERS:  # whoever sent the record would get the rows, and the token
        if arguments.get(name):
            beside = ("teacher_top_k",) if name == "teacher_logprobs_url" and "teacher_top_k" in arguments else ()
            words = [word for flag in (name, *beside) for word in (f"--{flag}", str(arguments[flag]))]
            left_out[name] = shlex.join(words)
    if any("://" in word for word in accepted.get("teachers") or ()):  # the same
        left_out["teachers"] = f"--teachers {shlex.join(accepted.pop('teachers'))}"
    left_out |= {n: f"--{n}" for n in ("trust_remote_code", "teacher_trust_remote_code") if arguments.get(n) is True}
    return accepted, {name: visible(phrase) for name, phrase in left_out.items()}
