"""Faults of a long run: signals, steps that are not finite, out of memory."""

import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from gkd.io.errors import RunStopped, hang_up, why_not_written
from gkd.io.files import write_whole
from gkd.runs.checkpoints import last_whole


class ToHost:
    """A tensor's asynchronous copy to the host. Reading it waits for this copy, not for work that is queued later."""

    def __init__(self, tensor: torch.Tensor):
        self._event = None
        if tensor.is_cuda:
            self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._value = tensor.clone()

    def read(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._value


# ---------------------------------------------------------------------- signals

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
    """A stop at the end of a step, by a signal to any rank, on which all ranks agree; `stopped` after such a stop."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.stopped = False
        self._signal: StopOnSignal | None = None
        self._agreed: ToHost | None = None

    def listen(self, signal: StopOnSignal | None) -> None:
        """Before a training: what catches its signals, if anything."""
        self._signal = signal

    @property
    def _signalled(self) -> bool:
        return self._signal is not None and self._signal.number is not None

    def count_tokens(self, tokens: int, device: torch.device) -> torch.Tensor:
        """The scored tokens of all ranks; the same reduction says whether a rank was signalled, without another sync."""
        counts = torch.tensor([tokens, int(self._signalled)], device=device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        if self.accelerator.num_processes > 1:
            self._agreed = ToHost(counts[1:])
        return counts[0]

    def asked(self) -> bool:
        """Whether to stop at the end of this step, the same on all ranks."""
        if self.accelerator.num_processes > 1:  # known since the step's tokens were counted
            asked = self._agreed is not None and bool(self._agreed.read()[0] > 0)
        else:
            asked = self._signalled
        self.stopped |= asked
        return asked


# ---------------------------------------------------------------------- steps that are not finite

Rows = tuple[torch.Tensor, torch.Tensor]  # ids and labels (B, L) of a micro-batch


@dataclass
class _Step:
    number: int
    bad: ToHost  # (1,)
    batches: list[Rows]
    losses: list[torch.Tensor]


class NonfiniteSteps:
    """Counts optimizer steps that were skipped for a NaN or an infinity; stops the run after `limit` of them in a row.

    The flag is read one step late, at the same time on all ranks, to avoid a device sync.

    Args:
        describe: decodes the rows of a micro-batch.
        path: of the file for the rows of those steps.
        bad_weight: the name of a weight that is not finite, if there is one.
    """

    def __init__(
        self,
        limit: int,
        describe: Callable[[torch.Tensor, torch.Tensor], list[dict]],
        path: Path,
        bad_weight: Callable[[], str | None] = lambda: None,
    ):
        self.limit, self.describe, self.path, self.bad_weight = limit, describe, path, bad_weight
        self.begin(0)

    def begin(self, earlier: int) -> None:
        """Before a training: `earlier` steps were skipped before the checkpoint that it resumes from."""
        self.total = self._earlier = earlier
        self.steps = 0  # of this training, whose flags have been read
        self._reported = (0, 0)
        self._waiting: deque[_Step] = deque()
        self._in_a_row: list[_Step] = []

    @property
    def here(self) -> int:
        """How many of this training's `steps` were skipped."""
        return self.total - self._earlier

    def add(self, step: int, bad: torch.Tensor, batches: list[Rows], losses: list[torch.Tensor]) -> None:
        """`bad`: a scalar on the device, whether the step was skipped. Raises RunStopped for an earlier step."""
        self._waiting.append(_Step(step, ToHost(bad.reshape(1)), batches, losses))
        while len(self._waiting) > 1:
            self._settle()

    def since_last(self) -> tuple[int, int]:
        """Reads all flags: the number of steps since the last call, and how many were skipped. Raises RunStopped."""
        while self._waiting:
            self._settle()
        (steps, skipped), self._reported = self._reported, (self.steps, self.here)
        return self.steps - steps, self.here - skipped

    def summary(self, step: int) -> str | None:
        """A sentence on the skipped steps of a training that ended after step `step`; None if none was skipped.

        Raises:
            RunStopped: all steps were skipped.
        """
        if self._in_a_row:
            self._dump()
        if self.total and self.total == step:
            raise RunStopped(
                f"All {step} optimizer steps had a NaN or infinite loss or gradient and were skipped: nothing was "
                f"trained. Their rows are in {self.path}. Look at these rows, or lower --learning_rate."
            )
        if not self.total:
            return None
        text = f"{self.total} of {step} optimizer steps had a NaN or infinite loss or gradient and were skipped"
        if not self._in_a_row:
            return f"{text}."
        last = len(self._in_a_row)
        return (
            f"{text}, the last {last} among them: the model is that of step {step - last}. Their rows are in "
            f"{self.path}. Look at these rows, or lower --learning_rate."
        )

    def _settle(self) -> None:
        step = self._waiting.popleft()
        self.steps += 1
        if not bool(step.bad.read()[0]):
            self._in_a_row.clear()
            return
        self.total += 1
        self._in_a_row.append(step)
        if len(self._in_a_row) >= self.limit:
            self._dump()
            if (weight := self.bad_weight()) is not None:
                raise RunStopped(
                    f"The student's weights are not finite any more ({weight}): the loss of the last {self.limit} "
                    "optimizer steps was not either, nor can later ones be. Lower --learning_rate."
                )
            raise RunStopped(
                f"{self.limit} optimizer steps in a row had a NaN or infinite loss or gradient; none of them changed a "
                f"weight. Their rows are in {self.path}. Look at these rows, lower --learning_rate, or set "
                "--max_skipped_steps."
            )

    def _dump(self) -> None:
        rows = [
            {"step": step.number, "loss_of_micro_batch": str(float(loss)), **row}
            for step in self._in_a_row
            for batch, loss in zip(step.batches, step.losses, strict=True)
            for row in self.describe(*batch)
        ]
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---------------------------------------------------------------------- memory

_SMALLER = "--auto_micro_batch True, or a lower --per_device_train_batch_size with more --gradient_accumulation_steps"
_REMEDIES = {
    "generating (student)": "a lower --generation_batch_size or --max_new_tokens",
    "generating (teacher)": "a lower --generation_batch_size or --max_new_tokens, or --teacher_load_in_4bit True",
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
    advice = go_on_from(output_dir)
    return RunStopped(f"{what} could not be written: {why_not_written(error)} {advice}".strip())


def go_on_from(output_dir: str) -> str:
    """How to resume from the last whole checkpoint, if there is one."""
    checkpoint, _ = last_whole(output_dir)
    return f"{checkpoint} is whole: go on with it by --resume_from_checkpoint auto." if checkpoint else ""
