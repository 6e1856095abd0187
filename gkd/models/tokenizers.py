"""The tokenizers of student and teacher: loading, stop tokens, and the ids that both share."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from gkd.config.training import GKDArguments
from gkd.io.errors import one_line
from gkd.io.paths import not_loaded, read_text

# Tokenizers with equal vocabularies can split text differently (merges, normalisation); these texts reveal it.
PROBES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "def f(x):\n    return x ** 2  # squared\n",
    "帮我把下面中文翻译成英文: 很好,那是一幅很酷的画作。",
    "Größe, naïve café, 🙂 — “quoted”…\tTab",
)


# The flag that takes a teacher with another tokenizer.
CROSS = "--cross_tokenizer shared of gkd train, cache, evaluate and diagnose"


class VocabularyMismatch(ValueError):
    """Student and teacher do not share a vocabulary."""


def shared_vocab_size(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    student_size: int,
    teacher_size: int,
) -> int:
    """The number of leading ids that mean the same token in both models.

    Models pad their vocabulary to a round size, and models of one family may differ in padding alone (Qwen2.5: 151936
    and 152064). Then the smaller size is shared: every id that a tokenizer can produce lies below it. Without a teacher's
    tokenizer the sizes must be equal. Raises VocabularyMismatch, which names the first differing token, or the id that a
    model has no logit for.
    """
    shared = min(student_size, teacher_size)
    if teacher_tokenizer is None:
        if student_size != teacher_size:
            raise VocabularyMismatch(
                f"Student and teacher have vocabularies of {student_size} and {teacher_size} ids, and the teacher's "
                "tokenizer is not known, so it can't be told whether they differ in padding alone. Pass "
                "teacher_processing_class=, or save the tokenizer beside the teacher."
            )
        return shared
    both = student_tokenizer, teacher_tokenizer
    student, teacher = ({index: token for token, index in t.get_vocab().items()} for t in both)
    for index in sorted(student.keys() | teacher.keys()):
        if student.get(index) != teacher.get(index):
            raise VocabularyMismatch(
                f"The tokenizers differ: id {index} is {student.get(index)!r} for the student and "
                f"{teacher.get(index)!r} for the teacher. GKD needs one vocabulary: take a student of the teacher's "
                f"family, or compare the tokens that both have ({CROSS})."
            )
    if max(student) >= shared:
        raise VocabularyMismatch(
            f"The tokenizer produces id {max(student)} ({student[max(student)]!r}), but the smaller model has logits "
            f"for {shared} ids only. Resize its embeddings first."
        )
    for text in PROBES:
        student_ids, teacher_ids = (t(text, add_special_tokens=False)["input_ids"] for t in both)
        if student_ids != teacher_ids:
            raise VocabularyMismatch(
                f"The tokenizers have the same vocabulary but split text differently: {text!r} becomes "
                f"{student_ids[:8]}... for the student and {teacher_ids[:8]}... for the teacher. GKD needs the same "
                f"tokenizer, or {CROSS}."
            )
    return shared


def stop_token_ids(*holders: Any) -> list[int]:
    """All stop tokens of tokenizers, model configs and generation configs, sorted.

    Chat models often end a turn with a token that only one of these names. Raises ValueError if there is none, so that no
    generation would end by itself, or one is no token id.
    """
    stop_ids: set[int] = set()
    for holder in holders:
        ids = getattr(holder, "eos_token_id", None)
        ids = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or i < 0:
                raise ValueError(f"{type(holder).__name__}: {i!r} is no id of a token, as eos_token_id.")
        stop_ids.update(ids)
    if not stop_ids:
        raise ValueError("Neither the tokenizer nor a model names an end-of-sequence token; set --eos_token.")
    return sorted(stop_ids)


_TOKENIZER_FILES = "tokenizer.json tokenizer_config.json tokenizer.model vocab.json vocab.txt spiece.model".split()
# Options of `cached_file`: None instead of an exception for a missing file.
_MAY_LACK = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}


def optional_tokenizer(name: str, revision: str | None = None, **options: Any) -> PreTrainedTokenizerBase | None:
    """A model's tokenizer, None if it has none. Raises ValueError if it can't be loaded."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", **options)
    except Exception as error:  # the tokenizers library raises bare ones
        reason = one_line(error)
    try:
        found = any(cached_file(name, file, revision=revision, **_MAY_LACK) for file in _TOKENIZER_FILES)
    except (OSError, ValueError):  # no such model, which `read_configs` reports
        found = False
    if found:
        raise ValueError(f"{name}: its tokenizer can't be loaded: {reason}")
    return None


def apply_token_flags(tokenizer: PreTrainedTokenizerBase, args: GKDArguments) -> None:
    """Applies --eos_token, --pad_token and --chat_template_path, which TRL would do only after rows are encoded.

    A tokenizer without a pad token gets its EOS, as in TRL. Raises ValueError if the vocabulary lacks a token, or there is
    no template at the path.
    """
    for flag in ("eos_token", "pad_token"):
        if (token := getattr(args, flag)) is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"--{flag} {token!r} is not in the student's vocabulary.")
            setattr(tokenizer, flag, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    flag, path = "--chat_template_path", args.chat_template_path
    if path is None:
        return
    if Path(path).is_file():
        tokenizer.chat_template = read_text(path)
    else:
        try:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
        except Exception as error:  # the tokenizers library raises bare ones
            if not Path(path).exists() and path.startswith((".", "/", "~")):
                raise ValueError(f"{flag} {path}: no such file or folder.") from error
            raise ValueError(not_loaded(flag, path, error, "its chat template")) from error
    if tokenizer.chat_template is None:
        raise ValueError(f"{flag} {path}: no chat template there.")
    args.chat_template_path = None  # or TRL would also copy the special tokens from there


def keep_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any] | None) -> None:
    """Writes `--chat_template_kwargs` into the template as defaults, so that they hold when the student is served."""
    if kwargs and isinstance(tokenizer.chat_template, str):
        names = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
            for name, value in kwargs.items()
        )
        # Rendering with trim_blocks drops this line feed, so the template's beginning is unchanged.
        tokenizer.chat_template = f"{names}\n{tokenizer.chat_template}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and the chat template, which determine the tokens of a row."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return hashlib.sha256(content.encode()).hexdigest()


# What `describe_tokenizer` tells beside a tokenizer's core and its template.
_SPECIAL_TOKENS = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any] | None:
    """A fast tokenizer as data; None where there is none, or none that is data."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = {name: str(token) for name in _SPECIAL_TOKENS if (token := getattr(tokenizer, name)) is not None}
    return {"tokenizer": backend.to_str(), "special": special, "chat_template": tokenizer.chat_template}


def described_tokenizer(described: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that `describe_tokenizer` describes, of data that may be anybody's. Raises ValueError for what is none."""
    try:
        core = Tokenizer.from_str(described["tokenizer"])
        special, template = described["special"], described["chat_template"]
        # These alone: other arguments name files. A token that is not in the vocabulary would be added to it.
        names = [name for name in _SPECIAL_TOKENS if core.token_to_id(special.get(name, "")) is not None]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{name: special[name] for name in names})
    except Exception as error:  # the tokenizers library raises bare ones
        raise ValueError(one_line(error)) from None
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer
