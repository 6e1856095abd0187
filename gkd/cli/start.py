"""The command `gkd VERB ...`, and what a command answers before torch loads: no arguments, `--help`, a misspelt flag.

Training, evaluating and caching have the flags of transformers and TRL, whose import takes seconds. A file in the
user's cache folder keeps the names and help of these flags for the installed versions; without the file, the parser is
built once. The other commands build theirs without a library. Imports the standard library alone.
"""

import argparse
import ast
import difflib
import hashlib
import importlib.util
import json
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gkd
from gkd.config.command_line import COMMANDS, LAUNCH, LAUNCHED, CommandParser
from gkd.io.files import write_json
from gkd.io.terminal import visible

# The function that runs each verb, and what it does.
VERBS = {
    "convert": ("gkd.cli.convert:main", "make rows for training from the data that people have"),
    "cache": ("gkd.cli.cache:main", "keep what a teacher says of its tokens, to train without it"),
    "shrink": ("gkd.cli.shrink:main", "make a student from some of a teacher's layers"),
    "diagnose": ("gkd.cli.diagnose:main", "tell whether on-policy training will pay, and with which flags"),
    "serve": ("gkd.cli.serve:main", "answer for a teacher, to students that train elsewhere"),
    "train": ("gkd.cli.train:recorded", "distil a teacher into a student"),
    "evaluate": ("gkd.cli.evaluate:main", "compare students with their teacher on held-out rows"),
    "report": ("gkd.cli.report:main", "write the report of one run or of several"),
    "chat": ("gkd.cli.chat:main", "talk with a student and its teacher side by side"),
    "export": ("gkd.cli.export:main", "write a folder that transformers and vLLM load, with a model card"),
}
HELP = "usage: gkd VERB ...\n\nDistils a large language model into a small one.\n\n"
HELP += "".join(f"    gkd {verb:<9} {line}\n" for verb, (_, line) in VERBS.items())
HELP += "\ngkd VERB --help shows the flags of each."
# For the commands with few flags: the function that parses and checks them, without a library.
CHECKS = {f"gkd {verb}": f"gkd.config.commands:{verb}_flags" for verb in ("export", "report", "chat", "shrink")}
CHECKS |= {"export_model.py": CHECKS["gkd export"]}
CHECKS |= dict.fromkeys(("gkd convert", "convert_data.py"), "gkd.cli.convert:parse_arguments")
_PACKAGE = Path(__file__).parent.parent
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


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
        source = Path(importlib.util.find_spec(f"gkd.cli.{verb}").origin)  # found, not imported: that takes seconds
        doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
        parser = answer(f"gkd {verb}", doc, words)
        if parser is not None and parser.launched:
            pkgutil.resolve_name("gkd.cli.launch:launch")(verb, words, parser)
        else:
            pkgutil.resolve_name(VERBS[verb][0])(words, f"gkd {verb}")


def script(verb: str, prog: str, doc: str) -> Callable[..., None]:
    """The `main` of a file `prog` that does what `gkd VERB` does, by default with the words of this process."""

    def main(argv: list[str] | None = None) -> None:
        if argv is None:
            answer(prog, doc)
        target = VERBS[verb][0] if argv is None else f"gkd.cli.{verb}:main"
        pkgutil.resolve_name(target)(argv, prog)

    return main


def quiet_imports(program: str) -> None:
    """Makes Ctrl-C end the process with one line while libraries are imported, before `one_line_errors` takes over."""

    def on_exception(kind, error, trace) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        with suppress(OSError):
            print(f"\n{program}: stopped by Ctrl-C.", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)

    sys.excepthook = on_exception


