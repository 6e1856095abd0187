"""The servers of one teacher, as a client asks them: shared out, asked again or elsewhere after a failure, and compared.

Waiting threads are daemons: a run that stops does not wait for their answers.
"""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import httpx
import tenacity

from gkd.data.batch import Batch
from gkd.io.errors import RunStopped, one_line
from gkd.io.terminal import visible
from gkd.teachers.base import Teacher
from gkd.teachers.servers import wire

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

CONNECT = 10.0  # seconds to reach a server
_REST = 5.0  # seconds in which others are asked first, after a failure
_LONGEST_PAUSE = 10.0  # seconds between two rounds of all servers
# What reading an answer raises, where it is not what was asked for.
_UNREADABLE = (ValueError, KeyError, TypeError, RecursionError)
OVERHEAD = 2**16  # bytes of an answer beside its tensors
_AFTERWARDS = "Then go on: gkd train by --resume_from_checkpoint auto, another command as it was."


class Failed(Exception):
    """An attempt failed in a way that may pass, or that another server may not have."""


class Wrong(Exception):
    """An answer came whole and is wrong, as it would be again."""


@dataclass
class Promised:
    """A teacher's output on its way, as a batch's `teacher_output`: what `wait` returns, on the CPU."""

    wait: Callable[[], Any]

    def to(self, device: Any) -> "Promised":
        return self  # `target` moves it

    def __getitem__(self, tokens: slice) -> Any:
        return self.wait()[tokens]


