"""`--accelerate_config`: starts a command in several processes, as `accelerate launch` and `trl sft` do."""

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

# Flags of accelerate's launcher that gkd sets itself.
_OURS = {"--help", "--module", "--no_python", "--config_file"}


def launcher_flags() -> dict[str, int]:
    """The flags of `accelerate launch`, and whether each takes a value: 0 or 1."""
    return {
        name: int(action.nargs != 0)
        for name, action in launch_command_parser()._option_string_actions.items()
        if name.startswith("--") and not _OURS & set(action.option_strings)
    }


def launch(verb: str, words: list[str], parser: CommandParser) -> None:
    """Runs `gkd VERB` through accelerate's launcher. A flag that both have is for the command, of `parser`."""
    name, launch_words, command_words = parser.split_words(words)
    config = config_file(name)
    config_flags = ["--config_file", str(config)]
    settings = config.with_suffix(".json")
    if Path(name) != config and settings.is_file():  # our YAML names DeepSpeed's file relative to the repository
        config_flags += ["--deepspeed_config_file", str(settings)]
    script = Path(gkd.__file__).with_name("__main__.py")
    os.environ[LAUNCHED_BY] = json.dumps(sys.argv)
    args = launch_command_parser().parse_args([*config_flags, *launch_words, str(script), verb, *command_words])
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the training itself, which saves before it ends
    try:
        launch_command(args)
    except CalledProcessError as error:  # the process has printed the reason
        sys.exit(error.returncode)
    except ChildFailedError as error:
        sys.exit(str(error))
    except ValueError as error:
        parser.error(f"{' '.join(['--accelerate_config', name, *launch_words])}: {one_line(error)}")
