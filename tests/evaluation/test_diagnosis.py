"""`gkd diagnose`: errors and rescues held to models run row by row, and the advice to figures."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from commands import LENGTH, NEW, write_rows
from crossed import CORPUS, byte_level, permuted
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from gkd.cli.diagnose import main
from gkd.data.encoding import RowEncoder
from gkd.evaluation.advice import advice
from gkd.evaluation.diagnosis import by_position, error_level, errors, first_error, wilson
from gkd.losses.objective import EvaluationStatistics

FIELDS = EvaluationStatistics._fields


def answer(surprises, **constant):
    """The statistics (9, T) of an answer whose tokens surprise the teacher so much, at an entropy of 1 nat."""
    row = np.zeros((len(FIELDS), len(surprises)))
    row[FIELDS.index("teacher_nll")] = 1 + np.array(surprises)
    row[FIELDS.index("teacher_entropy")] = 1
    for name, value in constant.items():
        row[FIELDS.index(name)] = value
    return row


def test_the_first_error_is_above_what_surprises_the_teacher_in_its_own_text():
    calm = [answer([0.5, -0.5])] * 4
    assert error_level(calm) == 3.0
    assert error_level([*calm, answer([9.0])] * 2) == 3.0  # one answer in five
    assert error_level([answer([s]) for s in (1, 2, 4, 6, 8)]) == pytest.approx(6.4)
    assert first_error(np.array([0, 2.9, 3.1, 5]), 3.0) == 2
    assert first_error(np.array([0, 2.9]), 3.0) is None


def test_errors_and_what_follows_them():
    own = [answer([0.25, 4.0, 0.0, 0.5]), answer([-0.25, -0.25, 5.0, 2.0, 2.0]), answer([0.0, 1.0]), answer([6.0])]
    found = errors(own, [answer([0.0])])
    assert found["answers"] == wilson(3, 4)
    assert found["position"] == 2  # of 2, 3 and 1, counted from 1
    assert found["surprise_before"] == pytest.approx((0.25 - 0.25 - 0.25) / 3)
    assert found["surprise_at"] == pytest.approx(5.0)
    assert found["surprise_behind"] == pytest.approx((0.25 + 2.0) / 2)  # nothing stands behind the last
    assert found["falls_back"] == wilson(1, 2)
    nothing = errors([answer([0.0])], [answer([0.0])])
    assert nothing["position"] is None
    assert nothing["falls_back"]["value"] is None


def test_averages_by_position():
    row = answer(range(40), loss=0.5)
    row[FIELDS.index("forward_kl")] = range(40)
    spans = by_position([row, row[:, :4], row[:, :0]])
    assert [(s["from"], s["to"], s["tokens"]) for s in spans] == [(1, 8, 12), (9, 32, 24), (33, 128, 8)]
    assert spans[0]["forward_kl"] == pytest.approx((28 + 6) / 12)
    assert spans[1]["forward_kl"] == pytest.approx(19.5)
    assert {span["total_variation"] for span in spans} == {0.5}


@pytest.mark.parametrize(("successes", "trials"), [(5, 10), (0, 7), (7, 7), (31, 64)])
def test_the_interval_of_a_share(successes, trials):
    share = wilson(successes, trials)
    for bound in (share["low"], share["high"]):  # the shares from which the measured one is 1.96 deviations away
        away = abs(bound - share["value"])
        assert away == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / trials), abs=1e-12)
    assert share["low"] <= share["value"] <= share["high"]


def solved(completion: str, row: dict) -> bool:
    """A verifier that some answers of random models pass, and some not."""
    return sum(map(ord, completion)) % 3 == 0


@pytest.fixture(scope="module")
def diagnosed(saved, tmp_path_factory):
    folder = write_rows(tmp_path_factory.mktemp("data"))
    rows = json.loads((folder / "held_out.json").read_text()) * 4
    for i, row in enumerate(rows):
        messages = row.get("messages") or row["prompt"]
        rows[i] = {"prompt": [{"role": "user", "content": f"{messages[0]['content']} {i}"}]}
    (folder / "rows.json").write_text(json.dumps(rows))
    out = folder / "out"
    words = [saved / "student", saved / "teacher", folder / "rows.json", "--output_dir", out, "--scorer"]
    words += ["test_diagnosis:solved", "--max_new_tokens", NEW, "--max_length", LENGTH, "--eval_temperature", 0]
    main([str(word) for word in [*words, "--per_device_eval_batch_size", 3]])
    cases = [json.loads(line) for line in (out / "rescues.jsonl").read_text().splitlines()]
    return rows, json.loads((out / "diagnosis.json").read_text()), cases


def test_with_another_tokenizer_that_writes_alike_nothing_changes(tmp_path):
    """Ids in another order: the same figures, errors, rescues and advice."""
    tokenizer, teacher = make_tokenizer(), make_model(1, vocab_size=262)
    other, moved = permuted(tokenizer, 3, teacher)
    models = {
        "student": (make_model(0, vocab_size=262), tokenizer),
        "same": (teacher, tokenizer),
        "other": (moved, other),
    }
    for name, parts in models.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    rows = [{"prompt": [{"role": "user", "content": f"question {i}"}]} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = []
    for name, flags in (("same", ()), ("other", ("--cross_tokenizer", "shared"))):
        out = tmp_path / f"out_{name}"
        words = [tmp_path / "student", tmp_path / name, tmp_path / "rows.json", "--output_dir", out, *flags]
        words += ["--scorer", "test_diagnosis:solved", "--max_new_tokens", NEW, "--eval_temperature", 0]
        main([str(word) for word in words])
        cases = [json.loads(line) for line in (out / "rescues.jsonl").read_text().splitlines()]
        found.append((json.loads((out / "diagnosis.json").read_text()), cases))
    (same, rescues), (crossed, others) = found
    assert rescues
    assert others == rescues
    for name in ("errors", "positions"):
        numbers = ([value for _, value in sorted(flat(diagnosis[name]).items())] for diagnosis in (same, crossed))
        assert next(numbers) == pytest.approx(next(numbers), abs=1e-5)
    assert crossed["rescue"] == same["rescue"]
    assert [piece["say"] for piece in crossed["advice"]] == [piece["say"] for piece in same["advice"]]


def flat(value, name=""):
    """The leaves of JSON, by their path."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        return {name: value}
    return {path: leaf for key, part in parts for path, leaf in flat(part, f"{name}.{key}").items()}


