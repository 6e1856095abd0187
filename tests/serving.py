"""Servers of a teacher, in a process or a thread, and a proxy in front of one that fails as networks do."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import uvicorn
from tiny import REPO, make_tokenizer

from gkd.cli.serve import listen, server_of
from gkd.config.serving import ServeArguments
from gkd.models.pairing import Side

TOKEN = "the-secret-of-the-tests"


class Process:
    """`gkd serve` as a user starts it, on a free port."""

    def __init__(self, teacher, *flags):
        words = [sys.executable, "-m", "gkd", "serve", str(teacher), "--port", "0", *flags]
        environment = {**os.environ, "GKD_SERVE_TOKEN": TOKEN, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(words, env=environment, **pipes)
        self.said, self._url, self._ready = [], None, threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r" at (http\S+)$", line.strip()):
                self._url = found[1]
                self._ready.set()
        self._ready.set()

    @property
    def url(self):
        assert self._ready.wait(120), self.said
        assert self._url is not None, "".join(self.said)
        return self._url

    def end(self):
        self.process.kill()
        self.process.wait()


@contextmanager
def running(app):
    """Serves an app in a thread of this process, on a free port: its address."""
    listening = listen(SimpleNamespace(host="127.0.0.1", port=0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", log_config=None)
    )  # it would close streams of other handlers
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def in_thread(model, folder, token=TOKEN, most_bytes=2**20, tokenizer=None):
    """A server of a model in a thread of this process: its `TeacherServer`, with its `url`."""
    args = ServeArguments(teacher_model_name_or_path="tiny", max_request_mib=most_bytes / 2**20)
    served = server_of(args, model, Side.of_model(model, tokenizer or make_tokenizer()), "tiny", folder, token)
    with running(served.app) as served.url:
        yield served


class Proxy:
    """Forwards connections to a server, until told otherwise.

    Attributes:
        upstream: where to; may change.
        mode: forward; cut: closes after `bytes_kept` bytes of an answer, `times` times; stall: forwards no answer.
        connections: how many came.
    """

    def __init__(self, upstream):
        self.upstream, self.mode, self.bytes_kept, self.times, self.connections = upstream, "forward", 0, 0, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            host, port = self.upstream.removeprefix("http://").split(":")
            server = socket.create_connection((host, int(port)))
            for source, sink, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=(source, sink, answers), daemon=True).start()

    def _forward(self, source, sink, answers):
        kept = None
        try:
            while data := source.recv(2**16):
                while answers and self.mode == "stall":
                    time.sleep(0.05)
                if answers and self.mode == "cut" and (kept is not None or self.times > 0):
                    if kept is None:
                        self.times, kept = self.times - 1, self.bytes_kept
                    data, kept = data[:kept], kept - len(data)
                    sink.sendall(data)
                    if kept <= 0:
                        break
                else:
                    sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self):
        self._listening.close()
