"""A teacher behind HTTP: its hidden states at scored positions, its output head once, and the text that it writes.

A request is one micro-batch, and one thread runs the model, so an answer has the bits that a teacher beside the student
gives, unless requests that wait are read together (`TeacherServer.merges`). Bodies are those of `gkd.teachers.servers.wire`.

    GET  /identity  what the teacher is, as JSON             POST /hidden       hidden states (N, H) in its dtype
    GET  /tokenizer its tokenizer, as JSON                   POST /topk         `gkd.losses.topk.TopK` of the same, with `k`
    GET  /head      its head, as `LogitHead.save` writes it  POST /generate     completions
    GET  /metrics   for Prometheus                           POST /fingerprint  `Teacher.identity` of a sampling
    GET  /health    whether it is there; needs no token
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from peft.utils import ModulesToSaveWrapper
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Summary, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException  # of a path or method that there is not, too

from gkd.data.batch import Batch
from gkd.generation.generator import CompletionGenerator, lacks_memory
from gkd.generation.sampling import weights_digest
from gkd.io.errors import RunStopped, first_line, one_line
from gkd.io.files import sha256_of
from gkd.io.terminal import visible
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead, base_of
from gkd.models.pairing import Side
from gkd.models.tokenizers import describe_tokenizer, stop_token_ids
from gkd.teachers.ahead import MOST_TOGETHER, joined
from gkd.teachers.placed import LocalTeacher
from gkd.teachers.servers import wire

logger = logging.getLogger(__name__)

MOST_WAITING = 64  # requests; more are told to come back
_HELPS = (
    "What helps: a lower --per_device_train_batch_size, --per_device_eval_batch_size or, for text, --generation_batch_size "
    "of the client, or gkd serve in 4 bit."
)
# The names that browsers give this machine: a page elsewhere whose name leads here has another.
_HERE = ("localhost", "127.0.0.1", "::1")


def plain_head(teacher: LocalTeacher) -> LogitHead:
    """The teacher's head as a plain linear layer. Raises ValueError for one that no such layer is exactly."""
    head = LogitHead.of(teacher.inner)
    if isinstance(head.head, ModulesToSaveWrapper):  # trained whole beside an adapter
        head = replace(head, head=head.head.modules_to_save[head.head.active_adapter])
    try:
        head.check_plain()
    except ValueError:
        raise ValueError(
            f"The teacher's output head ({type(head.head).__name__}) is no plain linear layer in memory, as which it could "
            "be sent: it has an adapter, packed weights or weights elsewhere. Serve the teacher without 4 or 8 bit, which "
            "merges its adapter, or leave the head out of what is packed."
        ) from None
    return head