def test_a_text_costs_a_teacher_with_other_tokens_what_its_own_forward_says(tmp_path):
    """And it continues answers whose beginnings are in the student's tokens."""
    ours, theirs = byte_level(340), byte_level(380, corpus=CORPUS[::3])
    texts = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(CORPUS[20:30], CORPUS, strict=False)
    ]
    rows = [{"messages": text} for text in texts]
    for name, model, tokenizer in (("student", 0, ours), ("teacher", 1, theirs)):
        make_model(model, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [tmp_path / "student", tmp_path / "teacher", tmp_path / "rows.json", "--output_dir", tmp_path / "out"]
    words += ["--cross_tokenizer", "shared", "--max_new_tokens", NEW, "--eval_temperature", 0]
    main([str(word) for word in [*words, "--scorer", "test_diagnosis:solved"]])
    cases = [json.loads(line) for line in (tmp_path / "out/rescues.jsonl").read_text().splitlines()]
    diagnosis = json.loads((tmp_path / "out/diagnosis.json").read_text())
    bits = diagnosis["student"]["figures"]["dataset/teacher_bits_per_byte"]["value"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    nats = size = 0
    for row in rows:
        asked = theirs.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        answer = theirs(row["messages"][1]["content"])["input_ids"] + [theirs.eos_token_id]
        logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        size += len(row["messages"][1]["content"].encode())
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    given = diagnosis["positions"]["given"]
    assert all(math.isfinite(value) for value in flat(given).values() if value is not None)
    tokens = sum(len(ours(row["messages"][1]["content"])["input_ids"]) + 1 for row in rows)
    assert len(cases) == diagnosis["rescue"]["failed"] > 0
    assert 0.2 * tokens < sum(span["tokens"] for span in given) < tokens  # where they begin together


@torch.no_grad()
def test_the_teacher_continues_behind_the_first_error(saved, diagnosed):
    rows, diagnosis, cases = diagnosed
    tokenizer, options = make_tokenizer(), {"do_sample": False, "eos_token_id": [1, 2], "pad_token_id": 0}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(saved / name).double().eval() for name in ("student", "teacher")
    )
    encode = RowEncoder(tokenizer, LENGTH, NEW, "last_turn", [1, 2])

    def write(model, prompt, begun=()):
        ids = torch.tensor([prompt + list(begun)])
        new = model.generate(ids, max_new_tokens=NEW - len(begun), **options)[0, ids.shape[1] :]
        return [*begun, *new.tolist()]

    def text(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def surprise(prompt, tokens):
        law = teacher(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return -law[range(len(tokens)), tokens] + (law.exp() * law).sum(-1)

    prompts = [encode(row)["prompt_ids"] for row in rows]
    level = np.percentile([surprise(prompt, write(teacher, prompt)).max() for prompt in prompts], 80)
    assert diagnosis["errors"]["level"] == pytest.approx(max(3.0, level), abs=1e-4)
    expected = []
    for i, prompt in enumerate(prompts):
        own = write(student, prompt)
        if solved(text(own), rows[i]):
            continue
        surprises = surprise(prompt, own)[: sum(token not in (1, 2) for token in own)]
        over = (surprises >= diagnosis["errors"]["level"]).nonzero()
        at = int(over[0] if len(over) else surprises.argmax())
        behind, before = (text(write(teacher, prompt, own[:end])) if end < NEW else text(own) for end in (at + 1, at))
        expected.append(
            {
                "row": i,
                "error": at,
                "text": behind,
                "score": float(solved(behind, rows[i])),
                "score_before": float(solved(before, rows[i])),
                "answer": text(own),
            }
        )
    assert 0 < len(expected) < len(rows)
    assert cases == expected
    rate = sum(case["score"] for case in cases) / len(cases)
    assert 0 < rate < 1
    assert diagnosis["rescue"]["rate"] == pytest.approx(rate)
    assert diagnosis["rescue"]["before"]["value"] == pytest.approx(sum(c["score_before"] for c in cases) / len(cases))


def test_the_figures_by_position_are_those_of_the_evaluation(diagnosed):
    _, diagnosis, _ = diagnosed
    figures = diagnosis["student"]["figures"]
    for text, source in (("given", "teacher"), ("own", "on_policy")):
        (span,) = diagnosis["positions"][text]
        assert span["forward_kl"] == pytest.approx(figures[f"{source}/forward_kl"]["value"], rel=1e-4)
        assert span["total_variation"] == pytest.approx(figures[f"{source}/loss"]["value"], rel=1e-4)


def test_advice_names_the_figure(diagnosed):
    _, diagnosis, _ = diagnosed
    advised = [(piece["say"], piece["because"]) for piece in diagnosis["advice"]]
    assert advised == [tuple(piece) for piece in advice(diagnosis)]
    accepted = 1 - diagnosis["student"]["figures"]["on_policy/loss"]["value"]
    (because,) = (because for say, because in advised if "--lmbda 0 --beta 0" in say)
    assert f"{accepted:.0%}" in because


def share(value):
    return {"value": value, "low": value, "high": value}


HEALTHY = {
    "metric": "math_verify",
    "max_new_tokens": 256,
    "positions": {"given": [{"forward_kl": 0.4}, {"forward_kl": 0.3}], "own": []},
    "errors": {"falls_back": share(0.2)},
    "rescue": {"rate": 0.5, "low": 0.4, "high": 0.6, "failed": 30},
    "student": {
        "figures": {
            "on_policy/loss": share(0.1),
            "on_policy/agreement": share(0.9),
            "on_policy/student_entropy": share(0.5),
            "on_policy/teacher_entropy": share(0.5),
            "on_policy/truncated": share(0.0),
            "dataset/teacher_perplexity": share(2.0),
            "dataset/student_perplexity": share(3.0),
        }
    },
    "teacher": {
        "figures": {"on_policy/truncated": share(0.0), "score/math_verify": share(0.9)},
        "lengths": {"mean": 150.0, "p50": 150.0, "p99": 200.0},
    },
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "--lmbda 0.5"),
        ({("rescue", "rate"): 0.1}, "--lmbda auto"),
        ({("rescue",): None}, "--lmbda auto"),
        ({("rescue",): None, ("errors", "falls_back"): share(0.8)}, "--lmbda 0.5"),
        ({("student", "figures", "on_policy/loss"): share(0.6)}, "--lmbda 0 --beta 0"),
        ({("student", "figures", "on_policy/student_entropy"): share(0.9)}, "--beta 0.5 to 1"),
        ({("student", "figures", "on_policy/student_entropy"): share(0.2)}, "--beta 0 to 0.5"),
        ({("teacher", "figures", "score/math_verify"): share(0.2)}, "Tune the teacher on this task"),
        ({("student", "figures", "dataset/teacher_perplexity"): share(9.0)}, "--seq_kd True"),
        ({("positions", "given"): [{"forward_kl": 5.0}, {"forward_kl": 0.3}]}, "chat templates"),
        ({("teacher", "figures", "on_policy/truncated"): share(0.5)}, "Raise --max_new_tokens"),
        ({("teacher", "lengths", "p99"): 50.0}, "--max_new_tokens 64"),
    ],
)
def test_advice(change, said):
    diagnosis = copy.deepcopy(HEALTHY)
    for (*path, last), value in change.items():
        inner = diagnosis
        for name in path:
            inner = inner[name]
        inner[last] = value
    given = [piece.say for piece in advice(diagnosis)]
    assert any(said in say for say in given)
    alone = said in ("--lmbda 0.5", "--lmbda auto")  # one of them is always said
    assert len(given) == 1 + (not alone)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing", "teacher", "rows.json"], "missing"),
        (["--teacher_model_name_or_path", "teacher"], "name the student"),
        (["student", "teacher"], "--dataset_name is required"),
        (["student", "teacher", "rows.json", "--beta", "1"], "unknown flag --beta"),
    ],
)
def test_bad_input(saved, monkeypatch, capsys, words, said):
    monkeypatch.chdir(saved)
    (saved / "rows.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code != 0
    assert said in f"{capsys.readouterr().err}{stop.value.code}"
