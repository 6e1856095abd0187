"""Faults of a long run: signals, out of memory, and files that could not be written."""

import contextlib
import os
import signal
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from gkd.io.errors import RunStopped, hang_up, why_not_written
from gkd.runs.checkpoints import last_whole


class FlagOnHost:
    """A tensor's truth, copied to the host asynchronously: reading it waits for this copy, not for later work."""

    def __init__(self, flag: torch.Tensor):
        self._value = flag.to("cpu", non_blocking=True, copy=True)  # into pinned memory
        self._copied = torch.cuda.current_stream(flag.device).record_event() if flag.is_cuda else None

    def __bool__(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._value)


# Slurm is usually asked for SIGUSR1 before a time limit: sbatch --signal=USR1@300. SIGHUP: the terminal was closed or its
# connection broke.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
_SAME = 1.0  # seconds: Ctrl-C reaches a process from the terminal and again from its launcher


class StopOnSignal(contextlib.AbstractContextManager):
    """A context in which a first signal asks for a stop, and a second one stops at once. For the main thread only.

    `number` is the first signal, or None. An ignored SIGHUP stays ignored, as nohup wants it.
    """

    def __init__(self):
        self.number: int | None = None
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in _SIGNALS:
            if _name(number) != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        return _name(self.number)

    def _take(self, number: int, _frame) -> None:
        if _name(number) == "SIGHUP":
            hang_up()
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            # Not print, which the signal may have interrupted.
            text = f"\n{self.name}: finishing the step and saving a checkpoint; a second signal stops at once.\n"
            os.write(2, text.encode())
        elif time.monotonic() - self._since > _SAME:
            os.write(2, b"\nStopped at once; what came after the last checkpoint is lost.\n")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _name(number: int) -> str:
    return signal.Signals(number).name


class AgreedStop:
    """A stop at the end of a step, by a signal to any rank, on which all ranks agree.

    Attributes:
        signal: catches the signals of the present training, if anything does.
        stopped: whether there was such a stop.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.stopped = False
        self.signal: StopOnSignal | None = None
        self._agreed: FlagOnHost | None = None

    @property
    def _signalled(self) -> bool:
        return self.signal is not None and self.signal.number is not None

    def count_tokens(self, tokens: int, device: torch.device) -> torch.Tensor:
        """The scored tokens of all ranks; the same reduction says whether a rank was signalled, without another sync."""
        counts = torch.tensor([tokens, int(self._signalled)], device=device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        if self.accelerator.num_processes > 1:
            self._agreed = FlagOnHost(counts[1])
        return counts[0]

    def asked(self) -> bool:
        """Whether to stop at the end of this step, the same on all ranks."""
        # Of several ranks, what they knew when they counted the step's tokens.
        asked = bool(self._agreed) if self.accelerator.num_processes > 1 else self._signalled
        self.stopped |= asked
        return asked


_SMALLER = "--auto_micro_batch True, or a lower --per_device_train_batch_size with more --gradient_accumulation_steps"
_SHORTER = "a lower --max_new_tokens or, of sharded weights, a lower --generation_batch_size"
_REMEDIES = {
    "generating (student)": _SHORTER,
    "generating (teacher)": f"--teacher_load_in_4bit True, {_SHORTER}",
    "the teacher's forward": f"{_SMALLER}, or --teacher_load_in_4bit True",
    "the student's forward and the divergence": f"--gradient_checkpointing, a lower --max_length, or {_SMALLER}",
    "the student's backward": f"--gradient_checkpointing, a lower --max_length, or {_SMALLER}",
    "the optimizer's step": "--use_peft, --optim adamw_8bit, or ds_configs/zero2_offload.yaml",
    "evaluating": "a lower --per_device_eval_batch_size",
}


def out_of_memory(error: BaseException, part: str, shape: str) -> RunStopped:
    """A torch.OutOfMemoryError in a part of training, for batches of this shape, with flags that help."""
    memory = ""
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        memory = (
            f" PyTorch holds {torch.cuda.memory_reserved() / 2**30:.2f} GiB (most allocated: "
            f"{torch.cuda.max_memory_allocated() / 2**30:.2f}), {free / 2**30:.2f} of {whole / 2**30:.2f} GiB are free."
        )
    lines = str(error).strip().splitlines()
    reason = next((s for s in lines[0].split(". ") if "allocate" in s), lines[0]).strip() if lines else "out of memory"
    return RunStopped(
        f"Out of memory in {part}{shape}: {reason.rstrip('.')}.{memory} What helps: "
        f"{_REMEDIES.get(part, _SMALLER)}; --preflight only shows where memory goes."
    )


def not_written(what: str | Path, error: BaseException, output_dir: str) -> RunStopped:
    """A file or folder of a run could not be written; says why, and how to resume."""
    return RunStopped(f"{what} could not be written: {why_not_written(error)} {go_on_from(output_dir)}".strip())


def go_on_from(output_dir: str) -> str:
    """How to resume from the last whole checkpoint, if there is one."""
    checkpoint, _ = last_whole(output_dir)
    return f"{checkpoint} is whole: go on with it by --resume_from_checkpoint auto." if checkpoint else ""
