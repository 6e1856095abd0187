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

import random
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich import box
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from gkd.config.command_line import CommandParser
from gkd.config.commands import chat_flags
from gkd.config.generation import VLLM
from gkd.config.teacher import TeacherArguments
from gkd.config.values import is_address
from gkd.data.continuation import prompt_ids
from gkd.generation.vllm import completed, new_engine, own_parameters
from gkd.io.console import Console, printable
from gkd.io.errors import first_line, one_line, one_line_errors
from gkd.io.terminal import visible
from gkd.models.heads import base_of
from gkd.models.loading import load_trained, read_configs
from gkd.models.tokenizers import stop_token_ids
from gkd.models.weights import adapter_config, rehearse_trained
from gkd.teachers import describe

try:
    import readline  # noqa: F401  (gives input() a history and editing)
    import termios
except ImportError:  # Windows
    termios = None

NARROW = 80  # columns of a terminal


class Answer(BaseStreamer, StoppingCriteria):
    """A growing answer: `generate` streams tokens into it, and asks it whether to stop.

    transformers' TextStreamer delays text until a space comes, which some answers (and languages) never have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] | None = None  # None until `generate` has passed on the prompt
        self.seconds = 0.0
        self.stopped = False  # set it to stop
        self.note = ""
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
        else:
            self.ids += value.tolist()
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """Nothing is left to flush."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids or [], skip_special_tokens=True)

    def figures(self) -> str:
        speed = f"{len(self.ids)} tokens, {len(self.ids) / self.seconds:.1f} tokens/s" if self.ids else ""
        return ", ".join(filter(None, (speed, self.note)))


class Speaker:
    """A model with its tokenizer and its conversation."""

    stop_ids: list[int]
    positions: int | None  # that it has room for

    def __init__(self, title: str, tokenizer: PreTrainedTokenizerBase, args: Namespace):
        self.title, self.tokenizer, self.args = title, tokenizer, args
        self.clear()

    def clear(self) -> None:
        self.messages = opening(self.args.system)

    def answer(self, prompt: str, answer: Answer) -> None:
        """Fills `answer`, and adds both to the conversation. Runs in a thread, so errors become the answer's note."""
        self.messages.append({"role": "user", "content": prompt})
        try:
            inputs = encode(self.tokenizer, self.messages)
            limit = self.args.max_new_tokens
            if self.positions is not None:
                limit = min(limit, self.positions - inputs["input_ids"].shape[1])
            if limit < 1:
                raise ValueError(f"the conversation fills the model's {self.positions} positions: /clear forgets it")
            sampling = {"do_sample": False}
            if self.args.temperature:
                sampling = {"do_sample": True, "temperature": self.args.temperature}
            # A single row is never padded.
            self.write(inputs, limit, answer, eos_token_id=self.stop_ids, pad_token_id=self.stop_ids[0], **sampling)
            if not answer.ids or answer.ids[-1] not in self.stop_ids:
                answer.note = "stopped" if answer.stopped else f"cut at {limit}"
        except Exception as error:
            answer.note = f"failed: {first_line(error) or type(error).__name__}"
        self.messages.append({"role": "assistant", "content": answer.text})

    def write(self, inputs: transformers.BatchEncoding, limit: int, answer: Answer, **config: Any) -> None:
        """Puts at most `limit` tokens into the answer, as `encode`'s inputs and the generation config have it."""
        raise NotImplementedError


class LoadedSpeaker(Speaker):
    """A model here. Raises ValueError without one, or without a stop token."""

    def __init__(
        self, title: str, folder: str, tokenizer: PreTrainedTokenizerBase, args: Namespace, trusted: bool = False
    ):
        super().__init__(title, tokenizer, args)
        try:
            self.model = load_trained(folder, args.dtype, device_map=args.device, trust_remote_code=trusted)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: the model can't be loaded: {first_line(error)}") from error
        base = base_of(self.model)
        self.stop_ids = stop_token_ids(tokenizer, base.config, base.generation_config)
        self.positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)

    def write(self, inputs: transformers.BatchEncoding, limit: int, answer: Answer, **config: Any) -> None:
        inputs = inputs.to(self.model.device)
        self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=limit,
            num_beams=1,
            streamer=answer,
            stopping_criteria=StoppingCriteriaList([answer]),
            **config,
        )


