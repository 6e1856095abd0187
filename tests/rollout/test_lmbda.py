"""λ: on a schedule, and by what a second of each kind of step gains on held-out rows (`--lmbda auto`)."""

import json

import numpy as np
import pytest
from commands import flags
from tiny import ROWS, make_model
from trainers import TWELVE_ROWS, tiny_trainer, weights

import train_gkd
from gkd.config.training import GKDArguments
from gkd.data.batch import Source
from gkd.rollout.lmbda import AutoLambda, Schedule
from gkd.rollout.steps import draw_source


def arguments(tmp_path, **flags):
    return GKDArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **flags)


SCHEDULES = {
    "linear": ({"lmbda": 0.8}, [0, 0.2, 0.4, 0.6, 0.8]),
    "linear, then constant": ({"lmbda": 0.8, "lmbda_steps": 3}, [0, 0.4, 0.8, 0.8, 0.8]),
    "linear over a share": ({"lmbda": 1.0, "lmbda_steps": 0.6}, [0, 0.5, 1, 1, 1]),
    "step": ({"lmbda": 0.5, "lmbda_schedule": "step", "lmbda_steps": 2}, [0, 0, 0.5, 0.5, 0.5]),
    "step after a share": ({"lmbda": 1.0, "lmbda_schedule": "step", "lmbda_steps": 0.5}, [0, 0, 0, 1, 1]),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules(tmp_path, case):
    options, expected = SCHEDULES[case]
    schedule = Schedule(arguments(tmp_path, **{"lmbda_schedule": "linear"} | options))
    assert [schedule.value(step, 5) for step in range(5)] == pytest.approx(expected, abs=1e-12)


def test_a_scheduled_run_draws_and_logs_it(tmp_path):
    steps = {"lmbda": 1.0, "lmbda_schedule": "step", "lmbda_steps": 0.5, "max_steps": 4}
    trainer = tiny_trainer(tmp_path, make_model(0), make_model(1), TWELVE_ROWS, **steps)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["lmbda"] for log in logs] == [0, 0, 1, 1]
    assert ["on_policy/loss" in log for log in logs] == [False, False, True, True]


