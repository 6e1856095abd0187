"""The flags of `gkd evaluate`, filled up from the record of a run."""

from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from gkd.config.generation import GenerationArguments
from gkd.config.parser import FlagParser
from gkd.config.recorded import usable
from gkd.config.teacher import SERVERS, CrossTokenizerArguments, TeacherArguments, teacher_flag
from gkd.config.training import DataArguments, EvaluationArguments, GKDArguments, StudentArguments
from gkd.config.values import check_positive, check_room, check_seed, flag, optional, parse_objects
from gkd.data.loading import held_out_source
from gkd.io.paths import check_output
from gkd.metrics.divergences import DIVERGENCE_FLAGS, DivergenceArguments
from gkd.runs.record import NAME, read_record

# Flags whose None has a meaning: not filled up from the run's record.
_NOT_FROM_RECORD = ("dataset_name", "output_dir", "dtype", "max_rows")


@dataclass
class EvalArguments(
    EvaluationArguments,
    *map(optional, (DivergenceArguments, GenerationArguments, CrossTokenizerArguments, TeacherArguments)),
):
    """The flags of `gkd evaluate`. None: the run's value, else the default of `gkd train`."""

    run: str | None = flag(None, "Folder of a train_gkd.py run. May stand first, without --run.")
    checkpoints: bool = flag(False, "Evaluate each checkpoint of the run: a curve over its steps.")
    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Further models: folders of whole models or LoRA adapters, or hub ids."},
    )
    output_dir: str | None = flag(None, "Where results and report go (default: the run's folder).")
    dataset_name: str | None = flag(None, "Held-out rows: a file, a folder or a hub id (default: the run's).")
    dataset_config: str | None = flag(None, "Of a dataset on the hub.")
    dataset_test_split: str | None = flag(None, "The split to take, where DATASET_NAME is no single file.")
    max_rows: int | None = flag(None, "Take the first so many rows.")
    dtype: str | None = flag(None, "The students' dtype (default: as they were trained, or that of their weights).")
    beta: float | None = flag(None, "Of the generalized JSD.")
    train_on: str | None = flag(None, "Which assistant turns are scored.", choices=["last_turn", "all_turns"])
    chat_template_kwargs: dict[str, Any] | str | None = flag(None, "JSON with variables for the chat template.")
    system_as_user: bool | None = flag(None, "Put a system prompt before the first question, as train_gkd.py does.")
    max_length: int | None = flag(None, "Of prompt and completion together.")
    max_new_tokens: int | None = flag(None, "Of a completion.")
    per_device_eval_batch_size: int | None = flag(None, "Rows that are generated and scored together.")
    seed: int | None = flag(None, "Of the sampling, where --eval_temperature is above 0.")
    trust_remote_code: bool = flag(False, "Run model code that comes with the students.")
    eval_temperature: float | None = flag(None, "Of the completions; 0 is greedy.")

    def __post_init__(self):
        if self.run is not None and not Path(self.run).is_dir():
            raise ValueError(f"RUN {self.run}: no such folder.")
        groups = (DataArguments, StudentArguments, GKDArguments)
        default = {item.name: item.default for kind in groups for item in fields(kind) if item.default is not MISSING}
        recorded, left_out = {}, {}
        if self.run is not None:
            recorded, left_out = usable(read_record(self.run).get("arguments"), Path(self.run, NAME))
        self.trained = trained = default | recorded  # the run's settings, without those of `left_out`
        typed = {item.name for item in fields(self) if getattr(self, item.name) not in (None, False, [])}
        typed |= {"scorer"} if "metrics" in typed else set()  # either replaces both
        teachers = {"teacher_model_name_or_path", "teachers", *SERVERS}  # one replaces all of the run's teacher
        named = teachers & typed
        typed |= {"teacher_model_init_kwargs"} | teachers if named else set()
        # Settings of the record that are not taken over, as words to type again.
        self.left_out = [words for name, words in left_out.items() if name not in typed]
        given = {name for name in DIVERGENCE_FLAGS if getattr(self, name) is not None}
        # Settings of the run's teacher and data are not taken over if the command names others.
        other = {"teacher": bool(named), "dataset_": self.dataset_name is not None}
        for item in fields(self):
            if getattr(self, item.name) is None and item.name not in _NOT_FROM_RECORD:
                replaced = any(is_other and item.name.startswith(start) for start, is_other in other.items())
                setattr(self, item.name, (default if replaced else trained).get(item.name))
        parse_objects(self, ("chat_template_kwargs", "teacher_model_init_kwargs"))
        if self.run is not None and self.dataset_name is None:
            held_out, split = held_out_source(
                *map(trained.get, ("dataset_name", "eval_dataset_name", "dataset_test_split"))
            )
            if held_out is None:
                raise ValueError(f"{self.run}: the record names no data: give --dataset_name.")
            if Path(held_out).is_file() and split != "train":
                raise ValueError(f"{self.run} was trained without held-out rows: give some by --dataset_name.")
            self.dataset_name = held_out
            if trained["eval_dataset_name"] is not None:
                self.dataset_config = None  # the run's value is that of its training data
        if not self.metrics and not self.scorer:
            self.metrics = list(trained.get("metrics") or [])
        self.output_dir = self.output_dir or self.run
        servers = [left_out[name] for name in (*SERVERS, "teachers") if name in left_out]
        if servers and getattr(self, teacher_flag(self)) is None:
            raise ValueError(
                f"{self.run}: its teacher is behind a server, which a record may not name: type {servers[0]} again, or "
                "give --teacher_model_name_or_path."
            )
        if self.run is not None and getattr(self, teacher_flag(self)) is None:
            raise ValueError(
                f"{self.run}: its record names no teacher to compare with: give --teacher_model_name_or_path or "
                "--teacher_url."
            )
        for name in ("dataset_name", teacher_flag(self), "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is required without a RUN.")
        check_output("--output_dir", self.output_dir)
        if self.run is None and not self.models:
            raise ValueError("Nothing to evaluate: give a RUN, or --models.")
        if self.run is None and self.checkpoints:
            raise ValueError("--checkpoints are those of a RUN: give one.")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"--beta must lie in [0, 1], not {self.beta}.")
        self.check_divergence(given)
        check_room(self)
        self.check_teacher()
        self.check_cross_tokenizer()
        self.check_generation()
        check_positive(self, ("max_new_tokens", "per_device_eval_batch_size", "max_rows"))
        check_seed(self, "seed")
        self.check_evaluation()


make_parser = partial(FlagParser, EvalArguments)