class SpeakerInPieces(Speaker):
    """One that is asked for a few tokens at a time, so that the answer grows and can be stopped."""

    _TOGETHER = 16

    def write(self, inputs: transformers.BatchEncoding, limit: int, answer: Answer, **config: Any) -> None:
        answer.put(ids := inputs["input_ids"])
        while limit > 0 and not answer.stopped:
            size = min(limit, self._TOGETHER)
            written = self.piece(ids, size, config)
            for token in written:
                answer.put(token[None])
            if answer.ids[-1] in self.stop_ids:
                break
            ids, limit = torch.cat([ids, written[None]], 1), limit - size

    def piece(self, ids: torch.Tensor, size: int, config: dict[str, Any]) -> torch.Tensor:
        """At most `size` tokens behind ids (1, L), int64 (T,); fewer only where a stop token ends them."""
        raise NotImplementedError


class ServedSpeaker(SpeakerInPieces):
    """A teacher behind `gkd serve`, which samples from its whole distribution. Raises ValueError or RunStopped if none answers."""

    def __init__(self, url: str, args: Namespace):
        described = TeacherArguments(teacher_url=url)
        described.check_teacher()
        self._teacher = describe(described)
        side = self._teacher.side(None, described)
        if side.tokenizer is None:
            raise ValueError(f"--teacher {url}: the server tells no tokenizer.")
        super().__init__(f"teacher: {self._teacher.name}", side.tokenizer, args)
        self.stop_ids = stop_token_ids(side.tokenizer, *side.stops)
        self.positions = side.window

    def piece(self, ids: torch.Tensor, size: int, config: dict[str, Any]) -> torch.Tensor:
        sampling = GenerationConfig(max_new_tokens=size, top_k=0, top_p=1.0, **config)
        written, kept = self._teacher.write(ids, torch.ones_like(ids), sampling, random.getrandbits(62))
        return written[kept.bool()]


class VllmSpeaker(SpeakerInPieces):
    """A model in an engine of vLLM. Raises EngineFailed where it does not start, ValueError without a stop token."""

    _one_at_a_time = Lock()  # vLLM keeps what it computes now in the process, for all engines

    def __init__(self, title: str, folder: str, tokenizer: PreTrainedTokenizerBase, args: Namespace, trusted: bool):
        super().__init__(title, tokenizer, args)
        model, self._own = read_configs(f"--{title.partition(':')[0]}", folder, trust_remote_code=trusted)
        dtype = (model.get_text_config().dtype or torch.float32) if args.dtype == "auto" else getattr(torch, args.dtype)
        self._engine = new_engine(
            folder,
            dtype,
            PartialState().device,
            args.vllm_memory,
            "--generation_backend auto does without vLLM.",
            trust_remote_code=trusted,
            max_num_seqs=1,
            enable_prefix_caching=True,  # of the piece before
        )
        self.stop_ids = stop_token_ids(tokenizer, model, self._own)
        self.positions = getattr(model.get_text_config(), "max_position_embeddings", None)

    def piece(self, ids: torch.Tensor, size: int, config: dict[str, Any]) -> torch.Tensor:
        sampling = own_parameters(self._own, self.args.temperature, size, self.stop_ids)
        with self._one_at_a_time:
            (written,) = completed(self._engine, ids.tolist(), [sampling])
        return torch.tensor(written)


def opening(system: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [{"role": "system", "content": system}] if system else []


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> transformers.BatchEncoding:
    """input_ids and attention_mask, int64 (1, L)."""
    if tokenizer.chat_template is None:  # a base model: prompt and answer are one text
        text = "".join(m["content"] + ("" if m["role"] == "user" else "\n") for m in messages)
        ids = torch.tensor([prompt_ids(tokenizer, text)])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def load_tokenizer(folder: str, system: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of an adapter's base model if the folder has none.

    Raises ValueError if there is no model, or its chat template refuses a system prompt.
    """
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    try:
        try:
            tokenizer = load(folder)
        except Exception:  # the tokenizers library raises bare ones
            if not Path(folder, "adapter_config.json").is_file():
                raise
            tokenizer = load(adapter_config(folder).base_model_name_or_path)
    except Exception as error:
        raise ValueError(
            f"{folder}: no model and tokenizer there, on disk or on the hub: {one_line(error)}"
        ) from error
    try:
        encode(tokenizer, [*opening(system), {"role": "user", "content": "?"}])
    except Exception as error:  # a template is a program
        raise ValueError(f"{folder}: its chat template refuses the conversation: {first_line(error)}") from error
    return tokenizer


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
