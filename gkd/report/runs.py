"""Reads what a run left in its folder, for its report."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gkd.io.paths import checkpoints_in
from gkd.runs.checkpoints import STATE, state_of
from gkd.runs.record import NAME as RECORD
from gkd.runs.record import read_record
from gkd.runs.results import comparable, read_results, records_of

_TIMES = ("seconds_generating", "seconds_training", "seconds_capturing")


def _is_number(log: dict[str, Any], name: str) -> bool:
    return isinstance(log.get(name), int | float)


@dataclass
class Run:
    """`record`: run.json, {} if there is none; `state`: the Trainer's, with its logs; `results`: of evaluations."""

    name: str
    folder: Path
    record: dict[str, Any]
    state: dict[str, Any]
    results: list[dict[str, Any]]

    def flag(self, name: str) -> Any:
        return self.record.get("arguments", {}).get(name)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The logs of training steps."""
        return [log for log in self.state.get("log_history", []) if "seconds_training" in log]

    @property
    def seconds(self) -> float:
        """Wall time of generating and training, evaluation left out."""
        return sum(log.get(name, 0.0) for log in self.steps for name in _TIMES)

    @property
    def tokens(self) -> float:
        """Scored tokens of all ranks."""
        return sum(log.get("tokens_per_second", 0.0) * sum(log.get(t, 0.0) for t in _TIMES) for log in self.steps)

    @property
    def notes(self) -> list[str]:
        """Sentences on what the run decided by itself about whose text it trains on."""
        steps = [log for log in self.steps if isinstance(log.get("step"), int)]
        notes = [
            f"Half of the steps on-policy from step {log['lmbda_since']:.0f} on."
            for log in steps[-1:]
            if _is_number(log, "lmbda_since")
        ]
        spans: list[list[int]] = []  # the first and the last log of each time
        for before, log in zip([{}, *steps], steps, strict=False):
            if log.get("rollout_guard") != 1:
                continue
            if before.get("rollout_guard") != 1:
                spans.append([log["step"], log["step"]])
            spans[-1][1] = log["step"]
        for first, last in spans:
            when = f"step {first}" if first == last else f"steps {first} to {last}"
            notes.append(
                f"The student's text got worse, and the rollout guard acted (logged at {when}): look at its repetition and the "
                "share cut off."
            )
        return notes

    @property
    def data(self) -> list[str]:
        """The names of the held-out data, the run's own first."""
        run_data = self.flag("eval_dataset_name") or self.flag("dataset_name")
        return sorted(dict.fromkeys(result["data"] for result in self.results), key=lambda name: name != run_data)

    def on(self, data: str) -> "Run":
        """The run with only those results on this held-out data that compare with the newest one."""
        return replace(self, results=comparable(self.results, data))

    def result(self, model: str) -> dict[str, Any] | None:
        return next((result for result in self.results if result["model"] == model), None)

    @property
    def final(self) -> dict[str, Any] | None:
        """The final result: after training, or of the last step so far."""
        steps = (result for result in self.results if result["step"])
        return self.result("after") or max(steps, key=lambda result: result["step"], default=None)

    @property
    def others(self) -> list[dict[str, Any]]:
        """Results of models that are not part of the run."""
        return [r for r in self.results if r["step"] is None and r["model"] not in ("before", "after", "teacher")]

    @property
    def students(self) -> list[dict[str, Any]]:
        """The results before and after, and of other models."""
        return [result for result in (self.result("before"), self.final, *self.others) if result is not None]

    def samples(self, count: int) -> list[dict[str, Any]]:
        """The first held-out rows with the answers of each model: prompt, reference, answers by model."""
        shown = [result for result in (*self.students, self.result("teacher")) if result is not None]
        records = {
            r["model"]: {x["row"]: x for x in records_of(self.folder, r["model"], r["data"], r["settings"])}
            for r in shown
        }
        first = next(iter(records.values()), {})
        samples = []
        for row in [row for row in first if all(row in by_row for by_row in records.values())][:count]:
            answers = {model: by_row[row] for model, by_row in records.items()}
            references = (r["reference"] for r in answers.values() if r["reference_by"] == "dataset")
            samples.append({"prompt": first[row]["prompt"], "reference": next(references, None), "answers": answers})
        return samples


def load_run(folder: str | Path, name: str | None = None) -> Run:
    """Reads a run, even if it is unfinished or only evaluated.

    Raises:
        ValueError: there is nothing to report.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder.")
    places = (folder, *map(Path, checkpoints_in(folder)[:1]))
    holder = next((place for place in places if (place / STATE).is_file()), None)
    results = read_results(folder)
    if holder is None and not results:
        raise ValueError(
            f"{folder}: neither trainer_state.json, nor a checkpoint, nor evaluation/results.json, so there is nothing "
            "to report. Give the --output_dir of a train_gkd.py run that has saved, or of eval_gkd.py."
        )
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    state = {} if holder is None else state_of(holder)
    return Run(name or folder.resolve().name, folder, record, state, results)


def load_runs(folders: list[str | Path]) -> list[Run]:
    """Reads runs and gives them distinct names: the last part of their paths, or as many parts as it takes."""
    paths = [Path(folder).resolve() for folder in folders]
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(set(paths)):
        parts += 1
    return [load_run(f, str(Path(*path.parts[-parts:]))) for f, path in zip(folders, paths, strict=True)]
