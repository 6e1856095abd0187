"""What the tokens of two tokenizers write, and where two sequences of tokens that write one text have a common boundary.

A token writes bytes, or one symbol that is no text: a special token. So two tokenizations are compared without decoding,
and characters whose bytes are in several tokens need no care.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gkd.data.continuation import common_prefix, continuing_ids, puts_space_first, text_ids

# What a token writes: bytes of text, or the number of a symbol, from 256 on. None: nothing that can be told.
Writes = bytes | int | None

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NOT_UNICODE = re.compile("([\udc80-\udcff]+)")  # bytes that are none, as `surrogateescape` decodes them
_SPACES = frozenset(b" \t\n\r\f\v")


def _kinds(part: object) -> set[str]:
    """The types of a component of `tokenizers` and of what it is made of, and the text that it replaces."""
    if part is None:
        return set()
    kinds, todo = set(), [json.loads(part.__getstate__())]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            kinds |= {value[name] for name in ("type", "String") if isinstance(value.get(name), str)}
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return kinds


def _reader(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[str], bytes | None], bool]:
    """From a token of the vocabulary to its bytes, and whether tokens leave the spaces between words out.

    Raises ValueError for a tokenizer of another kind than byte-level, SentencePiece or WordPiece.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    kinds = _kinds(getattr(core, "decoder", None)) or _kinds(getattr(core, "pre_tokenizer", None))
    if "ByteLevel" in kinds:
        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        return lambda token: bytes(map(byte_of.__getitem__, token)) if byte_of.keys() >= set(token) else None, False
    if "Metaspace" in kinds or "▁" in kinds:

        def read(token: str) -> bytes:
            byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
            return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

        return read, False
    if "WordPiece" in kinds:
        return lambda token: token.removeprefix("##").encode(), True
    raise ValueError(
        f"{tokenizer.name_or_path or type(tokenizer).__name__}: which bytes its tokens stand for can't be told: it is neither "
        "a byte-level, a SentencePiece nor a WordPiece tokenizer of the library `tokenizers`."
    )


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes of each id up to the last of the vocabulary; None for special tokens, and for ids of no token.

    Of SentencePiece's tokens ▁ is a space and <0x0A> the byte. WordPiece's have no space, so the bytes of its text have none
    between words. Raises ValueError as `drops_spaces` does.
    """
    read, _ = _reader(tokenizer)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index not in special:
            literal = index in added and token.strip(
                "▁"
            )  # several ▁ are spaces, though Gemma has them as added tokens
            table[index] = token.encode() if literal else read(token)
    return table


def drops_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens leave out the spaces between words. Raises ValueError for a kind of tokenizer that is not known."""
    return _reader(tokenizer)[1]


@dataclass(frozen=True)
class Alignment:
    """The boundaries that two tokenizations of a text have in common.

    Attributes:
        boundaries: (i, j) in rising order, from (0, 0) on: the first i and the first j tokens write the same. Between two of
            them is a span, of one token or more on each side.
        agreed: so many of the first tokens end inside of what both sides write.
        whole: both sides write the same to the end.
    """

    boundaries: list[tuple[int, int]]
    agreed: int
    whole: bool

    def positions(self, count: int) -> tuple[list[int], list[bool], list[int]]:
        """For each of the first side's `count` tokens how many tokens the other side has before its span, whether the token
        begins the span, and how many tokens the other side has on it; 0 behind the last boundary, where no span ends."""
        before, begins, lengths = [], [], []
        for (i, j), (end, other_end) in zip(self.boundaries, [*self.boundaries[1:], (count, None)], strict=True):
            before += [j] * (end - i)
            begins += [place == 0 for place in range(end - i)]
            lengths += [0 if other_end is None else other_end - j] * (end - i)
        return before, begins, lengths


def align(first: Sequence[Writes], second: Sequence[Writes], without_spaces: bool = False) -> Alignment:
    """Aligns what two sequences of tokens write, as far as they write the same.

    Args:
        without_spaces: one of the tokenizers leaves spaces out: white space does not count.
    """
    parts = [
        [_symbols(token, without_spaces, side) for token in tokens] for side, tokens in enumerate((first, second))
    ]
    agreed = common_prefix(*(list(chain.from_iterable(part)) for part in parts))
    ends = [[*accumulate(map(len, part))] for part in parts]
    at = {0: 0} | {end: j for j, end in enumerate(ends[1], 1) if end}
    inside = bisect_right(ends[0], agreed)
    boundaries = [(0, 0)] + [(i, at[end]) for i, end in enumerate(ends[0][:inside], 1) if end in at and end]
    whole = all((part or [0])[-1] == agreed for part in ends)
    return Alignment(boundaries, inside, whole)


