"""Token ids of text that continues other text.

SentencePiece's tokenizers, and some others, put a space before each text that they are given. Before an answer, which
continues its prompt, that space is a wrong first token.
"""

from collections.abc import Iterable
from functools import lru_cache, partial
from itertools import pairwise, takewhile

from transformers import PreTrainedTokenizerBase

# Version of the tokens that this code gives a row; raise it when they change. `datasets` identifies its cached rows by
# the fields of gkd.data.encoding.RowEncoder, not by its code, and a teacher cache holds its writer's tokens.
ENCODING = 2

# Whatever the vocabulary, a text does not merge with at least one of them before it.
_BEFORE = ("", "\n", "a", "1", ".", "中")


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text by itself, without tokens that the tokenizer adds around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text to be continued: with what the tokenizer adds before it (BOS), without what it adds after (EOS)."""
    ids, whole = text_ids(tokenizer, text), tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(ids) + 1 if ids else 0):
        if whole[start : start + len(ids)] == ids:
            return whole[: start + len(ids)]
    return whole


def continuing_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that continues another: without the space that the tokenizer puts before a text."""
    if not text:
        return []
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    context = text_ids(tokenizer, "a")  # decoding drops the space of the first token
    shown = len(decode(context))
    for before in _BEFORE:
        ids, head = text_ids(tokenizer, before + text), text_ids(tokenizer, before) if before else []
        rest = ids[len(head) :]
        if ids[: len(head)] == head:
            decoded = decode(context + rest[:64])[shown:]
            if len(decoded) - len(decoded.lstrip(" ")) == len(text) - len(text.lstrip(" ")):
                return rest
    return text_ids(tokenizer, text)


def continuation(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], more: str) -> list[int]:
    """Ids of `more` behind a text and its ids: as both tokenize together, unless a token crosses the border."""
    added = _added_ids(tokenizer)
    last = next((place for place in reversed(range(len(ids))) if ids[place] in added), None)
    if last is not None:  # text is split at added tokens, so what stands before makes no difference
        tail = text[max(text.rfind(tokenizer.convert_ids_to_tokens(ids[last])), 0) :]
        if text_ids(tokenizer, tail) == ids[last:]:
            text, ids = tail, ids[last:]
    both = text_ids(tokenizer, text + more)
    return both[len(ids) :] if both[: len(ids)] == ids else continuing_ids(tokenizer, more)


def token_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Maps spans of a text's characters, in order, to spans of its ids; a token that crosses a border is left out."""
    places, at = [], 0
    for start, end in pairwise([0, *(position for span in spans for position in span)]):
        # By itself or as a continuation: some tokenizers put their space behind a special token too.
        pieces = (make(tokenizer, text[start:end]) for make in (text_ids, continuing_ids))
        length = next((len(piece) for piece in pieces if ids[at : at + len(piece)] == piece), None)
        if length is None:
            return [_span(tokenizer, text, ids, *span) for span in spans]
        at += length
        places.append(at)
    return list(zip(places[::2], places[1::2], strict=True))


def _span(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], start: int, end: int) -> tuple[int, int]:
    """One span of `token_spans`, found from the whole text before and behind it."""
    head = text_ids(tokenizer, text[:start])
    first = len(head)
    if ids[:first] != head:
        first = len(ids) - common_prefix(reversed(ids), reversed(continuing_ids(tokenizer, text[start:])))
    return first, max(first, common_prefix(ids, text_ids(tokenizer, text[:end])))


def puts_space_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before a text that has none."""
    return text_ids(tokenizer, "4") != continuing_ids(tokenizer, "4")


@lru_cache(maxsize=8)
def _added_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


def common_prefix(first: Iterable, second: Iterable) -> int:
    """How many leading items are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
