"""Starts scripts in processes that have the libraries: a server imports them once, and forks a child for each script.

A child is as new as a started Python, but for three things: its libraries are loaded, `sys.orig_argv` is not its own, and
Python hashes text as in all other children. So a claim about new processes has one that is really started among them.
"""

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest.mock import patch

import torch
from progress import Watch, finish


class Preloaded:
    """Runs `words`, a script and its arguments. A subprocess.Popen for what tests ask of one; `out`, `err`: files."""

    def __init__(self, words, env=None, cwd=None):
        self.args = [str(word) for word in words]
        self.out, self.err = (tempfile.NamedTemporaryFile() for _ in range(2))  # noqa: SIM115  (closed with this object)
        context = get_context("forkserver")
        context.set_forkserver_preload(["libraries"])
        with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
            forkserver.ensure_running()
        streams = self.out.name, self.err.name
        self._process = context.Process(target=_run, args=(self.args, dict(env or os.environ), cwd, *streams))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(Path(file.name).read_text() for file in (self.out, self.err))

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)


def _run(words, environment, cwd, *streams):
    """In the child: the script as Python runs it."""
    for number, name in enumerate(streams, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd or ".")
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def start(words, **options):
    """A script in a process that has the libraries; in a new one where there is a GPU, which no fork can share."""
    if not torch.cuda.is_available():
        return Preloaded(words, **options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], **pipes, **options)


def run(words, limit: float = 150, check: bool = False, **options) -> subprocess.CompletedProcess:
    """`progress.run` of a script."""
    child = start(words, **options)
    out, err = finish(child, limit)
    assert not check or child.returncode == 0, f"{out[-3000:]}{err[-3000:]}"
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def run_ranks(words, ranks: int, limit: float = 150) -> subprocess.CompletedProcess:
    """A script on several ranks, as torchrun starts them: all end when one has failed. With what all of them print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1}
    with ExitStack() as stack:
        children = []
        for rank in range(ranks):
            own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            children.append(start(words, env=os.environ | own))
            stack.callback(children[-1].kill)
        watches = [Watch(child, limit) for child in children]
        while None in (codes := [child.poll() for child in children]) and not any(codes):
            for watch, code in zip(watches, codes, strict=True):
                if code is None:
                    watch.look()
            time.sleep(0.02)
    texts = zip(*(child.communicate() for child in children), strict=True)
    failed = next(filter(None, codes), 0)
    return subprocess.CompletedProcess(children[0].args, failed, *map("".join, texts))
