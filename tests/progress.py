"""Child processes of tests, judged by the work they do: a busy machine makes none of them fail."""

import subprocess
import time
from collections.abc import Callable

import psutil

_WINDOW = 120.0  # seconds, in which processes that get on use more than
_LEAST = 5.0  # CPU seconds, however busy the machine is; launchers that only look after others use less


class Watch:
    """Raises subprocess.TimeoutExpired, with all of a child's processes killed, where they only wait or never end."""

    def __init__(self, child: subprocess.Popen, limit: float = 150):
        self.child, self.limit = child, limit  # CPU seconds
        self.since, self.spent = time.monotonic(), 0.0

    def look(self) -> None:
        now, spent = time.monotonic(), cpu_seconds(self.child.pid)
        if now - self.since > _WINDOW:
            if spent - self.spent < _LEAST:
                self.end(spent)
            self.since, self.spent = now, spent
        if spent > self.limit:
            self.end(spent)

    def end(self, spent: float) -> None:
        for process in [*psutil.Process(self.child.pid).children(recursive=True), self.child]:
            process.kill()
        out, err = self.child.communicate()
        raise subprocess.TimeoutExpired(self.child.args, spent, out, err)


def run(words, limit: float = 150, check: bool = False, **options) -> subprocess.CompletedProcess:
    """`subprocess.run` with what it prints captured as text, for a command that may take `limit` CPU seconds."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(words, **(pipes | options))
    out, err = finish(child, limit)
    assert not check or child.returncode == 0, f"{out[-3000:]}{err[-3000:]}"
    return subprocess.CompletedProcess(words, child.returncode, out, err)


def finish(child: subprocess.Popen, limit: float = 150) -> tuple[str, str]:
    """`child.communicate()`, watched."""
    watch = Watch(child, limit)
    while True:
        try:
            return child.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            watch.look()


def wait_until(happened: Callable[[], object], child: subprocess.Popen, limit: float = 150) -> None:
    """Waits until something has happened or the child has ended."""
    watch = Watch(child, limit)
    while child.poll() is None and not happened():
        watch.look()
        time.sleep(0.02)


def cpu_seconds(pid: int) -> float:
    """Of a process, its children that live, and those that it has waited for."""
    total = 0.0
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
