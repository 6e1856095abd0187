"""Whole checkpoints, and exact resumes from them, after which the present flags apply.

Methods of `Checkpoints` wrap methods of transformers' Trainer, which they take as functions.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
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
from gkd.io.replaced import replaced
from gkd.metrics.divergences import DIVERGENCE_FLAGS
from gkd.runs.checkpoints import UNFINISHED, last_whole, move_into, rotate, seal, step_of
from gkd.training.faults import go_on_from, not_written

logger = get_logger(__name__)

# A change of one of these discards text that was written ahead, or the best metric so far.
_OF_TEXT = set(
    "lmbda lmbda_schedule lmbda_steps lmbda_probe_steps seq_kd temperature max_new_tokens "
    "steps_per_generation router_aux_loss_coef teacher_text_model teacher_text_options".split()
)
_OF_BEST = set(
    "metric_for_best_model greater_is_better eval_dataset_name dataset_test_split kd_ratio loss_temperature".split()
) | set(DIVERGENCE_FLAGS)
_HYPERPARAMETERS = ("weight_decay", "betas", "eps")  # in an optimizer's state, besides the learning rate


class Checkpoints:
    """Saves and resumes a run.

    Args:
        trainer: a `gkd.training.trainer.GKDTrainer` with its `rollout`, `stability`, `choices` and `stopping`.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.rollout, self.stability, self.stop = trainer.rollout, trainer.stability, trainer.stopping
        self.choices = trainer.choices
        self._aside: Path | None = None
        self._changed: set[str] = set()  # flags that differ from those of the checkpoint
        self._hyperparameters: list[dict[str, float]] = []  # of the optimizer's groups, from the flags

    # ------------------------------------------------------------------ resume

    def begin(self, resume_from: str | bool | None, changed: Iterable[str]) -> str | None:
        """Before a training: checks the checkpoint to resume from, loads its text and choices; returns its folder, if any.

        Args:
            resume_from: a folder; True is the last whole checkpoint.
            changed: flags that had other values before the checkpoint.

        Raises:
            ValueError: there is no whole checkpoint; it holds code, or damaged choices.
        """
        if resume_from is True:
            resume_from, problems = last_whole(self.args.output_dir)
            if resume_from is None:
                raise ValueError(f"No checkpoint in {self.args.output_dir} is whole. {' '.join(problems)}".strip())
        self._changed, step = set(changed), 0
        if resume_from:
            load_as_data(resume_from)
            step = step_of(resume_from)
            self.choices.resume(resume_from)
        self.rollout.resume(resume_from or None, step, keep_text=not self._changed & _OF_TEXT)
        return resume_from

    def apply_flags_to_state(self) -> None:
        """Replaces a checkpoint's logging and saving intervals, and its best metric if that is no longer comparable."""
        state = self.trainer.state
        state.compute_steps(self.args, state.max_steps)
        if self._changed & _OF_BEST:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def note_hyperparameters(self, optimizer: Optimizer) -> None:
        """Notes the flags' values before a checkpoint's replace them."""
        self._hyperparameters = [
            {name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups
        ]

    def load_optimizer(self, load: Callable[[str | None], None], checkpoint: str | None) -> None:
        """Loads optimizer and scheduler, then sets hyperparameters and learning rates to those of the present flags.

        The next step has the learning rate of the present schedule, which without a change is the saved one, bit by bit.
        """
        trainer, scheduler = self.trainer, self.trainer.lr_scheduler
        same_kind = "lr_scheduler_type" not in self._changed
        rates = getattr(scheduler, "base_lrs", None) or [group["lr"] for group in trainer.optimizer.param_groups]
        loads_nothing = SimpleNamespace(load_state_dict=lambda state: None)
        with nullcontext() if same_kind else replaced(trainer, "lr_scheduler", loads_nothing):
            load(checkpoint)
        if checkpoint is None:
            return
        groups = trainer.optimizer.param_groups  # loading has replaced them
        for group, hyperparameters in zip(groups, self._hyperparameters, strict=False):
            group |= hyperparameters
        if isinstance(scheduler, LambdaLR):
            if not same_kind:
                scheduler.last_epoch = trainer.state.global_step
            scheduler.base_lrs = list(rates)
            rates = [
                rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
            ]
        elif same_kind and "learning_rate" not in self._changed:  # ReduceLROnPlateau keeps its rate
            return
        for group, base, rate in zip(groups, getattr(scheduler, "base_lrs", rates), rates, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        scheduler._last_lr = list(rates)

    def check_loaded(self, load_result: Any) -> None:
        """Refuses a whole model's checkpoint that lacks a tensor: the base model's would be used in its place.

        Raises:
            RunStopped: a tensor is missing, and is not tied to one that is present.
        """
        state = self.trainer.model.state_dict()
        missing = sorted(set(load_result.missing_keys) & state.keys())
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        if untied := [name for name in missing if state[name].data_ptr() not in loaded]:
            raise RunStopped(f"The checkpoint's weights lack {untied[0]}: take another one.")

    # ------------------------------------------------------------------ saving

    @property
    def is_writing(self) -> bool:
        """A checkpoint is being written and does not have its final name yet."""
        return self._aside is not None

    def output_dir(self, run: str) -> str:
        """Where transformers writes a checkpoint of `run`."""
        return run if self._aside is None else str(self._aside)

    def save(self, write: Callable[[], None], run: Path) -> Path:
        """Writes a checkpoint aside, seals it with checksums and renames it; returns its folder.

        Raises:
            RunStopped: it could not be written, or the weights are not finite. Earlier checkpoints stay.
        """
        self.stability.refuse_bad_weights()
        state = self.trainer.state
        name = f"checkpoint-{state.global_step}"
        with self._written_aside(run, name) as aside:
            write()
            self.rollout.save(aside / name, state.global_step)
            self.choices.save(aside / name, self.args.should_save)
            # transformers names the folder aside as the best one's.
            best = f"checkpoint-{state.best_global_step}"
            if state.best_global_step and (best == name or (run / best).is_dir()):
                state.best_model_checkpoint = str(run / best)
                if self.args.should_save:
                    state.save_to_json(str(aside / name / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            self._publish(aside / name, run / name)
        return run / name

    def keep_steps(self, error: Exception) -> RunStopped:
        """Saves the steps before one whose text could not be written, and returns the error with how to go on.

        Of several ranks the others wait elsewhere, so nothing more is saved.
        """
        trainer, args = self.trainer, self.args
        step, alone = trainer.state.global_step, self.accelerator.num_processes == 1
        if step and alone and not Path(args.output_dir, f"checkpoint-{step}").is_dir():
            trainer._save_checkpoint(trainer.model, None)
        return RunStopped(f"{error} {go_on_from(args.output_dir)}".strip())

    def rotate(self, latest: Path) -> None:
        """Deletes checkpoints beyond --save_total_limit, but not the latest and the best."""
        if self.args.should_save:
            best = self.trainer.state.best_model_checkpoint or latest
            rotate(latest.parent, self.args.save_total_limit, keep=[latest, best])

    def _publish(self, aside: Path, final: Path) -> None:
        """Seals and renames a written folder; machines that share no disk each do so."""
        for process in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
            if process and aside.is_dir():
                seal(aside)
                if os.path.lexists(final):  # of a run that resumed from an earlier checkpoint
                    final.rename(aside.with_name(f"{final.name}-replaced"))
                publish(aside, final)
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _written_aside(self, run: Path, what: str) -> Iterator[Path]:
        """A folder to write into; collective."""
        aside = Path(run, UNFINISHED)
        try:
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                remove(aside)  # a killed run's
            self.accelerator.wait_for_everyone()
            aside.mkdir(parents=True, exist_ok=True)  # machines may have a disk each
            self._aside = aside
            yield aside
        except Exception as error:
            if not is_of_writing(error):
                raise
            raise not_written(run / what, error, self.args.output_dir) from error
        finally:
            self._aside = None
            if self.accelerator.is_local_main_process:
                remove(run / UNFINISHED)

    def save_model(self, write: Callable[[str], None], folder: Path) -> None:
        """Writes a model into `folder`; no file has its final name before it is whole.

        Where each rank has all weights, the main process may call it alone.

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
        """Writes the trainer's state aside and renames it."""
        if self.args.should_save:
            with written_aside(Path(self.args.output_dir, "trainer_state.json")) as temporary:
                self.trainer.state.save_to_json(str(temporary))

    # ------------------------------------------------------------------ the end

    def check_best(self) -> None:
        """Refuses a best model with pickles before it is loaded: a sent state may name any folder."""
        try:
            load_as_data(self.trainer.state.best_model_checkpoint)
        except ValueError as error:
            raise RunStopped(str(error)) from error

    def finalize(self, finish: Callable[[], Any]) -> Any:
        """Has transformers finish a training, without deleting checkpoints, which is done here."""
        state, args = self.trainer.state, self.args
        limit, best = args.save_total_limit, state.best_model_checkpoint
        to_load = None if self.stop.stopped else best  # a stop is not the end
        # transformers would delete any folder named like a checkpoint.
        with replaced(args, "save_total_limit", None), replaced(state, "best_model_checkpoint", to_load):
            result = finish()
        if limit == 1 and to_load is not None and args.should_save:
            rotate(args.output_dir, limit, keep=[best])
        return result
