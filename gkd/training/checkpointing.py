"""Whole checkpoints, and exact resumes from them; what the flags say now counts from there on.

Each method of `Checkpoints` stands around one of transformers' Trainer, which it gets as a function.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate.logging import get_logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from gkd.io.errors import RunStopped, is_of_writing, why_not_written
from gkd.io.files import publish, remove, written_aside
from gkd.io.pickles import load_as_data
from gkd.metrics.divergences import DIVERGENCE_FLAGS
from gkd.rollout.planner import Rollout
from gkd.runs.checkpoints import UNFINISHED, last_whole, move_into, rotate, seal, step_of
from gkd.training.faults import AgreedStop, go_on_from
from gkd.training.stability import Stability

logger = get_logger(__name__)

# A resumed run that changes one of these writes anew what was written ahead, or looks for the best figure anew.
_OF_TEXT = set("lmbda seq_kd temperature max_new_tokens steps_per_generation router_aux_loss_coef".split())
_OF_BEST = set(
    "metric_for_best_model greater_is_better eval_dataset_name dataset_test_split kd_ratio loss_temperature".split()
) | set(DIVERGENCE_FLAGS)
_HYPERPARAMETERS = ("weight_decay", "betas", "eps")  # in an optimizer's state, beside the learning rate


class Checkpoints:
    """Saves and resumes a run.

    Args:
        trainer: whose state is saved.
        rollout: its text that was written ahead is saved too.
        stability: refuses weights that are not finite.
        stop: a run that is stopped is not finished.
    """

    def __init__(self, trainer: Trainer, rollout: Rollout, stability: Stability, stop: AgreedStop):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.rollout, self.stability, self.stop = rollout, stability, stop
        self._aside: Path | None = None
        self._changed: set[str] = set()  # flags that differ from those of the checkpoint
        self._asked_for: list[dict[str, float]] = []  # hyperparameters of the optimizer's groups, as the flags say

    # ------------------------------------------------------------------ resume

    def begin(self, resume_from: str | bool | None, changed: Iterable[str]) -> str | None:
        """Before a training: the checkpoint that it goes on from, checked, and the state beside transformers' own.

        Args:
            resume_from: a folder; True is the last whole checkpoint.
            changed: flags that had other values before it.

        Raises:
            ValueError: there is no whole checkpoint; one that holds code.
        """
        if resume_from is True:
            resume_from, problems = last_whole(self.args.output_dir)
            if resume_from is None:
                raise ValueError(f"No checkpoint in {self.args.output_dir} is whole. {' '.join(problems)}".strip())
        checkpoint, step = resume_from or None, 0
        self._changed = set(changed)
        if checkpoint is not None:
            load_as_data(checkpoint)
            step = step_of(checkpoint)
        self.rollout.resume(checkpoint, step, keep_text=not self._changed & _OF_TEXT)
        return resume_from

    def apply_flags_to_state(self) -> None:
        """A checkpoint's state says when its run logged and saved, and what was best."""
        state = self.trainer.state
        state.compute_steps(self.args, state.max_steps)
        if self._changed & _OF_BEST:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def note_hyperparameters(self, optimizer: Optimizer) -> None:
        """Before a checkpoint is loaded: what the flags ask of the optimizer."""
        groups = optimizer.param_groups
        self._asked_for = [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in groups]

    def load_optimizer(self, load: Callable[[str | None], None], checkpoint: str | None) -> None:
        """Loads optimizer and scheduler, and then what the flags say now: a state has the values of its run.

        The next step has the learning rate that the present schedule gives it; without a change that is the saved one, bit
        by bit.
        """
        trainer, scheduler = self.trainer, self.trainer.lr_scheduler
        same_kind = "lr_scheduler_type" not in self._changed  # else its state is of another
        groups = trainer.optimizer.param_groups
        rates = getattr(scheduler, "base_lrs", None) or [group["lr"] for group in groups]
        if checkpoint is not None and not same_kind:
            trainer.lr_scheduler = SimpleNamespace(load_state_dict=lambda state: None)
        try:
            load(checkpoint)
        finally:
            trainer.lr_scheduler = scheduler
        if checkpoint is None:
            return
        groups = trainer.optimizer.param_groups  # others than before
        for group, asked in zip(groups, self._asked_for, strict=False):
            group |= asked
        if isinstance(scheduler, LambdaLR):
            if not same_kind:
                scheduler.last_epoch = trainer.state.global_step
            scheduler.base_lrs = list(rates)
            rates = [
                rate * share(scheduler.last_epoch) for rate, share in zip(rates, scheduler.lr_lambdas, strict=True)
            ]
        elif same_kind and "learning_rate" not in self._changed:  # on a plateau: as low as it has come
            return
        for group, base, rate in zip(groups, getattr(scheduler, "base_lrs", rates), rates, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        scheduler._last_lr = list(rates)

    def check_loaded(self, load_result: Any) -> None:
        """Of a whole model's checkpoint; a tensor that it lacks would be that of the base.

        Raises:
            RunStopped: a tensor is missing that is no other name of one that is there.
        """
        state = self.trainer.model.state_dict()
        missing = sorted(set(load_result.missing_keys) & state.keys())
        there = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        if lacking := [name for name in missing if state[name].data_ptr() not in there]:
            raise RunStopped(f"The checkpoint's weights lack {lacking[0]}: take another one.")

    # ------------------------------------------------------------------ saving

    @property
    def is_writing(self) -> bool:
        """A checkpoint is being written, which has no final name yet."""
        return self._aside is not None

    def output_dir(self, run: str) -> str:
        """Where transformers is to write a checkpoint of `run`."""
        return run if self._aside is None else str(self._aside)

    def save(self, write: Callable[[], None], run: Path) -> Path:
        """Has a checkpoint written aside, sealed with checksums and renamed; returns its folder.

        Raises:
            RunStopped: it could not be written, or the weights are not finite; the ones before it are as they were.
        """
        self.stability.refuse_bad_weights()
        state = self.trainer.state
        name = f"checkpoint-{state.global_step}"
        with self._written_aside(run, name) as aside:
            write()
            self.rollout.save(aside / name, state.global_step)
            # transformers has looked for the best one aside.
            best = f"checkpoint-{state.best_global_step}"
            if state.best_global_step and (best == name or (run / best).is_dir()):
                state.best_model_checkpoint = str(run / best)
                if self.args.should_save:
                    state.save_to_json(str(aside / name / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            self._publish(aside / name, run / name)
        return run / name

    def rotate(self, latest: Path) -> None:
        """Deletes what is over --save_total_limit, but the latest and the best."""
        if self.args.should_save:
            best = self.trainer.state.best_model_checkpoint or latest
            rotate(latest.parent, self.args.save_total_limit, keep=[latest, best])

    def _publish(self, aside: Path, final: Path) -> None:
        """Renames a folder that is written; on machines that share no disk, on each of them."""
        for process in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
            if process and aside.is_dir():
                seal(aside)
                if os.path.lexists(final):  # of a run that went back behind it
                    final.rename(aside.with_name(f"{final.name}-replaced"))
                publish(aside, final)
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _written_aside(self, run: Path, what: str) -> Iterator[Path]:
        """A folder for what is being written; all ranks enter it together."""
        aside = Path(run, UNFINISHED)
        try:
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                remove(aside)  # what a killed run left there
            self.accelerator.wait_for_everyone()
            aside.mkdir(parents=True, exist_ok=True)  # on each machine, whether they share a disk or not
            self._aside = aside
            yield aside
        except Exception as error:
            if not is_of_writing(error):
                raise
            advice = go_on_from(self.args.output_dir)
            raise RunStopped(
                f"{run / what} could not be written: {why_not_written(error)} {advice}".strip()
            ) from error
        finally:
            self._aside = None
            if self.accelerator.is_local_main_process:
                remove(run / UNFINISHED)

    def save_model(self, write: Callable[[str], None], folder: Path) -> None:
        """Has a model written into `folder`, where no file has its final name before it is whole.

        The main process may call it alone where each rank has all weights.

        Raises:
            RunStopped: it could not be written, or the weights are not finite.
        """
        self.stability.refuse_bad_weights()
        aside = folder / UNFINISHED
        try:
            if self.args.should_save:
                remove(aside)
            write(str(aside))
            if self.args.should_save:
                move_into(aside, folder)
        except Exception as error:
            if self.args.should_save:
                remove(aside)
            if not is_of_writing(error):
                raise
            raise RunStopped(
                f"The model in {folder} could not be written: {why_not_written(error)} Go on by "
                "--resume_from_checkpoint auto."
            ) from error

    def save_state(self) -> None:
        """The trainer's state, written aside and renamed."""
        if self.args.should_save:
            with written_aside(Path(self.args.output_dir, "trainer_state.json")) as temporary:
                self.trainer.state.save_to_json(str(temporary))

    # ------------------------------------------------------------------ the end

    def check_best(self) -> None:
        """Of the best model, before it is loaded: the state names its folder, which may be any, and hold pickles."""
        try:
            load_as_data(self.trainer.state.best_model_checkpoint)
        except ValueError as error:
            raise RunStopped(str(error)) from error

    def finalize(self, finish: Callable[[], Any]) -> Any:
        """Has transformers finish a training; checkpoints are deleted here alone."""
        state, args = self.trainer.state, self.args
        best, limit = state.best_model_checkpoint, args.save_total_limit
        if self.stop.stopped:  # not the end: no best model to load, and no checkpoint to delete beside it
            state.best_model_checkpoint = None
        args.save_total_limit = None  # transformers would delete whatever is named like a checkpoint
        try:
            result = finish()
        finally:
            state.best_model_checkpoint, args.save_total_limit = best, limit
        if limit == 1 and best is not None and not self.stop.stopped and args.should_save:
            rotate(args.output_dir, limit, keep=[best])
        return result
