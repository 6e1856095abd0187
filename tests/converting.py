"""convert_data.py in this process, and the rows that it writes."""

import json

import convert_data


def convert(*arguments):
    """Exit code of the command in this process."""
    try:
        convert_data.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def rows(path):
    return json.loads(path.read_text(encoding="utf-8"))


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
