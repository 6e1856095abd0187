"""What a run shows while it trains: phase, metrics and a few completions, on the terminal and in the trackers."""

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean

import pandas as pd
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from gkd.data.batch import IGNORE, Source
from gkd.io.console import Console, printable
from gkd.io.errors import first_line
from gkd.io.terminal import in_markdown
from gkd.metrics.names import SHORT
from gkd.rollout.steps import StepText
from gkd.training.faults import AgreedStop

logger = logging.getLogger(__name__)
_TRAINING, _EVALUATION = ("forward_kl", "agreement"), ("forward_kl", "reverse_kl")
_RUN_AWAY, _LOGS = 0.5, 5  # share of completions that is more than before, and of how many logs

# The prefix of an evaluation's keys, with the set's name if there are several.
_EVAL_PREFIX = re.compile(rf"(eval_(?:.+_)?)(?:loss|(?:{'|'.join(s.label for s in Source)})/forward_kl)")


def _by_source(logs: dict[str, float], prefix: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """The label of each source, and its metrics by name."""
    for source in Source:
        start = f"{prefix}{source.label}/"
        if figures := {key.removeprefix(start): value for key, value in logs.items() if key.startswith(start)}:
            yield source.label.replace("_", "-"), figures


def _figures(logs: dict[str, float], prefix: str, names: tuple[str, ...]) -> Iterator[str]:
    for source, figures in _by_source(logs, prefix):
        if shown := [SHORT[name].format(figures[name]) for name in names if name in figures]:
            yield f"{source} {', '.join(shown)}"


class Progress(ProgressCallback):
    """transformers' progress bar, with the phase and, instead of each log's dict, a line of its main metrics."""

    def show_phase(self, phase: str) -> None:
        if self.training_bar is not None:  # only the main process has one
            self.training_bar.set_description(phase)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if "loss" in logs or "train_loss" in logs:  # of training; its last log has the mean of all steps
            parts.append(f"loss {logs['loss']:.3g}" if "loss" in logs else f"mean loss {logs['train_loss']:.3g}")
            parts += _figures(logs, "", _TRAINING)
            if "tokens_per_second" in logs:
                parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
            if "train_runtime" in logs:
                parts.append(tqdm.format_interval(logs["train_runtime"]))
        elif prefix := next((match[1] for key in logs if (match := _EVAL_PREFIX.fullmatch(key))), None):
            if f"{prefix}loss" in logs:
                parts.append(f"{prefix.replace('_', ' ')}loss {logs[f'{prefix}loss']:.3g}")
            parts += _figures(logs, prefix, _EVALUATION)
        else:  # by other callers
            return super().on_log(args, state, control, logs=logs, **kwargs)
        if "loss" in logs:
            postfix = {"loss": f"{logs['loss']:.3g}"}
            for name, figures in _by_source(logs):
                if "forward_kl" in figures:
                    postfix[f"{name} KL"] = f"{figures['forward_kl']:.3g}"
            if "tokens_per_second" in logs:
                postfix["tok/s"] = f"{logs['tokens_per_second']:,.0f}"
            self.training_bar.set_postfix(postfix, refresh=False)  # writing the line redraws the bar
        self.training_bar.write(" | ".join(parts))


_COLUMNS = ["step", "source", "prompt", "completion"]
Row = tuple[int, str, str, str]


def _cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:200]} … {text[-100:]}"


