"""Talks with a student and its teacher at once: both answers stand side by side while they are written.

    gkd chat --student runs/translation --teacher meta-llama/Llama-3.1-8B-Instruct
    gkd chat --student runs/translation --teacher http://127.0.0.1:8500     # behind gkd serve
    gkd chat --student runs/translation --temperature 0 < prompts.txt > answers.txt

Each model keeps its own conversation, in its own chat template; one without a template gets the plain text. All of
sampling but `--temperature` and `--max_new_tokens` follows the model's own generation config; of it `--generation_backend vllm`
heeds top_k, top_p, min_p and the repetition penalty. On a terminal narrower
than 80 columns, or in a file, the answers stand one below the other. From a pipe, each line is a prompt.

`transformers chat` talks with a single model, through a `transformers serve` that runs elsewhere.
"""

import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Thread

import torch
import transformers
from rich import box
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gkd.cli.speakers import Answer, LoadedSpeaker, ServedSpeaker, Speaker, VllmSpeaker, load_tokenizer
from gkd.config.command_line import CommandParser
from gkd.config.commands import chat_flags
from gkd.config.generation import VLLM
from gkd.config.values import is_address
from gkd.io.console import Console, printable
from gkd.io.errors import first_line, one_line_errors
from gkd.io.terminal import visible
from gkd.models.weights import rehearse_trained

try:
    import readline  # noqa: F401  (gives input() a history and editing)
    import termios
except ImportError:  # Windows
    termios = None

NARROW = 80  # columns of a terminal


class Tail:
    """The last `height` lines of a text, so that the growing end of a long answer is in sight."""

    def __init__(self, text: Text, height: int):
        self.text, self.height = text, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n").join(self.text.wrap(console, options.max_width)[-self.height :])


def show(console: Console, speakers: list[Speaker], answers: list[Answer], growing: bool = False) -> RenderableType:
    """Titles, answers and figures. `growing`: only as many lines as fit on the screen."""
    beside = len(speakers) > 1 and console.is_terminal and console.width >= NARROW
    texts: list[RenderableType] = [printable(answer.text) for answer in answers]
    if growing:
        lines = console.height - 8 if beside else (console.height - 2) // len(speakers) - 3
        texts = [Tail(text, max(lines, 1)) for text in texts]
    titles = [Text(visible(speaker.title), style="bold") for speaker in speakers]
    figures = [Text(visible(answer.figures()), style="dim") for answer in answers]
    if not beside:
        return Group(*(part for entry in zip(titles, texts, figures, strict=True) for part in (*entry, "")))
    table = Table(box=box.ROUNDED, expand=True, show_footer=True)
    for title, figure in zip(titles, figures, strict=True):
        table.add_column(title, figure, ratio=1, overflow="fold")
    table.add_row(*texts)
    return table


@contextmanager
def silent_keyboard() -> Iterator[None]:
    """Switches echo off: typed letters (also ^C) would move the cursor away from where rich's Live left it."""
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextmanager
def stopped_by_interrupt(answers: list[Answer]) -> Iterator[None]:
    """Ctrl-C stops the answers, without an exception, which could hit Live or leave a thread behind."""

    def stop(*signal_and_frame) -> None:
        for answer in answers:
            answer.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ask(console: Console, speakers: list[Speaker], prompt: str, interactive: bool) -> None:
    """Lets all models answer at once, each in a thread; Ctrl-C stops them and keeps the text so far."""
    answers = [Answer(speaker.tokenizer) for speaker in speakers]
    pairs = zip(speakers, answers, strict=True)
    threads = [Thread(target=speaker.answer, args=(prompt, answer)) for speaker, answer in pairs]
    screen = partial(show, console, speakers, answers, growing=True)
    live = Live(get_renderable=screen, console=console, refresh_per_second=8, transient=True)
    with stopped_by_interrupt(answers):
        shown = live if interactive and console.is_terminal else nullcontext()
        with silent_keyboard() if interactive and termios else nullcontext(), shown:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.02)  # not join(), which would delay Ctrl-C to the end of the answer
        console.print(show(console, speakers, answers), soft_wrap=not console.is_terminal)
    if answers[0].stopped and not interactive:
        raise KeyboardInterrupt


def read_prompts(interactive: bool) -> Iterator[str]:
    """Non-empty lines, until /quit or the end of the input."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()  # as in a shell: drops the line, keeps the conversation
            continue
        if line == "/quit":
            return
        if line:
            yield line


def main(argv: list[str] | None = None, prog: str = "gkd chat") -> None:
    with one_line_errors(prog):
        chat(chat_flags(argv, __doc__, prog), prog)


def chat(args: Namespace, prog: str) -> None:
    if args.device != "auto":
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            CommandParser(prog=prog).error(f"--device {args.device}: {first_line(error)}")
    interactive = sys.stdin.isatty()
    console = Console(highlight=False)
    transformers.logging.set_verbosity_error()  # warnings would tear the screen
    transformers.logging.disable_progress_bar()
    folders, served = {"student": args.student}, []
    try:
        if args.teacher and is_address(args.teacher):
            served = [ServedSpeaker(args.teacher, args)]
        elif args.teacher:
            folders["teacher"] = args.teacher
        # Both models are checked before the weights of one are read.
        trusted = {"student": args.trust_remote_code, "teacher": args.teacher_trust_remote_code}
        tokenizers = {role: load_tokenizer(name, args.system, trusted[role]) for role, name in folders.items()}
        for role, folder in folders.items():
            rehearse_trained(folder, {"dtype": args.dtype, "trust_remote_code": trusted[role]})
        speakers, kind = [], VllmSpeaker if args.generation_backend == VLLM else LoadedSpeaker
        for role, folder in folders.items():
            with console.status(f"loading the {role}") if console.is_terminal else nullcontext():
                speakers.append(kind(f"{role}: {folder}", folder, tokenizers[role], args, trusted[role]))
        speakers += served
        if interactive:
            console.print(
                "/clear forgets the conversation, Ctrl-C stops an answer, /quit or Ctrl-D leaves.", style="dim"
            )
        for prompt in read_prompts(interactive):
            if not interactive:
                console.print(printable(f"> {prompt}"), soft_wrap=True)
            if prompt == "/clear":
                for speaker in speakers:
                    speaker.clear()
            else:
                ask(console, speakers, prompt, interactive)
    except UnicodeDecodeError as error:
        sys.exit(f"{prog}: the prompts are not UTF-8: {error}")
    except ValueError as error:
        sys.exit(visible(f"{prog}: {error}"))
