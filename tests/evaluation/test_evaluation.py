"""eval_gkd.py and the evaluation inside training: the same figures, equal to float64, on any number of ranks."""

import json
import math
import shutil
from unittest.mock import patch

import pytest
import torch
from commands import BETA, HELD_OUT, LENGTH, NEW, flags, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from preloaded import run_ranks
from tiny import REPO, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

import eval_gkd
import train_gkd
from gkd.config.evaluation import EvalArguments
from gkd.data.encoding import RowEncoder
from gkd.evaluation import evaluator as evaluation
from gkd.evaluation.bootstrap import changes, summarize_records
from gkd.evaluation.evaluator import repetition
from gkd.metrics.tasks import TaskMetrics
from gkd.runs.results import comparable, read_results, records_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(saved, data, tmp_path_factory):
    """A LoRA run on two ranks, evaluated before, at each step and after."""
    out = tmp_path_factory.mktemp("runs") / "run"
    more = (
        "--use_peft",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        1,
        "--save_steps",
        1,
        "--lmbda",
        0.5,
        "--seq_kd",
        "True",
    )
    done = run_ranks([REPO / "train_gkd.py", *flags(saved, data, out, *more, "--metrics", "exact_match", "chrf")], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def values(folder):
    return {r["model"]: {name: e["value"] for name, e in r["metrics"].items()} for r in read_results(folder)}


@torch.no_grad()
def reference(student, teacher):
    """The figures in float64, a row at a time, without padding, cache or chunks."""
    student, teacher = student.double().eval(), teacher.double().eval()
    encode = RowEncoder(make_tokenizer(), LENGTH, NEW, "last_turn", [1, 2])

    def answer(model, prompt):
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": [1, 2], "pad_token_id": 0}
        return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()

    found: dict[str, dict[str, list[float]]] = {}
    lengths, cut = [], []
    for row in HELD_OUT:
        encoded = encode(row)
        prompt, given = encoded["prompt_ids"], encoded["input_ids"][len(encoded["prompt_ids"]) :]
        own = answer(student, prompt)
        lengths.append(len(own))
        cut.append(not {1, 2} & set(own))
        for label, text in (("dataset" if given else "teacher", given or answer(teacher, prompt)), ("on_policy", own)):
            ids = torch.tensor([prompt + text])
            scored = slice(len(prompt) - 1, ids.shape[1] - 1)
            s, t = (torch.log_softmax(model(ids).logits[0, scored], -1) for model in (student, teacher))  # (T, V)
            m = torch.logsumexp(torch.stack([s + math.log(1 - BETA), t + math.log(BETA)]), 0)
            target = torch.tensor(text)[:, None]
            per_token = {
                "loss": BETA * (t.exp() * (t - m)).sum(-1) + (1 - BETA) * (s.exp() * (s - m)).sum(-1),
                "forward_kl": (t.exp() * (t - s)).sum(-1),
                "reverse_kl": (s.exp() * (s - t)).sum(-1),
                "student_entropy": -(s.exp() * s).sum(-1),
                "teacher_entropy": -(t.exp() * t).sum(-1),
                "agreement": (s.argmax(-1) == t.argmax(-1)).double(),
                "top5_agreement": torch.tensor(
                    [
                        len(set(a.tolist()) & set(b.tolist())) / 5
                        for a, b in zip(s.topk(5)[1], t.topk(5)[1], strict=True)
                    ]
                ),
                "student_perplexity": -s.gather(1, target)[:, 0],
                "teacher_perplexity": -t.gather(1, target)[:, 0],
            }
            for name, tokens in per_token.items():
                found.setdefault(label, {}).setdefault(name, []).extend(tokens.tolist())
    expected = {f"{label}/{name}": sum(v) / len(v) for label, names in found.items() for name, v in names.items()}
    expected = {name: math.exp(v) if name.endswith("perplexity") else v for name, v in expected.items()}
    return expected | {
        "on_policy/completion_length": sum(lengths) / len(lengths),
        "on_policy/truncated": sum(cut) / len(cut),
    }


def test_figures_equal_float64(saved, run):
    """Of the student before and after, as two ranks found them while training."""
    teacher = AutoModelForCausalLM.from_pretrained(saved / "teacher")
    found = values(run)
    for label in ("before", "after"):
        student = AutoModelForCausalLM.from_pretrained(saved / "student")
        if label == "after":
            student = PeftModel.from_pretrained(student, run)
        expected = reference(student, teacher)
        assert {"dataset/forward_kl", "teacher/forward_kl", "on_policy/reverse_kl"} <= expected.keys()
        for name, value in expected.items():
            assert found[label][name] == pytest.approx(value, rel=2e-5, abs=1e-6), (label, name)
    assert found["before"] != found["after"]


def test_one_rank_and_eval_gkd_find_what_two_ranks_found(run, tmp_path):
    eval_gkd.main([str(run), "--checkpoints", "--output_dir", str(tmp_path)])
    mine, theirs = values(tmp_path), values(run)
    assert mine.keys() == theirs.keys() == {"before", "step 1", "step 2", "after", "teacher"}
    for label in mine:
        assert mine[label] == pytest.approx(theirs[label], rel=1e-6), label
    assert len({mine[label]["on_policy/loss"] for label in ("before", "step 1", "step 2")}) == 3
    assert "Over the steps" in (tmp_path / "report.html").read_text()


def test_sampling_is_the_same_on_two_ranks(run, tmp_path):
    arguments = [str(run), "--eval_temperature", "1.0"]
    eval_gkd.main([*arguments, "--output_dir", str(tmp_path / "one")])
    done = run_ranks([REPO / "eval_gkd.py", *arguments, "--output_dir", tmp_path / "two"], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = values(tmp_path / "one"), values(tmp_path / "two")
    assert one == {label: pytest.approx(figures, rel=1e-5) for label, figures in two.items()}
    assert one["before"]["on_policy/loss"] != pytest.approx(values(run)["before"]["on_policy/loss"], rel=1e-3), (
        "greedy"
    )


def test_adapter_and_merged_model_agree(saved, data, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "student"), config)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    models = ("--models", tmp_path / "adapter", tmp_path / "merged", saved / "student")
    rest = ("--teacher_model_name_or_path", saved / "teacher", "--dataset_name", data / "held_out.json")
    eval_gkd.main([str(word) for word in (*models, *rest, "--output_dir", tmp_path / "out", "--max_new_tokens", NEW)])
    found = values(tmp_path / "out")
    assert found["adapter"] == pytest.approx(found["merged"], rel=1e-4)
    assert found["adapter"]["dataset/forward_kl"] != pytest.approx(found["student"]["dataset/forward_kl"], rel=1e-2)


def test_a_killed_evaluation_goes_on(run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    expected = values(out)
    (entry,) = (r for r in read_results(out) if r["model"] == "after")
    records = out / "evaluation/rows" / entry["records"]
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third
    written = []
    real = evaluation.Evaluation.measure

    def batch(self, rows, candidate):
        written.extend((candidate.label, row) for row in rows)
        return real(self, rows, candidate)

    monkeypatch.setattr(evaluation.Evaluation, "measure", batch)
    eval_gkd.main([str(out)])
    # Training had an adapter in the student before it too, so that one is not known here.
    assert sorted(row for label, row in written if label != "before") == [2, 3, 4]
    assert values(out) == {label: pytest.approx(figures, rel=1e-6) for label, figures in expected.items()}
    assert [json.loads(line)["row"] for line in records.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_another_metric_needs_no_other_text(run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    eval_gkd.main([str(out)])
    monkeypatch.setattr(evaluation.Evaluation, "measure", lambda *a: pytest.fail("text was written again"))
    eval_gkd.main([str(out), "--metrics", "rouge"])
    assert {name for name in values(out)["after"] if name.startswith("score/")} == {"score/rouge"}


def test_scorer_that_raises_on_one_row(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_scorers.py").write_text(
        "def length(completion, row):\n"
        "    if 'hello' in str(row):\n"
        "        raise KeyError('no such thing')\n"
        "    return len(completion)\n"
    )
    monkeypatch.chdir(tmp_path)
    eval_gkd.main([str(run), "--scorer", "own_scorers:length", "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    print(said)
    assert "warning: after: length raised on 1 row, first row 2: KeyError: 'no such thing'" in said
    records = [json.loads(line) for line in next((tmp_path / "out/evaluation/rows").iterdir()).open()]
    assert [record["scores"]["length"] is None for record in records] == [False, False, True, False, False]
    lengths = [len(record["text"]) for record in records if record["row"] != 2]
    (name,) = {
        r["model"]
        for r in read_results(tmp_path / "out")
        if r["records"] == next((tmp_path / "out/evaluation/rows").iterdir()).name
    }
    assert values(tmp_path / "out")[name]["score/length"] == pytest.approx(sum(lengths) / 4)


def test_what_belongs_to_another_teacher_or_data_is_not_taken_over(run, saved):
    own = EvalArguments(run=str(run))
    own.trained |= {"teacher_adapter": "somewhere", "dataset_config": "en", "eval_temperature": 0.7}
    record = {"arguments": own.trained}
    with patch("gkd.config.evaluation.read_record", lambda folder: record):
        same = EvalArguments(run=str(run))
        assert (same.teacher_adapter, same.eval_temperature) == ("somewhere", 0.7)
        other = EvalArguments(
            run=str(run), teacher_model_name_or_path=str(saved / "teacher"), dataset_name="rows.json"
        )
        assert (other.teacher_adapter, other.teacher_revision, other.dataset_config) == (None, "main", None)
    given = EvalArguments(run=str(run), chat_template_kwargs='{"thinking": false}')
    assert given.chat_template_kwargs == {"thinking": False}


def test_figures_are_compared_where_they_can_be(run, tmp_path):
    """With other rows under the same name, an earlier `before` is no measure of the new `after`."""
    out, rows = tmp_path / "out", tmp_path / "rows.json"
    for part in (HELD_OUT, HELD_OUT[:3]):
        rows.write_text(json.dumps(part))
        eval_gkd.main([str(run), "--dataset_name", str(rows), "--output_dir", str(out)])
    (after,) = (r for r in read_results(out) if r["model"] == "after")
    assert after["rows"] == 3
    assert after["change"].keys() == after["metrics"].keys() - {"score/chrf"}
    assert len(records_of(out, "before", str(rows), after["settings"])) == 3
    assert records_of(out, "before", str(rows), "other settings") == []
    eval_gkd.main(
        [str(run), "--dataset_name", str(rows), "--output_dir", str(out), "--models", str(run / "checkpoint-1")]
    )
    eval_gkd.main([str(run), "--dataset_name", str(rows), "--output_dir", str(out), "--max_new_tokens", "5"])
    shown = comparable(read_results(out), str(rows))  # the checkpoint was measured on longer texts
    assert [r["model"] for r in shown] == ["teacher", "before", "after"]


BAD = {
    "no checkpoints": (["{run}", "--checkpoints"], "holds no checkpoints (--save_strategy no?)"),
    "nothing saved": (["{run}"], "holds neither a trained model nor a checkpoint"),
    "no folder": (["{tmp}/nowhere"], "nowhere: no such folder."),
    "no run": (["{tmp}/other"], "no run.json, so this is not the folder of a train_gkd.py run"),
    "empty file": (["{good}", "--dataset_name", "{tmp}/empty.json"], "empty.json holds no rows"),
    "no file": (["{good}", "--dataset_name", "{tmp}/none.json"], "none.json: no such file or folder"),
    "other tokenizer": (["{good}", "--teacher_model_name_or_path", "{tmp}/other"], "The tokenizers differ: id 262"),
    "no teacher": (["{good}", "--teacher_model_name_or_path", "{tmp}/none"], "none: no such folder."),
    "no model": (["{good}", "--models", "{tmp}/none"], "none: no such folder."),
    "unknown metric": (["{good}", "--metrics", "blue"], "--metrics blue: not known; choose from"),
    "no scorer": (["{good}", "--scorer", "nothing:score"], "nothing can't be imported"),
    "no room": (["{good}", "--max_new_tokens", "120"], "leaves no room for a prompt in --max_length 120"),
    "broken JSON": (["{good}", "--chat_template_kwargs", "{{"], "--chat_template_kwargs is not JSON"),
    "unknown turns": (["{good}", "--train_on", "lastturn"], "invalid choice: 'lastturn'"),
    "twice": (["{good}", "--models", "{good}", "{good}"], "a model twice"),
    "nothing to do": (["--dataset_name", "x.json"], "--teacher_model_name_or_path is required without a RUN"),
    "β": (["{good}", "--beta", "2"], "--beta must lie in [0, 1], not 2.0"),
    "α": (
        ["{good}", "--divergence", "skew_kl", "--skew_alpha", "1"],
        "--skew_alpha must lie between 0 and 1, not 1.0",
    ),
    "β of another": (["{good}", "--divergence", "tv", "--beta", "0.5"], "--beta does not apply to --divergence tv"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(saved, run, tmp_path, capsys, monkeypatch, arguments, message):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "adapter_*"))
    if "--checkpoints" in arguments:
        shutil.copy(run / "adapter_model.safetensors", tmp_path / "run")
    (tmp_path / "empty.json").write_text("[]")
    make_model(1).save_pretrained(tmp_path / "other")
    make_tokenizer(extra=("extra",)).save_pretrained(tmp_path / "other")
    monkeypatch.setattr("gkd.models.loading.load_teacher", lambda *a: pytest.fail("a model was loaded"))
    places = {"run": tmp_path / "run", "good": run, "tmp": tmp_path}
    with pytest.raises(SystemExit) as stop:
        eval_gkd.main([word.format(**places) for word in arguments])
    said = f"{stop.value} {capsys.readouterr().err}"
    assert stop.value.code != 0
    assert message in said


def test_best_checkpoint_by_a_figure_of_ours(saved, data, tmp_path):
    """The learning rate ruins the student with each step, so the first checkpoint is the best one."""
    more = ("--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--lmbda", 0, "--learning_rate", 0.5)
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "eval_on_policy/forward_kl")
    train_gkd.main(flags(saved, data, tmp_path, *more, *best))
    steps = {
        r["step"]: r["metrics"]["on_policy/forward_kl"]["value"]
        for r in read_results(tmp_path)
        if r["model"].startswith("step")
    }
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_metric"] == min(steps.values()) < max(steps.values())
    kept = min(steps, key=steps.get)
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{kept}")
    best, final = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / f"checkpoint-{kept}", tmp_path)
    )
    assert torch.equal(best.lm_head.weight, final.lm_head.weight)
    assert values(tmp_path)["after"] == pytest.approx(values(tmp_path)[f"step {kept}"], rel=1e-6)


def record(row, tokens, kl, score):
    sums = {"tokens": float(tokens), "forward_kl": kl * tokens}
    return {"row": row, "text": "", "tokens": [9] * tokens, "truncated": False, "repetition": 0.0, "reference": None,
            "scores": {"right": score}, "own": sums, "given": sums | {"by": "dataset"}}  # fmt: skip


def test_averages_and_intervals():
    records = [record(i, 2 + i % 3, 0.5 + i / 100, i % 2) for i in range(50)]
    found = summarize_records(records, TaskMetrics([]))
    tokens = sum(2 + i % 3 for i in range(50))
    expected = sum((0.5 + i / 100) * (2 + i % 3) for i in range(50)) / tokens
    assert found["dataset/forward_kl"]["value"] == pytest.approx(expected)
    # Of a mean of 50 coin flips: half the width is about 1.96 · 0.5 / √50 = 0.139.
    right = found["score/right"]
    assert right["value"] == 0.5
    assert right["high"] - right["low"] == pytest.approx(2 * 0.139, abs=0.03)
    shifted = [record(i, 2 + i % 3, 0.4 + i / 100, i % 2) for i in range(50)]
    change = changes(records, shifted)["dataset/forward_kl"]
    assert [change[key] for key in ("value", "low", "high")] == pytest.approx([-0.1] * 3)  # pairs have no spread
    missing = [record(0, 2, 1.0, None), record(1, 2, 1.0, 1.0)]
    assert summarize_records(missing, TaskMetrics([]))["score/right"]["value"] == 1.0


def test_repetition():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(1 - 2 / 5)
    assert repetition([1, 2]) == 0.0


def test_record_of_a_run_holds_no_secret(saved, data, tmp_path):
    train_gkd.main(
        flags(
            saved,
            data,
            tmp_path,
            "--hub_token",
            "hf_secret",
            "--no_gradient_checkpointing",
            "--max_steps",
            1,
            "--lmbda",
            0,
        )
    )
    text = (tmp_path / "run.json").read_text()
    assert "hf_secret" not in text + (tmp_path / "report.html").read_text()
    record = json.loads(text)
    assert record["arguments"]["beta"] == BETA
    assert {"beta", "gradient_checkpointing"} <= set(record["changed"])
    assert "eval_on_start" not in record["changed"]
    assert record["data"]["held out"]["rows"] == 5
    assert record["data"]["held out"]["answered"] == 4