@dataclass
class TeacherServer:
    """The web application of one teacher.

    Args:
        name: what results call the teacher.
        side: of the teacher.
        generator: the one that the teacher writes by.
        folder: gets the head, as a file.
        token: that each request but /health needs; None lets this machine's programs in.
        most_bytes: of a request.
        host: that it listens on.
        merges: requests for hidden states that wait share a forward.

    Attributes:
        identity: what /identity tells.
        app: for an ASGI server.

    Raises ValueError for a head that can't be sent.
    """

    teacher: LocalTeacher
    name: str
    side: Side
    generator: CompletionGenerator
    folder: Path
    token: str | None
    most_bytes: int
    host: str = "127.0.0.1"
    merges: bool = False
    _queued: list[Callable[[], bytes]] = field(default_factory=list, init=False)  # what waits or runs

    def __post_init__(self):
        teacher, side, base = self.teacher, self.side, base_of(self.teacher.inner)
        head, self._head_file = plain_head(teacher), Path(self.folder, "head.safetensors")
        head.save(self._head_file, head.head.weight.shape[0])
        self.head = head
        self.limits = wire.Limits(min(side.size, base.get_input_embeddings().weight.shape[0]), side.window)
        parameters, size = teacher.size
        stops = [config for config in side.stops if getattr(config, "eos_token_id", None) is not None]
        self.identity = {
            "version": wire.VERSION,
            "name": self.name,
            "architecture": type(base).__name__,
            "parameters": parameters,
            "bytes": size,
            "dtype": str(head.head.weight.dtype).removeprefix("torch."),
            "vocabulary": side.size,
            "width": head.head.weight.shape[1],
            "window": side.window,
            "stop_ids": stop_token_ids(*stops) if stops else [],
            "weights": weights_digest(teacher.inner).hexdigest(),
            "head": {"sha256": sha256_of(self._head_file), "bytes": self._head_file.stat().st_size},
            "writes": teacher.writes,
            "packs": bool(teacher.packs),
        }
        self._tokenizer = describe_tokenizer(side.tokenizer)
        self._worker = ThreadPoolExecutor(1, "teacher")
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("gkd_requests", "Answers", ["endpoint", "status"], registry=registry)
        self._tokens = Counter("gkd_tokens", "Tokens read and written", ["endpoint"], registry=registry)
        self._seconds = Summary("gkd_seconds", "Seconds to an answer", ["endpoint"], registry=registry)
        self._queue = Gauge("gkd_queue", "Requests that wait or run", registry=registry)
        self._queue.set_function(lambda: len(self._queued))
        self.app = self._new_app()

    def _new_app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # pages that load code from elsewhere

        # A dictionary is sent as JSON.
        app.get("/health")(lambda: {"status": "ok"})
        app.get("/identity")(lambda: self.identity)
        app.get("/tokenizer")(lambda: JSONResponse(self._tokenizer))
        app.get("/head")(lambda: FileResponse(self._head_file, media_type=wire.MEDIA))
        app.get("/metrics")(lambda: Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST))
        works = {"hidden": self._hidden, "topk": self._topk, "generate": self._generate}
        for name, work in (works | {"fingerprint": self._fingerprint}).items():
            app.post(f"/{name}")(self._answering(work))
        self._endpoints = {
            f"/{name}" for name in [*works, *"fingerprint health identity tokenizer head metrics".split()]
        }
        app.exception_handler(StarletteHTTPException)(
            lambda request, error: JSONResponse({"error": visible(error.detail)}, error.status_code)
        )
        app.middleware("http")(self._around)
        return app

    # ------------------------------------------------------------------ around each request

    async def _around(self, request: Request, call_next: Callable) -> Response:
        """Lets in who may come, and counts; an answer to these names the teacher."""
        start, endpoint = time.perf_counter(), request.url.path
        endpoint = endpoint if endpoint in self._endpoints else "other"
        problem = self._refusal(request, endpoint)
        if problem is not None:
            status, why = problem
            response: Response = JSONResponse({"error": why}, status)
        else:
            try:
                response = await call_next(request)
            except Exception as error:
                logger.exception("%s failed", endpoint)
                response = JSONResponse({"error": f"{type(error).__name__}: {first_line(error)}"}, 500)
            if endpoint != "/health":
                response.headers[wire.WEIGHTS_HEADER] = self.identity["weights"]
        response.headers[wire.VERSION_HEADER] = str(wire.VERSION)
        self._requests.labels(endpoint, response.status_code).inc()
        self._seconds.labels(endpoint).observe(time.perf_counter() - start)
        return response

    def _refusal(self, request: Request, endpoint: str) -> tuple[int, str] | None:
        """Status and reason for a request that is not let in."""
        if endpoint == "/health":
            return None
        if self.token is not None:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not compare_digest(given, wire.bearer(self.token).encode()):
                return 401, "this server needs its token: set GKD_TEACHER_TOKEN to the server's GKD_SERVE_TOKEN"
        elif request.url.hostname not in (*_HERE, self.host):
            return 403, "without GKD_SERVE_TOKEN this server answers to 127.0.0.1 and localhost alone"
        return None

    def _answering(self, work: Callable[[wire.Tensors, dict], Callable[[], bytes]]) -> Callable:
        """The endpoint of a body: `work` checks its tensors and settings, and returns what then runs on the model."""

        async def answer(request: Request) -> Response:
            tensors, settings = await asyncio.to_thread(_unpacked, await self._body(request))
            try:
                run = work(tensors, settings)
            except (ValueError, TypeError, OverflowError) as error:
                raise HTTPException(400, one_line(error)) from None
            return Response(await self._in_turn(run, _patience(request)), media_type=wire.MEDIA)

        return answer

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.most_bytes:
                raise HTTPException(
                    413,
                    f"the request is larger than {self.most_bytes:,} bytes: fewer rows, or gkd serve --max_request_mib",
                )
        return bytes(body)

    async def _in_turn(self, run: Callable[[], bytes], patience: float) -> bytes:
        """Runs on the model when those before are done; not if the client no longer waits."""
        if len(self._queued) >= MOST_WAITING:
            raise HTTPException(503, f"{len(self._queued)} requests wait already")
        until = time.monotonic() + patience

        def in_time() -> bytes:
            if time.monotonic() > until:
                raise HTTPException(503, "its turn came too late")
            return run()

        self._queued.append(run)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, in_time)
        except RunStopped as error:  # such as weights that are not finite
            raise HTTPException(422, one_line(error)) from None
        except (RuntimeError, MemoryError) as error:
            if not _short_of_memory(error):
                raise
            problem = f"out of memory: {first_line(error)[:200]} {_HELPS}"
        finally:
            self._queued.remove(run)
        clear_device_cache(garbage_collection=True)  # outside of the handler, whose traceback keeps tensors alive
        raise HTTPException(507, problem)

    # ------------------------------------------------------------------ on the model

    def _hidden(self, tensors: wire.Tensors, settings: dict) -> Callable[[], bytes]:
        return _Reading(wire.read_batch(tensors, self.limits), self._read)

    def _read(self, reading: "_Reading") -> None:
        """Gives it its hidden states; and others that wait theirs, where they are merged."""
        together, rows, width = [reading], *reading.batch.input_ids.shape
        others = [
            other for other in list(self._queued) if self.merges and other is not reading and reading.goes_with(other)
        ]
        for other in sorted(others, key=lambda other: abs(other.batch.input_ids.shape[1] - width)):
            more, wide = other.batch.input_ids.shape
            if (rows + more) * max(width, wide) <= MOST_TOGETHER:
                together.append(other)
                rows, width = rows + more, max(width, wide)
        self._tokens.labels("/hidden").inc(sum(one.batch.input_ids.numel() for one in together))
        try:
            whole = (
                reading.batch
                if len(together) == 1
                else joined([one.batch for one in together], self.teacher.forward.pad)
            )
            states = self.teacher.hidden(whole).split([len(one.batch.scored) for one in together])
        except (RuntimeError, MemoryError) as error:
            if len(together) == 1 or not _short_of_memory(error):
                raise
            states = None
        if states is None:  # outside of the handler, whose traceback keeps tensors alive
            clear_device_cache(garbage_collection=True)
            together, states = [reading], [self.teacher.hidden(reading.batch)]
        for one, of_one in zip(together, states, strict=True):
            one.hidden = of_one.cpu()  # the next forward may overwrite it

    def _topk(self, tensors: wire.Tensors, settings: dict) -> Callable[[], bytes]:
        batch = wire.read_batch(tensors, self.limits)
        size = self.identity["vocabulary"]
        k, vocabulary = settings.get("k"), settings.get("vocabulary", size)
        temperature = settings.get("temperature", 1.0)
        if not (wire.is_number(vocabulary, low=1, high=size + 1) and wire.is_number(k, low=1, high=vocabulary + 1)):
            raise ValueError(f"k and vocabulary must be numbers up to {size:,}, k the smaller")
        if not (wire.is_number(temperature, (int, float)) and temperature > 0):
            raise ValueError("temperature must be above 0")

        def run() -> bytes:
            self._tokens.labels("/topk").inc(batch.input_ids.numel())
            with self.teacher.target(batch) as target:
                options = vocabulary, k, temperature, self.teacher.device
                ids, log_probs, tail = TopK.of_target(target, len(batch.scored), *options).tensors
            return wire.pack({"ids": ids, "log_probs": log_probs, "tail": tail})

        return run

    def _generate(self, tensors: wire.Tensors, settings: dict) -> Callable[[], bytes]:
        config = wire.sampling_of(settings.get("sampling"), self.limits)
        prompts, mask = wire.read_prompts(tensors, self.limits, config.max_new_tokens)
        seed, rows = settings.get("seed"), settings.get("rows")
        if not wire.is_number(seed, high=2**63) or not (rows is None or wire.is_number(rows, low=1)):
            raise ValueError("seed must be a number from 0 to 2^63 - 1, and rows one from 1 on, or null")

        def run() -> bytes:
            self.generator.batch_size = rows
            ids, kept = self.teacher.write(prompts, mask, config, seed)
            self._tokens.labels("/generate").inc(int(mask.sum() + kept.sum()))
            return wire.pack({"ids": ids, "mask": kept})

        return run

    def _fingerprint(self, tensors: wire.Tensors, settings: dict) -> Callable[[], bytes]:
        config = wire.sampling_of(settings.get("sampling"), self.limits)
        return lambda: wire.pack({}, fingerprint=self.teacher.identity(config).hex())