class Completions(TrainerCallback):
    """Shows the last `n` completions of each source at each log of training, with their prompts.

    On the terminal, and as a table in wandb, trackio and TensorBoard if they are in `report_to`. A tracker that fails gets
    no more tables. TensorBoard's writer is found in the trainer's `handler`; without one it gets no table.
    """

    def __init__(self, n: int, handler: CallbackHandler | None = None):
        self.n, self.handler = n, handler
        self._kept: dict[str, deque[Row]] = {}
        self._failed: set[str] = set()

    def keep(self, source_label: str, step: int, prompts: list[str], completions: list[str]) -> None:
        """Keeps decoded text of optimizer step `step` for the next log."""
        rows = self._kept.setdefault(source_label, deque(maxlen=self.n))
        rows.extend((step, source_label, *pair) for pair in zip(prompts, completions, strict=True))

    def keep_step(self, text: StepText, step: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keeps some rows of a step's generated text, of medium length."""
        if text.source is Source.DATASET:
            return
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        batch = text.batches[len(text.batches) // 2]
        prompts, completions = [], []
        for ids, labels in zip(batch.input_ids[: self.n].cpu(), batch.labels[: self.n].cpu(), strict=True):
            start = int((labels == IGNORE).int().argmin())  # of the completion
            prompts.append(decode(ids[:start]))
            completions.append(decode(ids[labels != IGNORE]))
        self.keep(text.source.label, step, prompts, completions)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        rows = [row for rows_of_source in self._kept.values() for row in rows_of_source]
        self._kept.clear()
        if not rows or not state.is_world_process_zero:
            return
        table = Table("source", "prompt", "completion", title=f"step {state.global_step}", show_lines=True)
        for _, *texts in rows:
            table.add_row(*(printable(_cut(text)) for text in texts))
        with tqdm.external_write_mode():
            Console().print(table)
        for tracker, send in (("wandb", to_wandb), ("trackio", _to_trackio), ("tensorboard", self._to_tensorboard)):
            if tracker not in args.report_to or tracker in self._failed:
                continue
            try:
                send(rows, state.global_step)
            except Exception as error:  # whatever a tracker raises, the run goes on
                self._failed.add(tracker)
                logger.warning(f"{tracker} gets no more completions: {type(error).__name__}: {first_line(error)}")

    def _to_tensorboard(self, rows: list[Row], step: int) -> None:
        lines = [_COLUMNS, ["---"] * len(_COLUMNS), *([in_markdown(value) for value in row] for row in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        for callback in self.handler.callbacks if self.handler is not None else ():
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("completions", table, step)


# Trackers are optional dependencies, so each is imported where it is used. Our step is a column and not `step=`: theirs
# counts calls of log, and transformers makes several a step.
def to_wandb(rows: list[Row], step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log({"completions": wandb.Table(columns=_COLUMNS, data=[*map(list, rows)]), "train/global_step": step})


def _to_trackio(rows: list[Row], step: int) -> None:
    import trackio

    table = trackio.Table(dataframe=pd.DataFrame(rows, columns=_COLUMNS))
    trackio.log({"completions": table, "train/global_step": step})


class RunAway(TrainerCallback):
    """Warns, once, where the student's text has stopped ending: over some logs the limit cuts off far more of it than before."""

    def __init__(self):
        self._latest: deque[float] = deque(maxlen=_LOGS)
        self._least, self._warned = 1.0, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "on_policy/truncated" not in logs or self._warned or not state.is_world_process_zero:
            return
        self._latest.append(logs["on_policy/truncated"])
        if len(self._latest) < _LOGS:  # a single step has few texts
            return
        cut = mean(self._latest)
        self._least = min(self._least, cut)
        if cut >= self._least + _RUN_AWAY:
            self._warned = True
            logger.warning(
                f"The student's text no longer ends: up to step {state.global_step} the limit cuts off {cut:.0%} of it, before "
                f"{self._least:.0%}. Training on it can lose everything: go back to an earlier checkpoint, with --beta 0.5 or less, "
                "or a lower --lmbda or --learning_rate."
            )


class StepEnd(TrainerCallback):
    """Stops on request, and logs before every checkpoint: a resumed run logs the averages of the uninterrupted one.

    Args:
        on_end: called after the optimizer's step, before logs, checkpoints and evaluations.
    """

    def __init__(self, stop: AgreedStop, on_end: Callable[[], None]):
        self.stop, self.on_end = stop, on_end

    def on_step_end(self, args, state, control, **kwargs):
        self.on_end()
        if self.stop.asked():
            control.should_training_stop = control.should_save = True
        control.should_log |= control.should_save

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stop.stopped and state.epoch % 1:  # transformers calls this in the middle of an epoch too
            control.should_log = control.should_evaluate = control.should_save = False
        control.should_log |= control.should_save


def show_progress(trainer: Trainer) -> Progress:
    """Replaces transformers' progress bar, if there is one: a notebook's stays, and --disable_tqdm has none."""
    progress = Progress()
    stock = [c for c in trainer.callback_handler.callbacks if type(c) is ProgressCallback]
    for callback in stock:
        trainer.remove_callback(callback)
    if stock:
        trainer.add_callback(progress)
    return progress