REFUSED = {
    "not a number": (["--lmbda", "sometimes"], "--lmbda: invalid number or auto value: 'sometimes'"),
    "auto, no held-out rows": (["--lmbda", "auto"], "--lmbda auto measures the student on held-out rows: name some"),
    "auto, too short": (["--lmbda", "auto", "--max_steps", 144], "at step 144, and the run has 144"),
    "auto, no room": (["--lmbda", "auto", "--steps_per_generation", 30], "has no room for a probe, of 30 steps"),
    "auto, on a schedule": (["--lmbda", "auto", "--lmbda_schedule", "linear"], "must be a number above 0"),
    "grows to 0": (["--lmbda", 0, "--lmbda_schedule", "linear"], "must be a number above 0"),
    "no step": (["--lmbda_schedule", "step"], "--lmbda_schedule step needs --lmbda_steps"),
    "no schedule": (["--lmbda_steps", 5], "--lmbda_steps has no effect"),
    "half a step": (["--lmbda_schedule", "step", "--lmbda_steps", 2.5], "it is a whole number of steps"),
    "unknown length": (["--lmbda_schedule", "linear", "--dataset_streaming", "True"], "a stream has no length"),
    "guards nothing": (["--lmbda", 0, "--rollout_guard", "on"], "which --lmbda 0 never trains on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_work_is_refused_before_a_model_loads(tmp_path, case, capsys):
    words, message = REFUSED[case]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    base = ["--model_name_or_path", "no/student", "--teacher_model_name_or_path", "no/teacher", "--dataset_name"]
    with pytest.raises(SystemExit) as stop:
        train_gkd.main([*base, str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out"), *map(str, words)])
    assert message in f"{stop.value} {capsys.readouterr().err}"


class Rows:
    """Held-out rows whose divergence falls with each step: `falls` gives how far, by kind and step."""

    identity = "rows"

    def __init__(self, falls, rows=8):
        self.falls, self.steps, self.fallen, self.rows = falls, 0, 0.0, rows

    def __call__(self):
        noise = np.random.default_rng(self.steps).normal(0, 1e-3, self.rows)
        return (3.0 - self.fallen * np.linspace(0.8, 1.2, self.rows) + noise).tolist()

    def step(self, source):
        self.fallen += self.falls[source](self.steps)
        self.steps += 1


def run(args, falls, steps=200, cost=2.7, resume_at=()):
    """The source of each step as a letter, and the figures; at steps of `resume_at` a new object goes on from the state."""
    now, probe = [0.0], Rows(falls)
    lmbda, sources = AutoLambda(args, Source.DATASET, probe, lambda: now[0]), ""
    for step in range(steps):
        if step in resume_at:
            state = json.loads(json.dumps(lmbda.state()))
            lmbda = AutoLambda(args, Source.DATASET, probe, lambda: now[0])
            lmbda.load(state)
        lmbda.begin(step)
        assert lmbda.known_until(step) > step
        value = lmbda.value(step, steps)
        assert value in (0.0, 0.5, 1.0)  # 0.5 is every second step here
        on_policy = value == 1 or (value == 0.5 and step % 2)
        source = Source.ON_POLICY if on_policy else Source.DATASET
        now[0] += cost if on_policy else 1.0
        probe.step(source)
        lmbda.end(source)
        sources += "sho"[int(2 * value)]
    return sources, lmbda.figures(steps - 1, steps), lmbda


def falls(supervised, on_policy):
    return {Source.DATASET: supervised, Source.ON_POLICY: on_policy}


def constant(value):
    return lambda step: value


def test_supervised_while_a_second_of_it_gains_more(tmp_path):
    args = arguments(tmp_path, lmbda="auto", lmbda_probe_steps=20)
    cases = {0.01: False, 0.02: False, 0.04: True}  # a step costs 2.7 times
    for fall, wins in cases.items():
        sources, figures, _ = run(args, falls(constant(0.01), constant(fall)))
        assert sources[:58] == ("s" * 18 + "oo") * 2 + "s" * 18
        assert set(sources[58:]) == ({"h"} if wins else {"s", "o"}), fall
        assert figures["lmbda"] == wins / 2
        assert figures.get("lmbda_since", 0) == 58 * wins
        assert figures["lmbda_gain_supervised"] == pytest.approx(0.01, rel=0.1)
        assert figures["lmbda_gain_on_policy"] == pytest.approx(fall / 2.7, rel=0.1)
        assert figures["lmbda_cost_ratio"] == pytest.approx(2.7)


def test_on_policy_once_given_text_has_no_more_to_teach(tmp_path):
    args = arguments(tmp_path, lmbda="auto", lmbda_probe_steps=20)
    dries_up = falls(lambda step: 0.01 if step < 100 else 0.0, constant(0.01))
    _, figures, _ = run(args, dries_up)
    assert 100 < figures["lmbda_since"] <= 178


def test_probes_are_put_off_while_given_text_is_clearly_ahead(tmp_path):
    args = arguments(tmp_path, lmbda="auto", lmbda_probe_steps=20)
    ahead = falls(constant(0.01), constant(0.01))
    sources, figures, _ = run(args, ahead, steps=800)
    probes = [number + 1 for number in range(40) if sources[20 * number : 20 * number + 20].endswith("oo")]
    assert probes == [1, 2, 5, 6, 11, 12, 21, 22, 39, 40]
    assert figures["lmbda_probes"] == 10
    assert sources.count("o") == 20
    for resume_at in (range(800), (58, 80, 138)):
        assert run(args, ahead, steps=800, resume_at=resume_at)[:2] == (sources, figures)
    dries_up = falls(lambda step: 0.01 if step < 150 else 0.0, constant(0.01))
    assert 150 < run(args, dries_up, steps=800)[1]["lmbda_since"] <= 258


def test_on_policy_once_nothing_is_gained_on_given_text_unless_it_is_worse(tmp_path):
    args = arguments(tmp_path, lmbda="auto", lmbda_probe_steps=20)
    dries_up = lambda step: 0.01 if step < 100 else 0.0  # noqa: E731
    _, figures, _ = run(args, falls(dries_up, dries_up), steps=400)
    assert 100 < figures["lmbda_since"] < 400
    _, figures, _ = run(args, falls(dries_up, constant(-0.01)), steps=400)
    assert figures["lmbda"] == 0


def test_a_difference_within_the_noise_does_not_decide(tmp_path):
    """A tenth more than supervised, but of single probes that differ as much from each other as they are large."""
    args = arguments(tmp_path, lmbda="auto", lmbda_probe_steps=20)
    swings = falls(constant(0.01), lambda step: 2.7 * (0.011 + (0.05 if step // 20 % 2 else -0.05)))
    _, figures, _ = run(args, swings)
    assert figures["lmbda"] == 0
    assert figures["lmbda_gain_on_policy"] > figures["lmbda_gain_supervised"]
    assert figures["lmbda_gain_error"] > 0.02


def test_a_state_goes_on_at_any_step(tmp_path):
    args = arguments(tmp_path, lmbda="auto", lmbda_probe_steps=20)
    dries_up = falls(lambda step: 0.01 if step < 60 else 0.0, constant(0.01))
    sources, figures, _ = run(args, dries_up)
    assert figures["lmbda"] == 0.5
    for resume_at in (range(200), (18, 19, 58), (20, 97)):
        assert run(args, dries_up, resume_at=resume_at)[:2] == (sources, figures)


def test_seconds_are_taken_once_and_without_the_first_step(tmp_path):
    args = arguments(tmp_path, lmbda="auto", lmbda_probe_steps=20)
    now, probe = [0.0], Rows(falls(constant(0.01), constant(0.01)))
    lmbda = AutoLambda(args, Source.DATASET, probe, lambda: now[0])
    for step in range(39):
        lmbda.begin(step)
        on_policy = lmbda.value(step, 100) == 1
        now[0] += 100 if step in (0, 18) else 3 if on_policy else 1 if step % 5 else 7
        lmbda.end(Source.ON_POLICY if on_policy else Source.DATASET)
        now[0] += 1000  # a checkpoint
    assert lmbda.state()["costs"] == [1.0, 3.0]
    assert lmbda.state()["seconds"] == {"supervised": [], "on_policy": []}


HELD_OUT = [{"prompt": [{"role": "user", "content": f"{n} and {n}?"}]} for n in range(64)]


def auto_run(folder, checkpoint=None, **options):
    """A run on tiny models whose clock says that on-policy steps cost next to nothing; its sources and its trainer."""
    options = {"lmbda": "auto", "lmbda_probe_steps": 6, "max_steps": 26, "seq_kd": True} | options
    options |= {"learning_rate": 5e-3, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 5}
    options["per_device_eval_batch_size"] = 32
    trainer = tiny_trainer(folder, make_model(0), make_model(1), TWELVE_ROWS, HELD_OUT, **options)
    now, sources, take = [0], {}, trainer.get_batch_samples

    def clock():
        now[0] += 1 if trainer.step.source is Source.ON_POLICY else 1000
        return now[0]

    trainer.rollout.lmbda.clock = clock

    def watched(*args):
        result = take(*args)
        sources[trainer.state.global_step] = trainer.step.source.label
        return result

    trainer.get_batch_samples = watched
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return sources, trainer


@pytest.mark.parametrize("block", [1, 2])
def test_a_resumed_run_repeats_what_it_decided(tmp_path, block):
    options = {"steps_per_generation": block}
    sources, trainer = auto_run(tmp_path / "whole", **options)
    first = 18 - block  # step at which it may decide
    assert list(sources.values())[:first] == (["teacher"] * (6 - block) + ["on_policy"] * block) * 2 + ["teacher"] * (
        6 - block
    )
    draws = {step: draw_source(trainer.args.seed, step, 0.5, seq_kd=True).label for step in range(first, 26)}
    assert {step: source for step, source in sources.items() if step >= first} == draws
    assert set(draws.values()) == {"on_policy", "teacher"}
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    step = 10 if block == 1 else 5  # between two probes, or within one
    again, resumed = auto_run(tmp_path / "resumed", tmp_path / f"whole/checkpoint-{step}", **options)
    assert again == {n: source for n, source in sources.items() if n >= step}
    for log in resumed.state.log_history[step:-1]:
        same = [name for name in log if name.startswith("lmbda") or name.endswith(("loss", "kl"))]
        assert {name: log[name] for name in same} == {name: logs[log["step"]][name] for name in same}
    for name, weight in weights(resumed).items():
        assert weight.equal(weights(trainer)[name]), name


def test_damaged_and_changed_states(tmp_path):
    auto_run(tmp_path / "whole")
    state = tmp_path / "whole/checkpoint-5/rollout.json"
    content = json.loads(state.read_text())
    assert content["lmbda"]["measured"].keys() == {"0"}
    content["lmbda"]["measured"] = []
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="rollout.json is damaged"):
        auto_run(tmp_path / "again", tmp_path / "whole/checkpoint-5")
    # It had decided: other probes change nothing.
    _, trainer = auto_run(tmp_path / "other", tmp_path / "whole/checkpoint-20", lmbda_probe_steps=5, max_steps=21)
    assert trainer.state.log_history[-1]["lmbda_since"] == 17


def test_by_the_command(saved, tmp_path, capsys):
    (tmp_path / "train.json").write_text(json.dumps(TWELVE_ROWS))
    (tmp_path / "held_out.json").write_text(json.dumps(TWELVE_ROWS[:4]))
    words = flags(saved, tmp_path, tmp_path / "run", "--lmbda", "auto", "--lmbda_probe_steps", 3, "--max_steps", 9)
    train_gkd.main(words)
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    last = [log for log in state["log_history"] if "lmbda_cost_ratio" in log][-1]
    assert last["lmbda"] in (0, 1)
    assert last["lmbda_cost_ratio"] > 0
    assert json.loads((tmp_path / "run/run.json").read_text())["arguments"]["lmbda"] == "auto"
    assert "| `--lmbda` | auto |" in (tmp_path / "run/report.md").read_text()
