"""A server with OpenAI's API that writes the teacher's text: a black box, of which nothing but its text is known.

It is the author of `--seq_kd`, beside a teacher that is compared with, or alone: then the loss is cross-entropy. What it wrote
is kept as text, so that another student, with another tokenizer, need not ask again.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import fields
from queue import Empty, SimpleQueue
from typing import Any

from transformers import GenerationConfig

from gkd.config.teacher import PlacementArguments
from gkd.config.training import OF_EVALUATION
from gkd.data.batch import Batch
from gkd.data.encoding import RowEncoder
from gkd.data.rows import DataError, conversation_of, prompt_of
from gkd.io.errors import RunStopped
from gkd.io.terminal import visible
from gkd.losses.targets import Target, TextTarget
from gkd.models.pairing import Side
from gkd.teachers.base import Teacher
from gkd.teachers.servers.chat_api import LIKE, UNREADABLE, ChatApi, Refused, as_sent

logger = logging.getLogger(__name__)

_MOST_EMPTY = 20  # answers without text to train on, one after another
_ALONE = "the server of --teacher_text_url tells text and no distribution"
# What training on text alone is, as flags.
_CROSS_ENTROPY = {"beta": 0.0, "kd_ratio": 0.0, "divergence": "jsd", "loss_temperature": 1.0}


def asked_of(row: dict[str, Any]) -> str:
    """JSON of a row without its answer: what the server is asked, and behind what the student reads the answer."""
    asked = {name: _without_nulls(row[name]) for name in ("prompt", "tools", "teacher_prompt") if row.get(name)}
    if row.get("chat_template_kwargs"):
        asked["chat_template_kwargs"] = row["chat_template_kwargs"]
    if (messages := conversation_of(row)) is not None:
        if not isinstance(asked.get("prompt"), str):
            asked.pop("prompt", None)
        messages = _without_nulls(messages)
        asked["messages"] = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return json.dumps(asked, ensure_ascii=False)


class TextServer(Teacher):
    """The server that `--teacher_text_url` names.

    Raises RunStopped if it refuses a request or the key, or does not answer within `--teacher_timeout` seconds.

    Attributes:
        encoder: of the student's rows, for `tokens`.
    """

    keeps_rows = True
    unknown = TextTarget.unknown
    encoder: RowEncoder

    def __init__(self, args: Any):
        self.args = args
        self.api = ChatApi(args.teacher_text_url, args.teacher_text_model, args.teacher_timeout)
        self._empty = 0  # answers without text to train on, one after another
        self._tried = False  # whether the student's template has taken an answer

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a worker that collates rows asks for nothing

    # ------------------------------------------------------------------ as the only teacher

    def settle(self, data_args: Any, args: Any, given: set[str]) -> None:
        """Sets the flags of a loss that is cross-entropy."""
        _refuse_on_policy(args)
        add = "add a teacher with the student's vocabulary, by --teacher_model_name_or_path or --teacher_url"
        for name, value in _CROSS_ENTROPY.items():
            if name in given and getattr(args, name) != value:
                raise ValueError(
                    f"--{name} {getattr(args, name)}: {_ALONE}, so the loss is cross-entropy. Leave the flag out, or {add}."
                )
            setattr(args, name, value)
        for name in sorted(given & {item.name for item in fields(PlacementArguments)} - {"teacher_timeout"}):
            raise ValueError(f"--{name} is about a teacher's weights, and {_ALONE}: leave it out, or {add}.")
        for name in OF_EVALUATION:
            if getattr(args, name) not in (None, False, [], "no"):
                raise ValueError(f"--{name} compares with the teacher, and {_ALONE}: {add}.")
        if data_args.eval_dataset_name is not None:
            raise ValueError(f"--eval_dataset_name: held-out rows are compared with the teacher, and {_ALONE}: {add}.")

    def side(self, student: Side, args: Any) -> Side:
        """Any vocabulary: the student's. Raises ValueError where a step would be on-policy."""
        _refuse_on_policy(args)
        return Side(None, student.size, ())

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        """It reads no batch."""

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        return nullcontext(TextTarget())

    # ------------------------------------------------------------------ text

    def columns(self, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
        """`asked`, see `asked_of`."""
        return {"asked": [asked_of(json.loads(row["row"])) for row in rows]}

    def identity(self, config: GenerationConfig) -> bytes:
        """A fingerprint of the model's name and the sampling, wherever the server is."""
        body = self._body({"messages": []}, config)
        return hashlib.sha256(f"text server {json.dumps(body, sort_keys=True)}".encode()).digest()

    def _body(self, row: dict[str, Any], config: GenerationConfig) -> dict[str, Any]:
        asked = row.get("teacher_prompt") or row.get("messages") or row.get("prompt") or []
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(map(as_sent, asked))
        body = {"model": self.api.name, "messages": messages, "tools": row.get("tools")}
        body |= {"max_tokens": config.max_new_tokens, "temperature": config.temperature}
        body |= self.args.teacher_text_options or {}
        return {name: value for name, value in body.items() if value is not None}

    def check(self) -> None:
        """Asks for the list of models: raises RunStopped if the server is not there or refuses the key. It uses no token."""
        try:
            models = self.api.ask("GET", "/models", None, threading.Event())
            names = [model["id"] for model in models["data"]]
        except (Refused, *UNREADABLE):
            logger.warning("%s shows no list of models: an address of an API ends like %s.", self.api.url, LIKE)
            return
        if names and self.api.name not in names:
            shown = visible(", ".join(map(str, names[:5])))[:300]
            logger.warning("%s lists %s, and not --teacher_text_model %s.", self.api.url, shown, self.api.name)

    def check_template(self, encoder: RowEncoder, row: dict[str, Any]) -> None:
        """Raises DataError if the student's template refuses an answer to a row, as it then would others."""
        encoder.check_answer(json.loads(asked_of(row)))

    def texts(self, keys: list[bytes], config: GenerationConfig) -> Iterator[tuple[bytes, bytes]]:
        """The answer to each of `keys`, UTF-8 of `asked_of`, in the order they come, for `tokens`.

        Where a request fails for good, those under way are waited for before the error is raised: they have a price.

        Raises DataError before the first request where the student's template refuses an answer.
        """
        if keys and not self._tried:
            self.encoder.check_answer(json.loads(keys[0]))
            self._tried = True
        todo, results, failed = SimpleQueue(), SimpleQueue(), threading.Event()
        for key in keys:
            todo.put(key)

        def work() -> None:
            with suppress(Empty):
                while not failed.is_set():
                    key = todo.get_nowait()
                    try:
                        results.put((key, self._answer(key, config, failed), None))
                    except BaseException as error:  # is raised by the thread that waits
                        results.put((key, None, error))
                        failed.set()
            results.put(None)

        running = min(len(keys), self.args.teacher_text_requests)
        for _ in range(running):  # daemons: a run that is ended does not wait for them
            threading.Thread(target=work, daemon=True, name="teacher's text").start()
        problem = None
        try:
            while running:
                if (result := results.get()) is None:
                    running -= 1
                elif result[2] is not None:
                    problem = problem or result[2]
                else:
                    yield result[:2]
                    if (stop := self._too_many_empty(*result[:2])) is not None:
                        problem = problem or stop
                        failed.set()
        finally:
            failed.set()
        if problem is not None:
            raise problem

    def _answer(self, key: bytes, config: GenerationConfig, failed: threading.Event) -> bytes:
        row = json.loads(key)
        body = json.dumps(self._body(row, config)).encode()
        try:
            answer = self.api.ask("POST", "/chat/completions", body, failed)
        except Refused as error:
            raise RunStopped(f"{error} The prompt begins with {visible(prompt_of(row))[:60]!r}.") from None
        return json.dumps(answer, ensure_ascii=False).encode(errors="replace")  # half a surrogate pair is no text

    def _too_many_empty(self, key: bytes, text: bytes) -> RunStopped | None:
        """Counts an answer without text to train on; an error where there are too many one after another."""
        why = f"finish_reason {visible(str(json.loads(text)['finish']))[:40]}"
        try:
            ids = self._ids(key, text)
        except DataError as error:
            ids, why = [], str(error)
        self._empty = 0 if ids else self._empty + 1
        if self._empty < _MOST_EMPTY:
            return None
        return RunStopped(
            f"{self.api.url}: the last {_MOST_EMPTY} answers of {self.api.name} have no text to train on (the last: "
            f"{why.rstrip('.')}). If it spends --max_new_tokens on thinking, raise them, or switch thinking off by "
            "--teacher_text_options."
        )

    def keeps(self, text: bytes) -> bool:
        """Whether an answer from `texts` has text to train on: another is asked for again in the next run."""
        answer = json.loads(text)
        return answer["finish"] != "content_filter" and bool(answer["text"].strip() or answer["calls"])

    def tokens(self, key: bytes, text: bytes, most: int) -> list[int]:
        """At most `most` ids of an answer from `texts` as the student would write it; none where there is no text."""
        try:
            return self._ids(key, text)[:most]
        except DataError as error:
            logger.warning("A text of %s is left out: %s", self.api.name, error)
            return []

    def _ids(self, key: bytes, text: bytes) -> list[int]:
        """As `tokens`, all of them. Raises DataError where the student's template refuses the answer."""
        if not self.keeps(text):
            return []
        row, answer, stops = json.loads(key), json.loads(text), self.encoder.stop_ids
        content = answer["text"]
        for stop in filter(None, (self.encoder.tokenizer.decode([i]) for i in stops)):
            if (bare := content.rstrip()).endswith(stop):  # the template writes it too
                content = bare.removesuffix(stop)
        message = {"role": "assistant", "content": content}
        if answer["calls"]:
            message["tool_calls"] = answer["calls"]
        ids = self.encoder.answer_ids(row, message)
        if answer["finish"] == "length":
            while ids and ids[-1] in stops:
                ids.pop()
        elif ids and ids[-1] not in stops:  # a template that closes no answer
            eos = self.encoder.tokenizer.eos_token_id
            ids.append(eos if eos in stops else stops[0])
        return ids


def _refuse_on_policy(args: Any) -> None:
    if args.lmbda != 0:
        raise ValueError(
            f"--lmbda {args.lmbda}: {_ALONE}, so nothing is known of the student's text. Give --lmbda 0, or add a teacher by "
            "--teacher_model_name_or_path or --teacher_url."
        )


def _without_nulls(value: Any) -> Any:
    """Without null fields at any depth: Arrow gives each object the keys of all others."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
