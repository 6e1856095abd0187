"""Ids of text that goes on from other text.

SentencePiece's tokenizers, and some others, put a space before each text that they are given. Before an answer, which
goes on from its prompt, that space is a wrong first token.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise, takewhile

from transformers import PreTrainedTokenizerBase

# What a row's tokens are depends on this code. Raised when they change: `datasets` knows its cached rows by the fields of
# gkd.data.encoding.RowEncoder, not by its code, and a teacher's cache holds tokens of the code that made it.
ENCODING = 2

# One of them does not merge with a given text, whatever the vocabulary.
_BEFORE = ("", "\n", "a", "1", ".", "中")


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Of a text by itself, without tokens that the tokenizer adds around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Of a text that is to go on: with what the tokenizer puts before it, without what it closes a text by."""
    ids, whole = text_ids(tokenizer, text), tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(ids) + 1 if ids else 0):
        if whole[start : start + len(ids)] == ids:
            return whole[: start + len(ids)]
    return whole


def going_on(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Of a text that goes on from another: without the space that a tokenizer puts before the first."""
    if not text:
        return []
    context = text_ids(tokenizer, "a")  # decoding drops the space before the first token, so there is one before
    shown = len(_decode(tokenizer, context))
    for before in _BEFORE:
        ids, head = text_ids(tokenizer, before + text), text_ids(tokenizer, before) if before else []
        rest = ids[len(head) :]
        if ids[: len(head)] == head and _spaces(_decode(tokenizer, context + rest[:64])[shown:]) == _spaces(text):
            return rest
    return text_ids(tokenizer, text)


def continuation(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], more: str) -> list[int]:
    """Ids of `more` behind a text and its ids: those of both together, unless a token crosses the border."""
    added = _added_ids(tokenizer)
    last = next((place for place in reversed(range(len(ids))) if ids[place] in added), None)
    if last is not None:  # a tokenizer splits text there, so what stands before makes no difference
        tail = text[max(text.rfind(tokenizer.convert_ids_to_tokens(ids[last])), 0) :]
        if text_ids(tokenizer, tail) == ids[last:]:
            text, ids = tail, ids[last:]
    both = text_ids(tokenizer, text + more)
    return both[len(ids) :] if both[: len(ids)] == ids else going_on(tokenizer, more)


def token_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Where spans of a text's characters, in order, lie among its ids; a token that crosses a border lies outside."""
    places, at = [], 0
    for start, end in pairwise([0, *(position for span in spans for position in span)]):
        # By itself or going on: behind a special token, some tokenizers put their space once more.
        pieces = (make(tokenizer, text[start:end]) for make in (text_ids, going_on))
        length = next((len(piece) for piece in pieces if ids[at : at + len(piece)] == piece), None)
        if length is None:
            return [_span(tokenizer, text, ids, *span) for span in spans]
        at += length
        places.append(at)
    return list(zip(places[::2], places[1::2], strict=True))


def _span(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], start: int, end: int) -> tuple[int, int]:
    """One of `token_spans`, from all the text before it and behind it."""
    head = text_ids(tokenizer, text[:start])
    first = len(head)
    if ids[:first] != head:
        first = len(ids) - _alike(reversed(ids), reversed(going_on(tokenizer, text[start:])))
    return first, max(first, _alike(ids, text_ids(tokenizer, text[:end])))


def puts_space_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text by itself begins with a space that is not in it."""
    return text_ids(tokenizer, "4") != going_on(tokenizer, "4")


@lru_cache(maxsize=8)
def _added_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _spaces(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _alike(first: Iterable[int], second: Iterable[int]) -> int:
    """How many leading ids are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