def answer(prog: str, doc: str, words: list[str] | None = None) -> CommandParser | None:
    """Answers what needs no import, and exits; returns if the command line looks right.

    Args:
        prog: a name in `COMMANDS` or `CHECKS`.
        doc: the description: what the command does, with examples.
        words: the words behind the command's name; by default those of this process.

    Returns:
        For a command in `COMMANDS`, a parser that knows the names of its flags and of those of accelerate's launcher.
    """
    quiet_imports(prog)
    words = sys.argv[1:] if words is None else words
    if prog in CHECKS:
        pkgutil.resolve_name(CHECKS[prog])(words, doc, prog)
        return None
    if not words:  # needs no list of flags
        CommandParser(prog=prog, description=doc).check_words(words)
    parser = _read(prog, doc)
    if parser is None:
        built = pkgutil.resolve_name(COMMANDS[prog][1])(prog=prog, description=doc)  # imports torch and transformers
        flags = describe(built)
        with suppress(OSError, RuntimeError):  # read-only, full or no home: the next start takes as long as this one
            write_json(_cache_file(prog), {"key": _key(), "digest": _digest(flags), "flags": flags})
        parser = rebuild(flags, prog, doc)
    parser.check_words(parser.check_launch(words))
    if {"-h", "--help", "--help_all"} & set(words):
        parser.show_all = "--help_all" in words
        parser.print_help()
        sys.exit()
    return parser


def describe(parser: CommandParser) -> dict[str, Any]:
    """The flags of a parser and their help, as a value that JSON can hold; `rebuild` reads it."""
    formatter = parser._get_formatter()
    groups: dict[str, list[dict[str, Any]]] = {}
    for group in parser._action_groups:
        groups[group.title] = shown = []
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS:
                continue
            options: dict[str, Any] = {"action": "store_true"}
            if action.nargs != 0:
                choices = action.choices and [str(choice) for choice in action.choices]
                options = {"metavar": action.metavar, "nargs": action.nargs, "choices": choices}
            options |= {"dest": action.dest, "help": formatter._expand_help(action).replace("%", "%%")}
            hidden = getattr(action, "hidden", False)
            shown.append({"names": action.option_strings, "options": options, "hidden": hidden})
    names = sorted({*parser._option_string_actions, *parser.also_known})
    return {"groups": groups, "names": names, "launcher": pkgutil.resolve_name("gkd.cli.launch:launcher_flags")()}


def rebuild(flags: dict[str, Any], prog: str, doc: str) -> CommandParser:
    """A parser with the flags and help of `describe`, and with --accelerate_config. It checks no values."""
    parser = CommandParser(prog=prog, description=doc, add_help=False)
    parser._action_groups.clear()
    for title, actions in flags["groups"].items():
        group = parser.add_argument_group(title)
        for action in actions:
            group.add_argument(*action["names"], default=None, **action["options"]).hidden = action["hidden"]
    if prog in LAUNCHED:
        parser.add_argument_group("launch").add_argument(
            LAUNCH,
            metavar="NAME|FILE",
            help="start several processes by accelerate, configured by FILE or by one of ours: cpu, single_gpu, ddp, "
            "zero2, zero2_offload, zero3, fsdp2. Flags of `accelerate launch` such as --num_processes may follow.",
        )
    parser.also_known, parser.launcher = flags["names"], flags["launcher"]
    return parser


def cache_folder() -> Path:
    """The system's folder for caches of programs. Raises RuntimeError if there is no home folder."""
    if sys.platform == "win32" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"], "gkd")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/gkd"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gkd")


def _cache_file(prog: str) -> Path:
    """The file that caches a command's flags for this installation. Raises RuntimeError if there is no home folder."""
    installation = hashlib.sha256(f"{sys.prefix} {_PACKAGE}".encode()).hexdigest()[:12]
    return cache_folder() / f"{COMMANDS[prog][1].split('.')[2].split(':')[0]}-{installation}.json"


def _key() -> str:
    """Of what a cached file is valid for: the versions of Python and the libraries, and gkd's own source."""
    key = [sys.version, *(f"{library} {version(library)}" for library in _LIBRARIES)]
    for source in sorted(_PACKAGE.rglob("*.py")):  # an editable installation changes under one version
        status = source.stat()
        key.append(f"{source.relative_to(_PACKAGE)} {status.st_size} {status.st_mtime_ns}")
    return _digest(key)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read(prog: str, doc: str) -> CommandParser | None:
    """The parser in a command's cache file; None if there is no file, or it is damaged or of other versions."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, argparse.ArgumentError):
        content = json.loads(_cache_file(prog).read_text(encoding="utf-8"))
        if content["key"] == _key() and content["digest"] == _digest(content["flags"]):
            return rebuild(content["flags"], prog, doc)
    return None
