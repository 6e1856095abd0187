"""Broken data files for tests/convert/test_convert_data.py: (name, content, how the message goes on after the file's path)."""

import gzip
import json
import random
from collections.abc import Iterator

QUESTION = {"role": "user", "content": "你好, how are you?"}
ANSWER = {"role": "assistant", "content": "fine"}

# Rows that are JSON but no conversation.
WRONG = [
    '{"messages": null, "prompt": null}',
    '{"messages": []}',
    '{"messages": "hello"}',
    '{"messages": {"role": "user", "content": "a"}}',
    '{"messages": [[{"role": "user", "content": "a"}]]}',
    '{"messages": [{"role": "user", "content": null}]}',
    '{"messages": [{"role": "user", "content": 5}]}',
    '{"messages": [{"role": ["user"], "content": "a"}]}',
    '{"messages": [{"content": "a"}]}',
    '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": [["nested", ["list"]]]}]}',
    '{"messages": [{"role": "assistant", "content": "a", "tool_calls": 3}, {"role": "user", "content": "b"}]}',
    '{"prompt": "of another schema", "completion": "b"}',
    "[[[[[]]]]]",
    "null",
    "3.5",
    '"text"',
]
# Lines that are not JSON.
BROKEN = ["{", '{"messages": [', "}{", "\x00", "{'single': 1}", "[" * 100_000, '{"a": ' * 100_000, "NaNa", '{"a": "b}']


def corruptions(draw: random.Random, count: int) -> Iterator[tuple[str, bytes, str]]:
    """Good rows with one thing wrong at a random place."""
    for index in range(count):
        good = [json.dumps({"messages": [QUESTION, ANSWER]}, ensure_ascii=False) for _ in range(draw.randint(2, 40))]
        at = draw.randrange(1, len(good))
        lines = [*good[:at], "", *good[at:]]
        kind = (
            "wrong line",
            "broken line",
            "wrong row",
            "cut array",
            "bytes",
            "cut gzip",
            "huge",
            "empty",
            "cut line",
        )[index % 9]
        if kind in ("wrong line", "broken line"):
            lines[at] = WRONG[index // 9 % len(WRONG)] if kind == "wrong line" else BROKEN[index // 9 % len(BROKEN)]
            yield f"{index}.jsonl", "\n".join(lines).encode(), f", line {at + 1}: "
        elif kind == "wrong row":
            row = WRONG[index // 9 % len(WRONG)]
            yield f"{index}.json", f"[{', '.join([*good[:at], row, *good[at:]])}]".encode(), f", row {at}: "
        elif kind == "cut array":
            text = f"[{', '.join(good)}]"
            yield f"{index}.json", text.encode()[: draw.randrange(2, len(text) - 1)], ", row "
        elif kind == "bytes":
            lines[at] = good[0]
            content = "\n".join(lines).encode().split(b"\n")
            content[at] = content[at].replace("好".encode(), b"\xe5\xa5")
            yield f"{index}.jsonl", b"\n".join(content), f", line {at + 1}: "
        elif kind == "cut gzip":
            packed = gzip.compress("\n".join(good).encode())
            yield f"{index}.jsonl.gz", packed[: len(packed) * 2 // 3], ": broken gzip file"
        elif kind == "huge":
            lines[at] = json.dumps({"messages": [{"role": "user", "content": "x" * 5_000_000}, {"role": 1}]})
            yield f"{index}.jsonl", "\n".join(lines).encode(), f", line {at + 1}: "
        elif kind == "empty":
            empty = draw.choice([b"", b"\n\n", b"[]", b"\xef\xbb\xbf", b" [ ] "])
            yield f"{index}.json", empty, ": no rows"
        else:
            yield f"{index}.jsonl", "\n".join(good).encode()[:-3], f", line {len(good)}: "
