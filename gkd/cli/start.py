"""What a command answers before torch loads: no arguments, `--help`, a misspelt flag. Imports the standard library and rich.

Training, evaluating and caching have the flags of transformers and TRL, whose import takes seconds. A
file in the user's cache folder keeps their names and help for the versions that are installed; without it, the parser
is built once. The other commands build theirs from gkd.config.commands, which needs no cache.
"""

import argparse
import hashlib
import json
import os
import pkgutil
import signal
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gkd.config.command_line import COMMANDS, LAUNCH, CommandParser
from gkd.config.commands import chat_flags, export_flags, report_flags, shrink_flags
from gkd.io.files import write_json

# Of the commands with few flags: what checks them, without a library.
CHECKS = {
    "gkd export": export_flags,
    "export_model.py": export_flags,
    "gkd report": report_flags,
    "gkd chat": chat_flags,
    "gkd shrink": shrink_flags,
}
_LIBRARIES = ("gkd", "torch", "transformers", "trl", "peft", "accelerate")


def quiet_imports(program: str) -> None:
    """Ctrl-C outside of `gkd.io.errors.one_line_errors` is told in one line too: libraries take seconds to import."""

    def tell(kind, error, trace) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        with suppress(OSError):
            print(f"\n{program}: stopped by Ctrl-C.", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)

    sys.excepthook = tell


def answer(prog: str, doc: str, words: list[str] | None = None) -> CommandParser | None:
    """Answers what needs no import, and exits; returns where the command line looks right.

    What it returns is a parser that knows the names of the flags, those of accelerate's launcher too, for a command that
    can be launched.

    Args:
        prog: a name of `COMMANDS` or `CHECKS`; another command answers itself.
        doc: the description: what the command does, with examples.
        words: what follows the command's name; None stands for the words of this process.
    """
    quiet_imports(prog)
    words = sys.argv[1:] if words is None else words
    if prog in CHECKS:
        CHECKS[prog](words, doc, prog)
    if prog not in COMMANDS:
        return None
    if not words:  # needs no list of flags
        CommandParser(prog=prog, description=doc).check_words(words)
    path, key = _cache_file(prog)
    parser = _read(path, key, prog, doc)
    if parser is None:
        built = pkgutil.resolve_name(COMMANDS[prog][1])(prog=prog, description=doc)  # imports torch and transformers
        flags = describe(built)
        _write(path, key, flags)
        parser = rebuild(flags, prog, doc)
    parser.check_words(parser.check_launch(words))
    if {"-h", "--help", "--help_all"} & set(words):
        parser.show_all = "--help_all" in words
        parser.print_help()
        sys.exit()
    return parser


def describe(parser: CommandParser) -> dict[str, Any]:
    """The flags of a parser and their help, as JSON can hold them."""
    formatter = parser._get_formatter()
    groups = []
    for group in parser._action_groups:
        actions = [
            {
                "flags": action.option_strings,
                "dest": action.dest,
                "help": argparse.SUPPRESS if action.help == argparse.SUPPRESS else formatter._expand_help(action),
                "metavar": action.metavar,
                "nargs": action.nargs,
                "choices": None if action.choices is None else [str(choice) for choice in action.choices],
                "hidden": getattr(action, "hidden", False),
            }
            for action in group._group_actions
        ]
        groups.append({"title": group.title, "actions": actions})
    names = sorted({*parser._option_string_actions, *parser.also_known})
    return {"groups": groups, "names": names, "launcher": pkgutil.resolve_name("gkd.cli.launch:launcher_flags")()}


def rebuild(flags: dict[str, Any], prog: str, doc: str) -> CommandParser:
    """A parser with the flags and the help that `describe` has kept. It checks no values."""
    parser = CommandParser(prog=prog, description=doc, add_help=False)
    parser._action_groups.clear()
    for described in flags["groups"]:
        group = parser.add_argument_group(described["title"])
        for item in described["actions"]:
            options = {name: item[name] for name in ("dest", "metavar", "choices", "nargs") if item[name] is not None}
            if not item["flags"]:
                del options["dest"]
            if item["nargs"] == 0:
                options = {"dest": item["dest"], "action": "store_true"}
            suppressed = item["help"] == argparse.SUPPRESS  # argparse knows it by identity
            text = argparse.SUPPRESS if suppressed else item["help"].replace("%", "%%")
            action = group.add_argument(*(item["flags"] or [item["dest"]]), help=text, default=None, **options)
            action.hidden = item["hidden"]
    if prog.startswith("gkd "):
        parser.add_argument_group("launch").add_argument(
            LAUNCH,
            metavar="NAME|FILE",
            help="start several processes by accelerate, configured by FILE or by one of ours: cpu, single_gpu, ddp, "
            "zero2, zero2_offload, zero3, fsdp2. Flags of `accelerate launch` such as --num_processes may follow.",
        )
    parser.also_known, parser.launcher = flags["names"], flags["launcher"]
    return parser


def cache_folder() -> Path:
    """Where the system keeps what programs can make anew.

    Raises:
        RuntimeError: there is no home folder.
    """
    if sys.platform == "win32" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"], "gkd")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/gkd"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gkd")


def _cache_file(prog: str) -> tuple[Path | None, str]:
    """Where the flags are kept, one file for each installation, and what they hold for: all that decides them."""
    here = Path(__file__).parent.parent
    key = [sys.version]
    for library in _LIBRARIES:
        try:
            key.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            key.append(library)
    for source in sorted(here.rglob("*.py")):  # of an editable installation, the version says nothing
        found = source.stat()
        key.append(f"{source.relative_to(here)} {found.st_size} {found.st_mtime_ns}")
    place = hashlib.sha256(f"{sys.prefix} {here}".encode()).hexdigest()[:12]
    try:
        return cache_folder() / f"{COMMANDS[prog][1].split('.')[2].split(':')[0]}-{place}.json", _digest(key)
    except RuntimeError:
        return None, ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read(path: Path | None, key: str, prog: str, doc: str) -> CommandParser | None:
    """The parser in a cache file; None where there is none, of other versions, or damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != key or kept["digest"] != _digest(kept["flags"]):
            return None
        return rebuild(kept["flags"], prog, doc)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, argparse.ArgumentError):
        return None


def _write(path: Path | None, key: str, flags: dict[str, Any]) -> None:
    if path is not None:
        with suppress(OSError):  # read-only or full: the next start takes as long as this one
            write_json(path, {"key": key, "digest": _digest(flags), "flags": flags})
