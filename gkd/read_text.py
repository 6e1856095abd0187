"""Text files of people: an error names the file, the byte and what to do."""

import os
from pathlib import Path


def read_text(path: str | os.PathLike) -> str:
    """All of a UTF-8 text file, without a byte order mark.

    Raises:
        OSError: it can't be read.
        ValueError: it is not UTF-8.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} (0x{content[error.start]:02X}, line {line}). Convert it "
            "first, by `iconv -f ENCODING -t UTF-8` or an editor."
        ) from None
