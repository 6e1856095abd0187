"""`--accelerate_config`: starts a command by accelerate's launcher, as `accelerate launch` and `trl sft` do."""

import json
import os
import signal
import sys
from pathlib import Path
from subprocess import CalledProcessError

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import gkd
from gkd.config.command_line import CommandParser, config_file
from gkd.io.errors import one_line
from gkd.runs.typed import LAUNCHED_BY

# Flags of the launcher that are decided here.
_OURS = {"--help", "--module", "--no_python", "--config_file"}


def launcher_flags() -> dict[str, int]:
    """The flags of `accelerate launch` and how many words each takes: none or one."""
    actions = launch_command_parser()._option_string_actions
    return {
        name: int(action.nargs != 0)
        for name, action in actions.items()
        if name.startswith("--") and not _OURS & set(action.option_strings)
    }


def launch(verb: str, words: list[str], parser: CommandParser) -> None:
    """Runs `gkd VERB` in as many processes as accelerate starts; the launcher's flags are taken from `words`.

    Args:
        parser: it has the flags of the command; one that accelerate has too is the command's.
    """
    name, words = parser.take_launch_flag(words)
    launch_words, own_words = parser.split_words(words)
    config = config_file(name)
    given = ["--config_file", str(config)]
    settings = config.with_suffix(".json")
    if Path(name) != config and settings.is_file():  # the YAML names DeepSpeed's settings from the repository's folder
        given += ["--deepspeed_config_file", str(settings)]
    script = Path(gkd.__file__).with_name("__main__.py")
    os.environ[LAUNCHED_BY] = json.dumps(sys.argv)
    args = launch_command_parser().parse_args([*given, *launch_words, str(script), verb, *own_words])
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches what it starts too, which saves before it ends
    try:
        launch_command(args)
    except CalledProcessError as error:  # the process has said why
        sys.exit(error.returncode)
    except ChildFailedError as error:
        sys.exit(str(error))
    except ValueError as error:
        parser.error(f"{' '.join(['--accelerate_config', name, *launch_words])}: {one_line(error)}")
