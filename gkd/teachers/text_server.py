"""A server with OpenAI's API that writes the teacher's text: a black box, of which nothing but its text is known.

It is the author of `--seq_kd`, beside a teacher that is compared with, or alone: then the loss is cross-entropy. What it wrote
is kept as text, so that another student, with another tokenizer, need not ask again.
"""

import hashlib
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import fields
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Any

import httpx
import tenacity
from transformers import GenerationConfig

from gkd.config.teacher import TEXT_KEY, PlacementArguments
from gkd.config.training import OF_EVALUATION
from gkd.data.batch import Batch
from gkd.data.encoding import RowEncoder
from gkd.data.rows import DataError, conversation_of, prompt_of
from gkd.io.errors import RunStopped, one_line
from gkd.io.terminal import visible
from gkd.losses.targets import Target, TextTarget
from gkd.models.pairing import Side
from gkd.teachers.base import Teacher
from gkd.teachers.client import CONNECT, Failed, new_client, parts_of, problem_of, said_in
from gkd.teachers.wire import check_token

logger = logging.getLogger(__name__)

_LARGEST = 2**24  # bytes of an answer
_LONGEST_PAUSE = 30.0  # seconds between two attempts, unless the server asks for more
_MOST_EMPTY = 20  # answers without text to train on, one after another
_CHECK = 60.0  # seconds at most in which a server has to show that it is there
_LIKE = "http://host:8000/v1"
# What reading an answer raises, where it is not what was asked for.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_MAY_PASS = (408, 409, 425, 429)  # statuses, and all from 500 on
_ALONE = "the server of --teacher_text_url tells text and no distribution"
# What training on text alone is, as flags.
_CROSS_ENTROPY = {"beta": 0.0, "kd_ratio": 0.0, "divergence": "jsd", "loss_temperature": 1.0}


