"""Detects the encoding of a text file where that is certain; otherwise the user is asked for it."""

import codecs
from typing import BinaryIO

from gkd.data.rows import DataError

_CHUNK = 1 << 20  # bytes
_SCAN = 16  # chunks
# The most frequent characters of Chinese.
_FREQUENT = set(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事"
    "成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
)
# Byte order marks.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with UTF-16's mark, so it comes first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def named_encoding(stream: BinaryIO, encoding: str) -> str:
    """The encoding that the user named, in the variant that skips a byte order mark where the file has one."""
    start, name = stream.read(4), codecs.lookup(encoding).name
    marked = next((marked for mark, marked in _MARKS if start.startswith(mark)), name)
    return marked if name in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be") else encoding


def detect_encoding(stream: BinaryIO, name: str) -> str:
    """Detects UTF-8 with or without a mark, UTF-16 or UTF-32 by its mark, or GB18030, from the first 16 MiB.
    Raises DataError where it is not certain, naming the likeliest, if there is one."""
    start = stream.read(4096)
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    if start.count(0) > 0.1 * len(start):  # valid UTF-8, but every other character would be a zero
        likely = "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
        raise DataError(
            f"{name}: every other byte or so is zero, as in UTF-16 without a mark; name its encoding by --encoding, such "
            f"as {likely}."
        )
    decoder = codecs.getincrementaldecoder("utf-8")()
    chunk = start
    for _ in range(_SCAN):
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            line = error.object.rfind(b"\n", 0, error.start) + 1
            return _without_marks(error.object[line:] + stream.read(1 << 16), name)
        chunk = stream.read(_CHUNK)
    return "utf-8"


def _without_marks(sample: bytes, name: str) -> str:
    """The encoding of text that is not UTF-8 throughout."""
    as_utf8 = sample.decode("utf-8", "replace")
    valid = sum(character > "\x7f" for character in as_utf8) - as_utf8.count("\ufffd")
    if valid >= as_utf8.count("\ufffd"):
        return "utf-8"  # with a few broken bytes, which spoil only their own rows

    import charset_normalizer  # here, since few files need it

    matches = charset_normalizer.from_bytes(sample)  # the least chaotic first
    chinese = next((match for match in matches if "gb18030" in match.could_be_from_charset), None)
    # Nearly any bytes decode as GB18030, Korean, Thai and Cyrillic ones too. But every third character of real Chinese
    # is one of the hundred most frequent, against one in forty by chance; and no other encoding gives a more coherent
    # text without being more chaotic.
    foreign = [character for character in sample.decode("gb18030", "replace") if character > "\x7f"]
    frequent = sum(character in _FREQUENT for character in foreign) >= 0.1 * len(foreign)
    others = [match for match in matches if match is not chinese and match.coherence > 0]
    if chinese and frequent:
        others = [match for match in others if match.coherence > chinese.coherence and match.chaos <= chinese.chaos]
        if not others:
            return "gb18030"
    guess = f" (perhaps {others[0].encoding}, {others[0].language})" if others else ""
    raise DataError(f"{name}: neither UTF-8 nor GB18030; name its encoding by --encoding{guess}.")
