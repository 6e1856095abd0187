"""Child processes of tests, judged by the work they do: a busy machine makes none of them fail."""

import os
import signal
import subprocess
import time

import psutil


def run(
    words, timeout: float = 120, idle: float = 120, capture_output: bool = True, **options
) -> subprocess.CompletedProcess:
    """`subprocess.run` for a command that may take `timeout` CPU seconds, and whose processes may all rest for `idle` s.

    Raises:
        subprocess.TimeoutExpired: with what it printed; all its processes are killed.
    """
    pipe = subprocess.PIPE if capture_output else None
    child = subprocess.Popen(words, stdout=pipe, stderr=pipe, start_new_session=True, **{"text": True, **options})
    return finish(child, timeout, idle)


def finish(child: subprocess.Popen, timeout: float = 120, idle: float = 120) -> subprocess.CompletedProcess:
    """`communicate` with the limits of `run`; the child leads a session of its own."""
    spent, moved = 0.0, time.monotonic()
    while True:
        try:
            out, err = child.communicate(timeout=2)
            return subprocess.CompletedProcess(child.args, child.returncode, out, err)
        except subprocess.TimeoutExpired:
            now = cpu_seconds(child.pid)
            if now > spent + 0.05:
                spent, moved = now, time.monotonic()
            if spent > timeout or time.monotonic() - moved > idle:
                os.killpg(child.pid, signal.SIGKILL)
                out, err = child.communicate()
                raise subprocess.TimeoutExpired(child.args, spent, out, err) from None


def cpu_seconds(pid: int) -> float:
    """Of a process, its children that live, and those that it has waited for."""
    total = 0.0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += sum((times.user, times.system, times.children_user, times.children_system))
    except psutil.NoSuchProcess:
        pass
    return total