class ServedTeacher(Teacher):
    """A teacher behind servers, which is asked for the next micro-batches while the student trains."""

    _prepared: tuple[Batch, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a worker that collates rows asks for nothing

    def _ask_for(self, batch: Batch) -> Promised:
        """Sends the requests for the output at a batch's scored positions."""
        raise NotImplementedError

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Asks for all micro-batches of a step; answers come while the student trains on those before."""
        for batch in self._prepared:  # of the step before
            batch.teacher_output = None
        self._prepared = tuple(batches)
        for batch in self._prepared:
            batch.teacher_output = self._ask_for(batch)

    def _output(self, batch: Batch) -> Any:
        """The output at a batch's scored positions, on the device of its labels."""
        output = self._ask_for(batch) if batch.teacher_output is None else batch.teacher_output
        return (output.wait() if isinstance(output, Promised) else output).to(batch.labels.device)


@dataclass
class _Server:
    url: str
    pending: int = 0
    rests_until: float = 0.0
    problem: str = ""  # of the last attempt, if it failed
    compared: bool = False  # since it last failed, for servers whose answers do not name their weights


@dataclass
class Servers:
    """Servers at `urls`, one of which has to answer a request in `timeout` seconds.

    A request goes to the server with the fewest that wait. One that fails (refused, reset, cut, no answer in its share of
    the time, an error of its own) is asked again after the others, at growing intervals.

    Attributes:
        at_a_time: requests in the background to each server; of two, one computes while the other travels.
        weights: the digest that each answer must name; from the first `identities` on.
        started_by: the command that starts one.
    """

    started_by = "gkd serve"

    urls: list[str]
    timeout: float
    token: str | None = None
    at_a_time: int = 2
    weights: str | None = None
    _queue: SimpleQueue = field(default_factory=SimpleQueue)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self._servers = [_Server(url) for url in self.urls]
        self._client = new_client(self.token)

    def identities(self, read: Callable[[bytes], dict[str, Any]], path: str = "/identity") -> list[dict[str, Any]]:
        """What `path` of each server tells, by `read`; at least one, which is waited for.

        Raises RunStopped if they differ in their weights, or none answers.
        """
        answers: dict[str, dict[str, Any]] = {}
        for server in self._servers:
            try:
                answers[server.url] = self._once(server, path, None, OVERHEAD, read, min(CONNECT, self.timeout))
            except Failed:
                continue  # the others work; its weights are compared when it answers
        if not answers:
            answers[self.urls[0]] = self.ask(path, None, OVERHEAD, read)
        (first, about), *others = answers.items()
        for url, other in others:
            if other["weights"] != about["weights"]:
                raise self._differ(url, other["weights"], about["weights"], first)
        self.weights = about["weights"]
        return list(answers.values())

    def ask(
        self, path: str, body: bytes | None, limit: int, read: Callable[[bytes], Answer], to: Callable | None = None
    ) -> Answer:
        """`read` of an answer, which has at most `limit` bytes; what it can't read counts as a failure of the server.

        Args:
            body: of a POST; None is a GET.
            to: takes the parts of the answer in place of joining them; `read` then gets what it returns.

        Raises RunStopped if no server answers in time, one refuses the request, or one has other weights.
        """
        until, count, full = time.monotonic() + self.timeout, len(self._servers), set()

        def attempt() -> Answer:
            server = self._next()
            share = min(self.timeout / (count + 1), max(until - time.monotonic(), 1.0))
            try:
                return self._once(server, path, body, limit, read, share, to)
            except _Full as error:
                full.add(server.url)
                if len(full) == count:  # the same again would not fit either
                    raise RunStopped(f"{server.url}: {error}") from None
                raise

        def pause(state: tenacity.RetryCallState) -> float:
            rounds, others = divmod(state.attempt_number, count)
            return 0.0 if others else min(0.1 * 2**rounds, _LONGEST_PAUSE) * random.uniform(0.75, 1.25)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Failed),
            stop=tenacity.stop_before_delay(self.timeout),
            wait=pause,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except Failed:
            problems = "; ".join(f"{server.url}: {server.problem or 'not asked'}" for server in self._servers)
            raise RunStopped(
                f"No server of the teacher answered in {self.timeout:g} seconds (--teacher_timeout): {problems}. Start "
                f"it again by {self.started_by}. {_AFTERWARDS}"
            ) from None

    def later(self, *request: Any) -> "Future":
        """`ask(*request)` in the background; so many at a time that each server always has one to compute."""
        future: Future = Future()
        self._queue.put((future, request))
        if len(self._threads) < self.at_a_time * len(self._servers):
            self._threads.append(threading.Thread(target=self._work, daemon=True, name="teacher's answers"))
            self._threads[-1].start()
        return future

    def _work(self) -> None:
        while True:
            future, request = self._queue.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.ask(*request))
                except BaseException as error:  # is raised where the answer is waited for
                    future.set_exception(error)
            del future, request  # while this thread waits, nobody else may hold the answer

    def _next(self) -> _Server:
        """The server to ask: the one that failed longest ago, then the one with the fewest requests."""
        now = time.monotonic()
        with self._lock:
            return min(self._servers, key=lambda server: (max(server.rests_until - now, 0), server.pending))

    def _once(self, server, path, body, limit, read, seconds, to=None) -> Any:
        """One attempt. Raises Failed where another may go better, else RunStopped."""
        until = time.monotonic() + seconds
        method, problem = ("GET" if body is None else "POST"), ""
        options = options_of(body, self._headers(seconds), seconds)
        with self._lock:
            server.pending += 1
        try:
            with self._client.stream(method, server.url + path, **options) as response:
                self._check(server, response, until)
                answer = read((to or b"".join)(parts_of(response, limit, until)))
            return answer
        except Failed as error:
            problem = str(error)
            raise
        except Wrong as error:
            raise RunStopped(f"{server.url}: {error}") from None
        except (httpx.HTTPError, httpx.StreamError, OSError, *_UNREADABLE) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise RunStopped(
                    f"{server.url}: its certificate is not trusted: {one_line(error)}. SSL_CERT_FILE names one that is."
                ) from None
            problem = problem_of(error, seconds)
            raise Failed(problem) from None
        finally:
            if problem and problem != server.problem:  # else it has been told
                logger.warning("%s: %s. It is asked again, or another.", server.url, problem)
            with self._lock:
                server.pending -= 1
                server.rests_until = time.monotonic() + _REST if problem else 0.0
                server.problem = problem

    def _differ(self, url: str, weights: str, expected: str, where: str) -> RunStopped:
        return RunStopped(
            f"{url} has another teacher ({self._named(weights)}) than {where} ({self._named(expected)}): serve the same "
            f"weights in the same dtype. {_AFTERWARDS}"
        )

    def _named(self, weights: str) -> str:
        return f"weights {visible(weights)[:16]}"

    def _headers(self, seconds: float) -> dict[str, str]:
        """Of a request that is waited for so long."""
        return {wire.WAITS_HEADER: f"{seconds:.3f}"}

    def _check(self, server: _Server, response: httpx.Response, until: float) -> None:
        """Raises for an answer that is not of a server with these weights, or is an error."""
        version = response.headers.get(wire.VERSION_HEADER)
        if version is None:
            raise Failed(f"no answer of gkd serve (HTTP {response.status_code})")
        if version != str(wire.VERSION):
            raise RunStopped(
                f"{server.url} speaks version {version:.20}, and this is version {wire.VERSION}: update the older of the two."
            )
        weights = response.headers.get(wire.WEIGHTS_HEADER)
        if None not in (weights, self.weights) and weights != self.weights:
            raise self._differ(server.url, weights, self.weights, "the start of this run")
        if response.status_code != 200:
            why = said_in(b"".join(parts_of(response, OVERHEAD, until)), self.token) or f"HTTP {response.status_code}"
            if response.status_code == 507:
                raise _Full(why)
            if response.status_code >= 500:
                raise Failed(f"{why} (HTTP {response.status_code})")
            raise RunStopped(f"{server.url} refuses: {why} (HTTP {response.status_code}).")


