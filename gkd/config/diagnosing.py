"""The flags of `gkd diagnose`."""

from dataclasses import dataclass, field
from functools import partial

from gkd.config.evaluation import EvalArguments
from gkd.config.parser import FlagParser
from gkd.config.training import GKDArguments
from gkd.config.values import flag


@dataclass
class DiagnoseArguments(EvalArguments):
    """The flags of `gkd evaluate` for one student without a run. The divergence is the total variation, whose
    complement is the share of the student's tokens that the teacher accepts."""

    model_name_or_path: str | None = flag(
        None, "The student: a folder of a whole model or a LoRA adapter, or a hub id."
    )
    output_dir: str | None = flag("diagnosis", "Where figures and examples go.")
    max_rows: int | None = flag(64, "Take the first so many rows.")
    eval_temperature: float | None = flag(None, "Of all text that is written; 0 is greedy (default: as in training).")
    run: str | None = field(default=None, init=False)
    checkpoints: bool = field(default=False, init=False)
    models: list[str] = field(default_factory=list, init=False)
    beta: float | None = field(default=None, init=False)
    skew_alpha: float | None = field(default=None, init=False)
    divergence: str | None = field(default="tv", init=False)

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError("gkd diagnose STUDENT TEACHER ROWS: name the student.")
        if self.teacher_logprobs_url is not None:
            raise ValueError(
                "--teacher_logprobs_url: a diagnosis needs the teacher's whole distribution, and such a server tells its "
                "likeliest tokens alone. Name the model, or serve it by gkd serve (--teacher_url)."
            )
        self.models = [self.model_name_or_path]
        if self.eval_temperature is None:
            self.eval_temperature = GKDArguments.temperature
        super().__post_init__()


make_parser = partial(FlagParser, DiagnoseArguments)
