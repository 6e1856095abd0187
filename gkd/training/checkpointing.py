"""Whole checkpoints, and exact resumes from them, after which the present flags apply."""

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from gkd.io.errors import RunStopped, is_of_writing, why_not_written
from gkd.io.files import publish, remove, written_aside
from gkd.io.pickles import load_as_data
from gkd.io.replaced import replaced
from gkd.metrics.divergences import DIVERGENCE_FLAGS
from gkd.runs.checkpoints import UNFINISHED, last_whole, move_into, rotate, seal, step_of
from gkd.training.faults import not_written

# A change of one of these discards text that was written ahead, or the best metric so far.
_OF_TEXT = set("lmbda seq_kd temperature max_new_tokens steps_per_generation router_aux_loss_coef".split())
_OF_BEST = set(
    "metric_for_best_model greater_is_better eval_dataset_name dataset_test_split kd_ratio loss_temperature".split()
) | set(DIVERGENCE_FLAGS)
_HYPERPARAMETERS = ("weight_decay", "betas", "eps")  # in an optimizer's state, besides the learning rate


class CheckpointingTrainer(Trainer):
    """How `gkd.training.trainer.GKDTrainer`, whose `rollout`, `stability` and `stopped` it reads, saves and resumes."""

    _aside: Path | None = None  # where a checkpoint is being written that does not have its final name yet
    _changed: frozenset[str] = frozenset()  # flags that differ from those of the checkpoint

    # ------------------------------------------------------------------ resume

    def prepare_resume(self, resume_from: str | bool | None, changed: Iterable[str]) -> str | None:
        """Before a training: checks the checkpoint to resume from and loads its text; returns its folder, if any.

        Args:
            resume_from: a folder; True is the last whole checkpoint.
            changed: flags that had other values before the checkpoint.

        Raises:
            ValueError: there is no whole checkpoint; it holds code.
        """
        if resume_from is True:
            resume_from, problems = last_whole(self.args.output_dir)
            if resume_from is None:
                raise ValueError(f"No checkpoint in {self.args.output_dir} is whole. {' '.join(problems)}".strip())
        self._changed, step = frozenset(changed), 0
        if resume_from:
            load_as_data(resume_from)
            step = step_of(resume_from)
        self.rollout.resume(resume_from or None, step, keep_text=not self._changed & _OF_TEXT)
        return resume_from

    def _init_training_state(self, *args, **kwargs):
        start = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.state.max_steps)  # the flags' intervals of logging and saving
        if self._changed & _OF_BEST:
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        self.stability.begin_training()
        return start

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        self._hyperparameters = [  # of the flags, before a checkpoint's replace them
            {name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups
        ]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """transformers' own; then hyperparameters and learning rates become those of the present flags.

        The next step has the learning rate of the present schedule, which without a change is the saved one, bit by bit.
        """
        if checkpoint is None:
            return
        scheduler, same_kind = self.lr_scheduler, "lr_scheduler_type" not in self._changed
        rates = getattr(scheduler, "base_lrs", None) or [group["lr"] for group in self.optimizer.param_groups]
        loads_nothing = SimpleNamespace(load_state_dict=lambda state: None)
        with nullcontext() if same_kind else replaced(self, "lr_scheduler", loads_nothing):
            super()._load_optimizer_and_scheduler(checkpoint)
        groups = self.optimizer.param_groups  # loading has replaced them
        for group, hyperparameters in zip(groups, self._hyperparameters, strict=False):
            group |= hyperparameters
        if isinstance(scheduler, LambdaLR):
            if not same_kind:
                scheduler.last_epoch = self.state.global_step
            scheduler.base_lrs = list(rates)
            rates = [
                rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
            ]
        elif same_kind and "learning_rate" not in self._changed:  # ReduceLROnPlateau keeps its rate
            return
        for group, base, rate in zip(groups, getattr(scheduler, "base_lrs", rates), rates, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        scheduler._last_lr = list(rates)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuses a whole model's checkpoint that lacks a tensor: the base model's would be used in its place.

        Raises:
            RunStopped: a tensor is missing, and is not tied to one that is present.
        """
        state = self.model.state_dict()
        missing = sorted(set(load_result.missing_keys) & state.keys())
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        if untied := [name for name in missing if state[name].data_ptr() not in loaded]:
            raise RunStopped(f"The checkpoint's weights lack {untied[0]}: take another one.")
        super()._issue_warnings_after_load(load_result)

    # ------------------------------------------------------------------ saving

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """transformers' own: written aside, sealed with checksums and renamed, before older checkpoints are deleted.

        Raises:
            RunStopped: it could not be written, or the weights are not finite. Earlier checkpoints stay.
        """
        self.stability.refuse_bad_weights()
        run = Path(self._get_output_dir(trial))
        checkpoint = run / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(partial(super()._save_checkpoint, model, trial), checkpoint)
        except Exception as error:
            if not is_of_writing(error):
                raise
            raise not_written(checkpoint, error, self.args.output_dir) from error
        finally:
            self._aside = None
            if self.accelerator.is_local_main_process:
                remove(run / UNFINISHED)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            best = self.state.best_model_checkpoint or checkpoint
            rotate(run, self.args.save_total_limit, keep=[checkpoint, best])

    def _write_checkpoint(self, write: Callable[[], None], checkpoint: Path) -> None:
        """Collective. Machines that share no disk write a folder each."""
        accelerator, state = self.accelerator, self.state
        aside = checkpoint.with_name(UNFINISHED)
        written = aside / checkpoint.name
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            remove(aside)  # a killed run's
        accelerator.wait_for_everyone()
        aside.mkdir(parents=True, exist_ok=True)
        self._aside = aside
        write()
        self.rollout.save(written, state.global_step)
        # transformers names the folder aside as the best one's.
        best = checkpoint.with_name(f"checkpoint-{state.best_global_step}")
        if state.best_global_step and (best == checkpoint or best.is_dir()):
            state.best_model_checkpoint = str(best)
            if self.args.should_save:
                state.save_to_json(str(written / "trainer_state.json"))
        accelerator.wait_for_everyone()
        for process in (accelerator.is_main_process, accelerator.is_local_main_process):
            if process and written.is_dir():
                seal(written)
                if os.path.lexists(checkpoint):  # of a run that resumed from an earlier checkpoint
                    checkpoint.rename(aside / f"{checkpoint.name}-replaced")
                publish(written, checkpoint)
            accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' own; no file has its final name before it is whole.

        Where each rank has all weights, the main process may call it alone.

        Raises:
            RunStopped: it could not be written, or the weights are not finite.
        """
        if self._aside is not None:
            super().save_model(output_dir, _internal_call=True)
            return
        self.stability.refuse_bad_weights()
        folder = Path(output_dir or self.args.output_dir)
        aside = folder / UNFINISHED
        try:
            if self.args.should_save:
                remove(aside)
            super().save_model(str(aside), _internal_call=True)
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
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self) -> None:
        if self.args.should_save:
            with written_aside(Path(self.args.output_dir, "trainer_state.json")) as temporary:
                self.state.save_to_json(str(temporary))

    # ------------------------------------------------------------------ the end

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        # With save_strategy="best" the result decides whether to save, and a stop always saves.
        return super()._determine_best_metric(*args, **kwargs) or self.stopped

    def _load_best_model(self) -> None:
        """Refuses a best model with pickles before it is loaded: a sent state may name any folder."""
        try:
            load_as_data(self.state.best_model_checkpoint)
        except ValueError as error:
            raise RunStopped(str(error)) from error
        super()._load_best_model()

    def _finalize_training(self, *args, **kwargs):
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        to_load = None if self.stopped else best  # a stop is not the end
        # transformers would delete any folder named like a checkpoint.
        with replaced(self.args, "save_total_limit", None), replaced(self.state, "best_model_checkpoint", to_load):
            result = super()._finalize_training(*args, **kwargs)
        if limit == 1 and to_load is not None and self.args.should_save:
            rotate(self.args.output_dir, limit, keep=[best])
        return result
