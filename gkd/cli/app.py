"""The command `gkd VERB ...`: finds what is asked for, and answers help and wrong flags before torch loads."""

import ast
import difflib
import importlib.util
import pkgutil
import sys
from pathlib import Path

import gkd
from gkd.cli.start import answer, quiet_imports
from gkd.io.terminal import visible

# What runs each verb, and what it does.
VERBS = {
    "convert": ("gkd.cli.convert:main", "make rows for training from the data that people have"),
    "cache": ("gkd.cli.cache:main", "keep what a teacher says of its tokens, to train without it"),
    "shrink": ("gkd.cli.shrink:main", "make a student from some of a teacher's layers"),
    "train": ("gkd.cli.train:recorded", "distil a teacher into a student"),
    "evaluate": ("gkd.cli.evaluate:main", "compare students with their teacher on held-out rows"),
    "report": ("gkd.cli.report:main", "write the report of one run or of several"),
    "chat": ("gkd.cli.chat:main", "talk with a student and its teacher side by side"),
    "export": ("gkd.cli.export:main", "write a folder that transformers and vLLM load, with a model card"),
}
HELP = "\n".join(
    [
        "usage: gkd VERB ...",
        "",
        "Distils a large language model into a small one.",
        "",
        *(f"    gkd {verb:<9} {line}" for verb, (_, line) in VERBS.items()),
        "",
        "gkd VERB --help shows the flags of each.",
    ]
)


def main(argv: list[str] | None = None) -> None:
    """Runs `gkd`; exits with code 2 where no verb or an unknown one is given."""
    quiet_imports("gkd")
    verb, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if verb in ("-h", "--help"):
        print(HELP)
    elif verb == "--version":
        print(f"gkd {gkd.__version__}")
    elif not verb:
        print(HELP, file=sys.stderr)
        sys.exit(2)
    elif verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"It is one of {', '.join(VERBS)}."
        print(visible(f"gkd: error: unknown command {verb}. {hint}"), file=sys.stderr)
        sys.exit(2)
    else:
        target, _ = VERBS[verb]
        parser = answer(f"gkd {verb}", _docstring(target.partition(":")[0]), words)
        if parser is not None and parser.take_launch_flag(words)[0] is not None:
            pkgutil.resolve_name("gkd.cli.launch:launch")(verb, words, parser)
            return
        pkgutil.resolve_name(target)(words, f"gkd {verb}")


def _docstring(module: str) -> str:
    """Of a module that is not imported."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source))
