"""Decompresses files as streams of bytes. One that is cut off, or continues with something else, raises."""

import bz2
import gzip
import io
import lzma
import re
import sys
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ENDINGS = (".gz", ".zst", ".bz2", ".xz")
ARCHIVE = b"PK\x03\x04"  # a zip archive's first bytes
BROKEN = (
    EOFError,
    zlib.error,
    zstd.ZstdError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zipfile.BadZipFile,
    NotImplementedError,
)
_STARTS = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<zstd>\x28\xb5\x2f\xfd)|(?P<xz>\xfd7zXZ\x00)|(?P<bzip2>BZh.(1AY&SY|\x17rE8P\x90))",
    re.DOTALL,
)
_CHUNK = 1 << 20  # bytes


def compression_of(start: bytes) -> str | None:
    """The compression, by a file's first 10 bytes: its name may say something else."""
    found = _STARTS.match(start)
    return found and found.lastgroup


def unpacked(raw: BinaryIO, compression: str | None) -> BinaryIO:
    """The decompressed bytes of a file. Reading them raises one of `BROKEN` if it is damaged."""
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if compression == "zstd":
        return io.BufferedReader(zstd.ZstdFile(raw), _CHUNK)
    if compression in ("bzip2", "xz"):
        decoder = bz2.BZ2Decompressor if compression == "bzip2" else partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)
        return io.BufferedReader(_Streams(raw, decoder), _CHUNK)
    return raw


class _Streams(io.RawIOBase):
    """Compressed streams one after another, as parallel packers write them. After the first of them, bz2 and lzma
    silently drop what they can't read."""

    def __init__(self, raw: BinaryIO, make: Callable[[], Any]):
        self._raw, self._make, self._decoder = raw, make, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while True:
            packed = b""
            if self._decoder is None or self._decoder.eof:
                packed = self._past_padding(self._decoder.unused_data if self._decoder else b"")
                if not packed:
                    return 0
                self._decoder = self._make()
            elif self._decoder.needs_input:
                packed = self._raw.read(_CHUNK)
                if not packed:
                    raise EOFError("it ends too early")
            try:
                content = self._decoder.decompress(packed, len(buffer))
            except OSError as error:  # bz2's, for invalid bytes
                raise EOFError(str(error)) from None
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _past_padding(self, packed: bytes) -> bytes:
        """The next bytes, without the zeros that xz allows between streams."""
        while True:
            packed = packed.lstrip(b"\0") or self._raw.read(_CHUNK)
            if not packed or packed.strip(b"\0"):
                return packed.lstrip(b"\0")
