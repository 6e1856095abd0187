"""What a run shows, in a real Trainer: the lines, the bar, the completions, and what TensorBoard, wandb and trackio get."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tiny import make_model
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerState, TrainingArguments

from gkd.training.callbacks import Completions, Progress, RunAway, to_wandb

FIGURES = {
    "on_policy/loss": 0.4,
    "on_policy/forward_kl": 0.391,
    "on_policy/agreement": 0.808,
    "teacher/forward_kl": 0.352,
    "teacher/agreement": 0.84,
    "tokens_per_second": 1812.4,
}
EVALUATION = {
    "eval_loss": 0.52,
    "eval_dataset/forward_kl": 0.51,
    "eval_dataset/reverse_kl": 0.61,
    "eval_on_policy/forward_kl": 0.71,
    "eval_on_policy/reverse_kl": 0.81,
}
NASTY = "[bold]a|b[/bold]\n<em>*c*</em> \x1b[2J `d`"


class Logging(Trainer):
    """Logs what GKDTrainer logs, and hands over completions as it does."""

    def __init__(self, *args, completions, **kwargs):
        super().__init__(*args, **kwargs)
        self.completions = completions

    def training_step(self, *args, **kwargs):
        self.completions.keep("on_policy", self.state.global_step, ["why?", "first"], ["because", NASTY])
        return super().training_step(*args, **kwargs)

    def log(self, logs, start_time=None):
        if "eval_loss" in logs:
            logs |= EVALUATION
        elif "loss" in logs or "train_loss" in logs:
            logs |= FIGURES
        super().log(logs, start_time)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's printed text, bar and events."""
    folder = tmp_path_factory.mktemp("run")
    row = {"input_ids": torch.arange(20, 30), "labels": torch.arange(20, 30)}
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        report_to=["tensorboard"],
        save_strategy="no",
        per_device_train_batch_size=1,
        use_cpu=True,
        disable_tqdm=False,
    )
    completions = Completions(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        patch.setenv("COLUMNS", "120")
        trainer = Logging(make_model(0), args, completions=completions, train_dataset=[row] * 8, eval_dataset=[row])
        trainer.remove_callback(ProgressCallback)
        progress = Progress()
        trainer.add_callback(progress)
        trainer.add_callback(completions)
        completions.handler = trainer.callback_handler
        with open(folder / "out", "w+") as out, open(folder / "err", "w+") as bar:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", bar)
            progress.show_phase("too early, and no harm done")
            trainer.train()
            trainer.evaluate()  # after training there is no bar, and nothing to write
            out.seek(0)
            bar.seek(0)
            printed, drawn = out.read(), bar.read()
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return SimpleNamespace(printed=printed, drawn=drawn, events=events)


def test_one_line_a_log(run):
    lines = [line for line in run.printed.splitlines() if line.startswith("step ")]
    training = "on-policy KL 0.391, agree 81% | teacher KL 0.352, agree 84% | 1,812 tok/s"
    assert [line.split(" | ", 2)[::2] for line in (lines[0], lines[1])] == [
        ["step 2/4", training],
        ["step 4/4", training],
    ]
    assert float(lines[0].split(" | ")[1].removeprefix("loss ")) > 0
    assert lines[2] == "step 4/4 | eval loss 0.52 | on-policy KL 0.71, reverse 0.81 | dataset KL 0.51, reverse 0.61"
    assert lines[3].startswith("step 4/4 | mean loss ")
    assert training in lines[3]
    assert len(lines) == 4
    assert "{" not in run.printed


def test_the_bar_shows_figures(run):
    assert "on-policy KL=0.391, teacher KL=0.352, tok/s=1,812" in run.drawn


def test_the_bar_names_the_phase():
    named = []
    progress = Progress()
    progress.training_bar = SimpleNamespace(set_description=named.append)
    progress.show_phase("generating (student)")
    assert named == ["generating (student)"]


def write_line(logs):
    written = []
    progress = Progress()
    progress.training_bar = SimpleNamespace(write=written.append)
    state = TrainerState(global_step=7, max_steps=9, is_world_process_zero=True)
    progress.on_log(None, state, None, logs=logs)
    return written


def test_evaluation_sets_by_name_and_logs_of_others():
    logs = {"eval_on_fr_loss": 0.5, "eval_on_fr_on_policy/forward_kl": 0.25, "eval_on_fr_on_policy/reverse_kl": 1.5}
    assert write_line(logs) == ["step 7/9 | eval on fr loss 0.5 | on-policy KL 0.25, reverse 1.5"]
    assert write_line({"eval_on_policy/forward_kl": 0.25}) == ["step 7/9 | on-policy KL 0.25"]
    assert write_line({"mine": 1.23456}) == ["{'mine': '1.235'}"]


def test_completions_are_printed_as_they_are(run):
    """Two logs of training, each with the two newest completions of a source; no markup, no escape sequences."""
    assert run.printed.count("because") == 2
    assert run.printed.count("[bold]a|b[/bold]") == 2
    assert "\x1b" not in run.printed
    assert "\\x1b[2J" in run.printed


def test_tensorboard_gets_scalars_by_source_and_the_table(run):
    assert [event.step for event in run.events.Scalars("train/on_policy/loss")][:2] == [2, 4]
    assert run.events.Scalars("train/on_policy/forward_kl")[0].value == pytest.approx(0.391)
    assert run.events.Scalars("eval/dataset/reverse_kl")[0].value == pytest.approx(0.61)
    tables = run.events.Tensors("completions/text_summary")
    assert [event.step for event in tables] == [2, 4]
    html = markdown_to_safe_html(tables[0].tensor_proto.string_val[0])  # as TensorBoard shows it
    assert html.count("<tr>") == 3
    assert html.count("<td>") == 8
    assert "<td>[bold]a|b[/bold]<br>&lt;em&gt;*c*&lt;/em&gt;" in html
    assert "`d`</td>" in html


class FakeTracker(ModuleType):
    """Stands for wandb and for trackio."""

    def __init__(self, name, error=None):
        super().__init__(name)
        self.run, self.error, self.calls, self.logged = object(), error, 0, []

    def Table(self, columns=None, data=None, dataframe=None):
        if dataframe is not None:
            return list(dataframe.columns), dataframe.values.tolist()
        return columns, data

    def log(self, values):
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.logged.append(values)


@pytest.fixture
def trackers(monkeypatch):
    fakes = {name: FakeTracker(name) for name in ("wandb", "trackio")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return fakes


def log(completions, step=3, report_to=("wandb", "trackio"), main=True, logs=None):
    args = SimpleNamespace(report_to=list(report_to))
    state = TrainerState(global_step=step, is_world_process_zero=main)
    completions.on_log(args, state, None, logs=logs or {"loss": 1.0})


def test_trackers_get_the_newest_of_each_source(trackers, capsys):
    completions = Completions(1)
    completions.keep("on_policy", 1, ["p1", "p2"], ["c1", "c2"])
    completions.keep("teacher", 2, ["p3"], ["c3" * 400])
    log(completions, logs={"eval_loss": 1.0})  # not a log of training
    assert capsys.readouterr().out == ""
    log(completions)
    rows = [[1, "on_policy", "p2", "c2"], [2, "teacher", "p3", "c3" * 400]]
    expected = {"completions": (["step", "source", "prompt", "completion"], rows), "train/global_step": 3}
    assert trackers["wandb"].logged == trackers["trackio"].logged == [expected]
    printed = capsys.readouterr().out
    assert "p1" not in printed
    assert "step 3" in printed
    assert "…" in printed
    assert printed.count("c3") < 200
    log(completions)  # nothing new
    assert len(trackers["wandb"].logged) == 1
    assert capsys.readouterr().out == ""


def test_the_table_does_not_tear_a_bar(capsys):
    completions = Completions(1)
    completions.keep("on_policy", 1, ["p"], ["c"])
    with tqdm(total=9, desc="training", file=sys.stdout):
        log(completions, report_to=[])
        printed = capsys.readouterr().out
    line, after = printed.split("step 3")
    assert "training" in line
    assert line.split("\r")[-1].strip() == ""  # the bar was taken away
    assert "training" in after  # and came back


def test_only_trackers_that_are_asked_for_and_run(trackers):
    completions = Completions(1)
    for report_to in ([], ["tensorboard"]):
        completions.keep("on_policy", 1, ["p"], ["c"])
        log(completions, report_to=report_to)
    completions.keep("on_policy", 1, ["p"], ["c"])
    log(completions, main=False)
    log(completions)  # the other processes forget theirs at each log, too
    trackers["wandb"].run = None
    to_wandb([(1, "on_policy", "p", "c")], 1)
    assert trackers["wandb"].calls == trackers["trackio"].calls == 0


def test_a_failing_tracker_is_left_out_after_one_warning(trackers, caplog):
    trackers["wandb"].error = RuntimeError("no space\nmore about it")
    completions = Completions(1)
    for step in (1, 2):
        completions.keep("on_policy", step, ["p"], ["c"])
        log(completions, step)
    assert trackers["wandb"].calls == 1
    assert len(trackers["trackio"].logged) == 2
    (record,) = caplog.records
    assert record.getMessage() == "wandb gets no more completions: RuntimeError: no space"


@pytest.mark.parametrize(
    ("cut", "warned"),
    [
        ([0.1] * 8 + [1.0, 1.0], None),  # two logs of few texts, maybe
        ([0.9, 0.9, 1.0] * 4, None),  # it never ended
        ([0.4] + [0.1] * 5 + [0.6] * 9, "up to step 10 the limit cuts off 60% of it, before 10%"),
    ],
)
def test_a_student_that_no_longer_ends_its_text_is_told_of_once(cut, warned, caplog):
    callback, state = RunAway(), TrainerState(is_world_process_zero=True)
    for step, share in enumerate(cut):
        state.global_step = step
        callback.on_log(None, state, None, logs={"loss": 1.0, "on_policy/truncated": share})
        callback.on_log(None, state, None, logs={"loss": 1.0})
    assert len(caplog.records) == (warned is not None)
    assert (warned or "") in caplog.text