class _Later(Failed):
    """As `Failed`; the server says after how many seconds to ask again."""

    def __init__(self, problem: str, seconds: float):
        super().__init__(f"{problem}, and asks for a pause of {seconds:,.0f} seconds")
        self.seconds = seconds


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
        used: answers, and tokens of prompts and completions as the server counts them, since the last `flush`.
    """

    keeps_rows = True
    unknown = TextTarget.unknown
    encoder: RowEncoder

    def __init__(self, args: Any):
        self.args, self.name = args, args.teacher_text_model
        self.url, self.timeout = args.teacher_text_url.rstrip("/"), args.teacher_timeout
        self._key = check_token(TEXT_KEY, os.environ.get(TEXT_KEY, ""))
        self._client, self._lock = new_client(self._key), threading.Lock()
        self.used = dict.fromkeys(("answers", "prompt_tokens", "completion_tokens"), 0)
        # Answers without text to train on, one after another; what was told last; whether an answer was tried.
        self._empty, self._problem, self._tried = 0, [], False

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
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(map(_as_sent, asked))
        body = {"model": self.name, "messages": messages, "tools": row.get("tools")}
        body |= {"max_tokens": config.max_new_tokens, "temperature": config.temperature}
        body |= self.args.teacher_text_options or {}
        return {name: value for name, value in body.items() if value is not None}

    def check(self) -> None:
        """Asks for the list of models: raises RunStopped if the server is not there or refuses the key. It uses no token."""
        try:
            models = self._ask("GET", "/models", None, threading.Event())
            names = [model["id"] for model in models["data"]]
        except (_Refused, *_UNREADABLE):
            logger.warning("%s shows no list of models: an address of an API ends like %s.", self.url, _LIKE)
            return
        if names and self.name not in names:
            shown = visible(", ".join(map(str, names[:5])))[:300]
            logger.warning("%s lists %s, and not --teacher_text_model %s.", self.url, shown, self.name)

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
            answer = self._ask("POST", "/chat/completions", body, failed)
        except _Refused as error:
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
            f"{self.url}: the last {_MOST_EMPTY} answers of {self.name} have no text to train on (the last: "
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
            logger.warning("A text of %s is left out: %s", self.name, error)
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

    def flush(self) -> dict[str, int]:
        """`used`, which begins anew."""
        with self._lock:
            used, self.used = self.used, dict.fromkeys(self.used, 0)
        return used

    # ------------------------------------------------------------------ requests

    def _ask(self, method: str, path: str, body: bytes | None, failed: threading.Event) -> Any:
        """A good answer, within `timeout` seconds; an attempt has at most half of them. `failed`: nobody is to wait longer.

        Without a `body`, it is a question whether the server is there, for which a minute is enough.
        """
        limit = min(self.timeout, _CHECK) if body is None else self.timeout
        until = time.monotonic() + limit

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception()
            if isinstance(error, _Later):
                return error.seconds + random.uniform(0, 0.5)
            return min(0.25 * 2**state.attempt_number, _LONGEST_PAUSE) * random.uniform(0.75, 1.25)

        def attempt() -> Any:
            if failed.is_set():
                raise Failed("another request failed")
            return self._once(method, path, body, min(limit / 2, max(until - time.monotonic(), 1.0)))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Failed),
            stop=tenacity.stop_any(tenacity.stop_before_delay(limit), tenacity.stop_when_event_set(failed)),
            wait=pause,
            sleep=tenacity.sleep_using_event(failed),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except Failed as error:
            if body is None:
                raise RunStopped(
                    f"{self.url} gives no answer within {limit:g} seconds: {error}. Does it run, and is its address right?"
                ) from None
            raise RunStopped(
                f"{self.url} gives no answer within {self.timeout:g} seconds (--teacher_timeout): {error}. What it has "
                "answered is kept: go on by --resume_from_checkpoint auto, or the same command."
            ) from None

    def _once(self, method: str, path: str, body: bytes | None, seconds: float) -> Any:
        """One attempt. Raises Failed where another may go better, _Refused for the request alone, else RunStopped."""
        until, headers = time.monotonic() + seconds, {"content-type": "application/json"}
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT))
        options = {"content": body, "headers": headers, "timeout": timeout}
        try:
            with self._client.stream(method, self.url + path, **options) as response:
                content = b"".join(parts_of(response, _LARGEST, until))
            if response.status_code == 200:
                answer = json.loads(content)
                return answer if body is None else self._read(answer)
            self._refuse(response, content, body is None)
        except Failed as error:
            self._warn(str(error))
            raise
        except (httpx.HTTPError, httpx.StreamError, OSError, *_UNREADABLE) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise RunStopped(
                    f"{self.url}: its certificate is not trusted. SSL_CERT_FILE names one that is."
                ) from None
            unreadable = isinstance(error, _UNREADABLE)
            if unreadable and body is None:
                raise RunStopped(f"{self.url}{path} is no JSON: the address of an API ends like {_LIKE}.") from None
            problem = "its answer is no chat completion" if unreadable else self._masked(problem_of(error, seconds))
            self._warn(problem)
            raise Failed(problem) from None

    def _read(self, answer: dict[str, Any]) -> dict[str, Any]:
        """What is kept of a chat completion. Raises LookupError, TypeError or ValueError where it is none."""
        usage = answer.get("usage") or {}
        with self._lock:
            for name in ("prompt_tokens", "completion_tokens"):
                self.used[name] += int(usage.get(name) or 0)
        choice = answer["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        if isinstance(text, list):  # parts, some of which may be thinking
            text = "".join(part["text"] or "" for part in text if part.get("type", "text") == "text")
        if not isinstance(text, str):
            raise TypeError
        with self._lock:
            self.used["answers"] += 1
        try:
            calls = [_as_read(call) for call in message.get("tool_calls") or ()]
        except _UNREADABLE as error:  # cut by a limit of length, say: it is paid for, and as if it were empty
            logger.warning("A call of %s can't be read, and its answer is left out: %s", self.name, one_line(error))
            text, calls = "", []
        return {"text": text, "finish": choice.get("finish_reason"), "calls": calls}

    def _refuse(self, response: httpx.Response, content: bytes, checks: bool) -> None:
        """Raises for an answer that is an error. `checks`: it is of a list, which need not be there or be shown."""
        status, said = response.status_code, said_in(content, self._key)[:300].rstrip(".")
        why = f"HTTP {status}{said and ': '}{said}"
        if checks and status in (403, 501):
            raise _Refused(why)
        if status in (401, 403):
            key = "the key in" if self._key else "a request without a key: set"
            raise RunStopped(f"{self.url} refuses {key} {TEXT_KEY} ({why}).")
        if status in _MAY_PASS or status >= 500:
            if (seconds := _pause_of(response.headers.get("retry-after"))) is not None:
                raise _Later(why, seconds)
            raise Failed(why)
        if response.is_redirect:
            raise RunStopped(f"{self.url} redirects (HTTP {status}): give the address behind it.")
        more = f" Is there a model {self.name}, and does the address end like {_LIKE}?" if status == 404 else ""
        raise _Refused(f"{self.url} refuses the request ({why}).{more}")

    def _masked(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")

    def _warn(self, problem: str) -> None:
        kind = [word.rstrip(":,") for word in problem.split()[:2]]  # `HTTP 429`: what follows may be another each time
        if kind != self._problem:  # else it has been told
            logger.warning("%s: %s. It is asked again.", self.url, problem)
        self._problem = kind


def _refuse_on_policy(args: Any) -> None:
    if args.lmbda != 0:
        raise ValueError(
            f"--lmbda {args.lmbda}: {_ALONE}, so nothing is known of the student's text. Give --lmbda 0, or add a teacher by "
            "--teacher_model_name_or_path or --teacher_url."
        )


class _Refused(Exception):
    """The server refuses this request, and would again."""


def _pause_of(value: str | None) -> float | None:
    """The seconds that a header Retry-After asks for: a number, or a date; None if it is neither."""
    if value is None:
        return None
    with suppress(ValueError):
        return seconds if 0 <= (seconds := float(value)) < math.inf else None
    with suppress(ValueError, TypeError):
        date = parsedate_to_datetime(value).replace(tzinfo=timezone.utc)
        return max((date - datetime.now(timezone.utc)).total_seconds(), 0.0)
    return None


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as JSON, as the API has them and templates have not."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or call
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        own = {"id": call["id"]} if call.get("id") is not None else {}
        own |= {"type": "function", "function": {"name": function.get("name"), "arguments": arguments}}
        calls.append(own)
    return message | {"tool_calls": calls}


def _as_read(call: dict[str, Any]) -> dict[str, Any]:
    """A call of an answer as templates read it. Raises one of `_UNREADABLE`."""
    function = call["function"]
    arguments = function["arguments"] or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise TypeError("its arguments are no object")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _without_nulls(value: Any) -> Any:
    """Without null fields at any depth: Arrow gives each object the keys of all others."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