def new_client(token: str | None) -> httpx.Client:
    """A client that sends `token` with each request, and follows no redirection."""
    headers = {"accept-encoding": "identity"}
    if token is not None:
        headers["authorization"] = wire.bearer(token)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60)
    # No proxy of the environment stands between programs of one machine.
    direct = dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))
    return httpx.Client(headers=headers, limits=limits, mounts=direct)


def said_in(content: bytes, secret: str | None = None) -> str:
    """The message of an answer that is an error, as servers word it, in one line without `secret`; empty where there is
    none."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    while isinstance(said, dict):
        said = next((said[name] for name in ("error", "message", "detail") if said.get(name)), "")
    said = said if isinstance(said, str) else json.dumps(said)
    if secret is not None:  # before a part of it could be cut off
        said = said.replace(secret, "***")
    return visible(" ".join(said.split()))[:500].rstrip(".")


class _Full(Failed):
    """Memory ran out there."""


def parts_of(response: httpx.Response, limit: int, until: float) -> Iterator[bytes]:
    """An answer's bytes. Raises ValueError for more than `limit`, httpx.ReadTimeout after the monotonic time `until`."""
    size = 0
    for part in response.iter_bytes():
        size += len(part)
        if size > limit:
            raise ValueError(f"its answer has more than the {limit:,} bytes that it may have")
        if time.monotonic() > until:
            raise httpx.ReadTimeout("")
        yield part


def options_of(body: bytes | None, headers: dict[str, str], seconds: float) -> dict[str, Any]:
    """What httpx takes for a request that has `seconds`."""
    return {"content": body, "headers": headers, "timeout": httpx.Timeout(seconds, connect=min(seconds, CONNECT))}


def may_pass(status: int) -> bool:
    """Whether a request that an API refuses so may go better later."""
    return status in (408, 409, 425, 429) or status >= 500


def problem_of(error: Exception, seconds: float) -> str:
    """What went wrong in an attempt of so many seconds."""
    if isinstance(error, httpx.ConnectTimeout):
        return f"not reached in {min(seconds, CONNECT):g} seconds"
    if isinstance(error, httpx.TimeoutException):
        return f"no whole answer in {seconds:.3g} seconds"
    return one_line(error).rstrip(".")