@dataclass(eq=False)
class _Reading:
    """A request for the hidden states of a batch; `read` sets them, perhaps with those of others."""

    batch: Batch
    read: Callable[["_Reading"], None]
    hidden: torch.Tensor | None = None

    def goes_with(self, other: Any) -> bool:
        """Whether another request that waits may share its forward: prompts of the teacher alone may begin alike, which
        needs a forward of their own."""
        if not isinstance(other, _Reading) or other.hidden is not None:
            return False
        return self.batch.teacher_input_ids is None and other.batch.teacher_input_ids is None

    def __call__(self) -> bytes:
        if self.hidden is None:
            self.read(self)
        return wire.pack({"hidden": self.hidden})


def _short_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory ran out, or this machine's."""
    return isinstance(error, MemoryError) or lacks_memory(error)


def _unpacked(body: bytes) -> tuple[wire.Tensors, dict[str, Any]]:
    try:
        return wire.unpack(body)
    except ValueError as error:
        raise HTTPException(400, one_line(error)) from None


def _patience(request: Request) -> float:
    """The seconds that a client says it waits."""
    try:
        return float(request.headers.get(wire.WAITS_HEADER, "inf"))
    except ValueError:
        raise HTTPException(400, f"{wire.WAITS_HEADER} must be a number of seconds") from None