def _symbols(token: Writes, without_spaces: bool, side: int) -> Sequence[int]:
    if token is None:
        return (-1 - side,)  # which the other side never has
    if isinstance(token, int):
        return (token,)
    return [byte for byte in token if byte not in _SPACES] if without_spaces else token


def encoded_bytes(
    tokenizer: PreTrainedTokenizerBase, data: bytes, id_of: Callable[[bytes], int | None]
) -> tuple[list[int], bool]:
    """Ids of text that continues other text, and whether they are all of it.

    Bytes that are no Unicode, such as the half of a character that a limit has cut, are written byte by byte.

    Args:
        id_of: the id of the token of a byte, None if there is none; the ids then stop before it.
    """
    ids: list[int] = []
    for part in _NOT_UNICODE.split(data.decode("utf-8", "surrogateescape")):
        if not _NOT_UNICODE.fullmatch(part):
            ids += continuing_ids(tokenizer, part) or text_ids(
                tokenizer, part
            )  # WordPiece's may merge with the context
            continue
        for byte in part.encode("utf-8", "surrogateescape"):
            if (index := id_of(bytes([byte]))) is None:
                return ids, False
            ids.append(index)
    return ids, True


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[bytes], written: Sequence[Writes], known: set[bytes]
) -> list[bytes | None]:
    """The bytes of the first token of each text, which is shorter than it; None where there is none.

    It is that of the tokenizer where the text is Unicode, else the longest of its beginnings that is a token.

    Args:
        written: what the tokenizer's ids write.
        known: the bytes of its tokens.
    """
    strings = [text.decode("utf-8", "replace") for text in texts]
    before = "\n" if puts_space_first(tokenizer) else ""
    head = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
    batches = (strings[i : i + 4096] for i in range(0, len(strings), 4096))
    encoded = (
        row
        for batch in batches
        for row in tokenizer([before + text for text in batch], add_special_tokens=False)["input_ids"]
    )
    firsts = []
    for text, ids in zip(texts, encoded, strict=True):
        begins = ids[: len(head)] == head and len(ids) > len(head) and ids[len(head)] < len(written)
        first = written[ids[len(head)]] if begins else None
        if not (isinstance(first, bytes) and first and len(first) < len(text) and text.startswith(first)):
            beginnings = (text[:length] for length in range(len(text) - 1, 0, -1))
            first = next((beginning for beginning in beginnings if beginning in known), None)
        firsts.append(first)
    return firsts


def shared_classes(
    sides: tuple[Sequence[Writes], Sequence[Writes]],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> tuple[list[list[int]], int, int]:
    """Sorts the ids of two vocabularies into classes, one for each token that both have.

    A token that both have is in its own class. Another goes where the first token of its bytes in the other vocabulary
    goes, which is shorter; so that ends at a token that both have, or nowhere.

    Args:
        sides: what the ids of each vocabulary write.

    Returns:
        The class of each id, for both; the number of classes of shared tokens; and the number of all. There is one more, the
        last, if both have ids that go nowhere; if only one has, their class is -1.
    """
    keys = [set(side) - {None, b""} for side in sides]
    shared = keys[0] & keys[1]
    class_of: dict[Writes, int] = {}
    for writes in chain(*sides):  # in the order of ids: the same in each process
        if writes in shared:
            class_of.setdefault(writes, len(class_of))
    steps: list[dict[bytes, bytes | None]] = []
    for side in (0, 1):
        alone = sorted(writes for writes in keys[side] - shared if isinstance(writes, bytes))
        known = {writes for writes in keys[1 - side] if isinstance(writes, bytes)}
        firsts = first_tokens(tokenizers[1 - side], alone, sides[1 - side], known) if alone else []
        steps.append(dict(zip(alone, firsts, strict=True)))

    def of(writes: Writes, side: int) -> int:
        while writes not in class_of:
            writes, side = steps[side].get(writes), 1 - side
            if writes is None:
                return -1
        return class_of[writes]

    classes = [[of(writes, side) for writes in sides[side]] for side in (0, 1)]
    if not all(-1 in of_side for of_side in classes):
        return classes, len(class_of), len(class_of)
    last = len(class_of)
    return [[last if number < 0 else number for number in of_side] for of_side in classes], last, last + 1
