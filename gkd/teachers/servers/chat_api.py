"""A chat API as OpenAI's: how it is asked, again where that may help, and what is read of its answers."""

import json
import logging
import math
import os
import random
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import tenacity

from gkd.config.teacher import TEXT_KEY
from gkd.io.errors import RunStopped, one_line
from gkd.teachers.servers.client import Failed, may_pass, new_client, options_of, parts_of, problem_of, said_in
from gkd.teachers.servers.wire import check_token

logger = logging.getLogger(__name__)

LIKE = "http://host:8000/v1"
# What reading an answer raises, where it is not what was asked for.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_LARGEST = 2**24  # bytes of an answer
_LONGEST_PAUSE = 30.0  # seconds between two attempts, unless the server asks for more
_CHECK = 60.0  # seconds at most in which a server has to show that it is there


class _Later(Failed):
    """As `Failed`; the server says after how many seconds to ask again."""

    def __init__(self, problem: str, seconds: float):
        super().__init__(f"{problem}, and asks for a pause of {seconds:,.0f} seconds")
        self.seconds = seconds


class Refused(Exception):
    """The server refuses this request, and would again."""


class ChatApi:
    """The server at `url`, whose key is in the environment, and its model `name`.

    Attributes:
        used: answers, and tokens of prompts and completions as the server counts them, since the last `flush`.
    """

    def __init__(self, url: str, name: str, timeout: float):
        self.url, self.name, self.timeout = url.rstrip("/"), name, timeout
        self._key = check_token(TEXT_KEY, os.environ.get(TEXT_KEY, ""))
        self._client, self._lock = new_client(self._key), threading.Lock()
        self.used = dict.fromkeys(("answers", "prompt_tokens", "completion_tokens"), 0)
        self._problem: list[str] = []  # what was told last

    def flush(self) -> dict[str, int]:
        """`used`, which begins anew."""
        with self._lock:
            used, self.used = self.used, dict.fromkeys(self.used, 0)
        return used

    def ask(self, method: str, path: str, body: bytes | None, failed: threading.Event) -> Any:
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
        """One attempt. Raises Failed where another may go better, Refused for the request alone, else RunStopped."""
        until, options = time.monotonic() + seconds, options_of(body, {"content-type": "application/json"}, seconds)
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
        except (httpx.HTTPError, httpx.StreamError, OSError, *UNREADABLE) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise RunStopped(
                    f"{self.url}: its certificate is not trusted. SSL_CERT_FILE names one that is."
                ) from None
            unreadable = isinstance(error, UNREADABLE)
            if unreadable and body is None:
                raise RunStopped(f"{self.url}{path} is no JSON: the address of an API ends like {LIKE}.") from None
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
        except UNREADABLE as error:  # cut by a limit of length, say: it is paid for, and as if it were empty
            logger.warning("A call of %s can't be read, and its answer is left out: %s", self.name, one_line(error))
            text, calls = "", []
        return {"text": text, "finish": choice.get("finish_reason"), "calls": calls}

    def _refuse(self, response: httpx.Response, content: bytes, checks: bool) -> None:
        """Raises for an answer that is an error. `checks`: it is of a list, which need not be there or be shown."""
        status, said = response.status_code, said_in(content, self._key)[:300].rstrip(".")
        why = f"HTTP {status}{said and ': '}{said}"
        if checks and status in (403, 501):
            raise Refused(why)
        if status in (401, 403):
            key = "the key in" if self._key else "a request without a key: set"
            raise RunStopped(f"{self.url} refuses {key} {TEXT_KEY} ({why}).")
        if may_pass(status):
            if (seconds := _pause_of(response.headers.get("retry-after"))) is not None:
                raise _Later(why, seconds)
            raise Failed(why)
        if response.is_redirect:
            raise RunStopped(f"{self.url} redirects (HTTP {status}): give the address behind it.")
        more = f" Is there a model {self.name}, and does the address end like {LIKE}?" if status == 404 else ""
        raise Refused(f"{self.url} refuses the request ({why}).{more}")

    def _masked(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")

    def _warn(self, problem: str) -> None:
        kind = [word.rstrip(":,") for word in problem.split()[:2]]  # `HTTP 429`: what follows may be another each time
        if kind != self._problem:  # else it has been told
            logger.warning("%s: %s. It is asked again.", self.url, problem)
        self._problem = kind


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


def as_sent(message: dict[str, Any]) -> dict[str, Any]:
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
    """A call of an answer as templates read it. Raises one of `UNREADABLE`."""
    function = call["function"]
    arguments = function["arguments"] or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise TypeError("its arguments are no object")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
