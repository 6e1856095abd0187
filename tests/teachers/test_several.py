"""Several teachers: each row is compared with its own, or with a mixture, and their text is written by its own."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from commands import FAST
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import ROWS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

import eval_gkd
import train_gkd
from gkd.config.evaluation import EvalArguments
from gkd.config.recorded import usable
from gkd.config.teacher import TeacherArguments, named_teachers
from gkd.data.batch import Batch, scored_positions, text_keys
from gkd.data.encoding import RowEncoder, encode_dataset, rows_fingerprint
from gkd.data.rows import DataError
from gkd.evaluation.bootstrap import rows_by_teacher
from gkd.losses.divergences import jsd, statistics_and_gradient
from gkd.losses.objective import Objective
from gkd.losses.targets import HiddenTarget, SeveralTarget
from gkd.models.heads import LogitHead
from gkd.report.curves import evaluation_curves
from gkd.report.runs import load_run
from gkd.runs.results import read_results
from gkd.teachers import several
from gkd.teachers.several import AdapterTeacher, SeveralTeachers
from gkd.training.memory import Estimate

NAMES = ("math", "code")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models `student`, `math`, `code`, and two LoRA adapters of `code`, `poems` and `law`."""
    folder = tmp_path_factory.mktemp("several")
    for name, seed in (("student", 0), ("math", 1), ("code", 2)):
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name, seed in (("poems", 3), ("law", 4)):
        model = get_peft_model(make_model(2), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / f"{name}-merged")
        make_tokenizer().save_pretrained(folder / f"{name}-merged")
    return folder


def named(places, *words):
    return [word.replace("/", f"{places}/") for word in words]


def test_names_models_and_adapters(places):
    a, b, c = (str(places / name) for name in ("math", "code", "law"))
    assert named_teachers([f"a={a}", f"b={b}:{c}", "c=org/model", "d=C:\\x"]) == {
        "a": (a, None),
        "b": (b, c),
        "c": ("org/model", None),
        "d": ("C:\\x", None),
    }
    for words, said in (
        (["a"], "must be NAME=MODEL"),
        (["mixture=a"], "'mixture' is what results call a mixture of teachers"),
        (["a 0.5 + b 0.5=a"], "is what results call a mixture of teachers"),
        (["=x"], "must be"),
        (["a=x", "a=y"], "there twice"),
        (["a=x", "b=x"], "has two names"),
    ):
        with pytest.raises(ValueError, match=said):
            named_teachers(words)
    with pytest.raises(ValueError, match="exclude each other"):
        TeacherArguments(teacher_model_name_or_path="x", teachers=["a=x"]).check_teacher()
    for address, said in (("http://u:p@h:1", "a name or password"), ("http://h:1/?q=1", "no address of a server")):
        with pytest.raises(ValueError, match=said):
            TeacherArguments(teachers=[f"a={address}"]).check_teacher()


def test_a_record_brings_no_address(tmp_path):
    arguments = {"teachers": ["a=model", "b=http://elsewhere:8500"]}
    accepted, left_out = usable(arguments, "run.json")
    assert "teachers" not in accepted
    assert left_out == {"teachers": "--teachers a=model b=http://elsewhere:8500"}
    assert usable({"teachers": ["a=model"]}, "run.json") == ({"teachers": ["a=model"]}, {})
    (tmp_path / "run.json").write_text(json.dumps({"arguments": arguments | {"dataset_name": "rows.json"}}))
    with pytest.raises(ValueError, match="type --teachers a=model b=http://elsewhere:8500 again, or give --teacher_m"):
        EvalArguments(run=str(tmp_path), dataset_name="rows.json")


def test_other_weights_of_a_teacher_are_noticed_and_another_folder_is_not(places, tmp_path):
    def prints(*words):
        return SeveralTeachers(TeacherArguments(teachers=[*words])).fingerprints["teachers"]

    before = prints(*named(places, "a=/math", "b=/code:/law"))
    assert prints(*named(places, "a=/math", "b=/code:/poems")) != before
    for name in ("math", "code", "law"):
        shutil.copytree(places / name, tmp_path / name)
    assert prints(*named(tmp_path, "a=/math", "b=/code:/law")) == before
    make_model(5).save_pretrained(tmp_path / "math")
    assert prints(*named(tmp_path, "a=/math", "b=/code:/law")) != before


def test_the_preflight_counts_what_loads(places, tmp_path, monkeypatch):
    estimates = []
    monkeypatch.setattr("gkd.training.preflight.Estimate", lambda *a: estimates.append(Estimate(*a)) or estimates[0])
    flags = named(places, "math=/math:/poems", "code=/code", "poems=/code:/poems", "law=/code:/law")
    (tmp_path / "rows.json").write_text(json.dumps([row | {"teacher": "math"} for row in ROWS]))
    words = ["--model_name_or_path", places / "student", "--dataset_name", tmp_path / "rows.json", "--output_dir"]
    words += [tmp_path / "run", *FAST, "--teachers", *flags, "--preflight", "only"]
    train_gkd.main([str(word) for word in words])
    several = SeveralTeachers(TeacherArguments(teachers=flags)).load()
    parameters = [parameter for model, _ in several._models for parameter in model.parameters()]
    # An adapter alone on its model is merged; the others are beside it.
    assert estimates[0].resident["teacher"] == sum(parameter.nbytes for parameter in parameters)
    assert [model.readers for model in estimates[0].teachers] == [1, 3]


def encoder():
    return RowEncoder(make_tokenizer(), 80, 6, "last_turn", [1, 2], teachers=NAMES)


@pytest.mark.parametrize(
    ("teacher", "shares"),
    [
        ("math", [1, 0]),
        ("code", [0, 1]),
        ({"math": 3, "code": 1}, [0.75, 0.25]),
        ({"math": None, "code": 2}, [0, 1]),
    ],
)
def test_a_row_names_its_teachers(teacher, shares):
    assert encoder()(ROWS[0] | {"teacher": teacher})["teacher_shares"] == shares


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "must name one of math, code"),
        ({"teacher": None}, "must name one of math, code"),
        ({"teacher": "maths"}, "names 'maths'; --teachers has math, code"),
        ({"teacher": {"math": 1, "law": 1}}, "names 'law'"),
        ({"teacher": {"math": -1, "code": 2}}, "a share of 0 or more"),
        ({"teacher": {"math": 0, "code": 0}}, "a share of 0 or more"),
        ({"teacher": {"math": "much"}}, "a share of 0 or more"),
    ],
)
def test_rows_that_name_no_teacher_are_refused(row, said):
    with pytest.raises(DataError, match=f"row 5: .*{said}"):
        encoder()(ROWS[0] | row, 5)


def test_rows_of_other_teachers_are_other_rows():
    parts = [[row | {"teacher": {"math": s, "code": 1 - s}} for row in ROWS] for s in (0.5, 0.25)]
    first, second = (rows_fingerprint(encode_dataset(Dataset.from_list(part), encoder())) for part in parts)
    assert first != second


def test_some_rows_of_a_batch():
    torch.manual_seed(0)
    ids, labels = torch.randint(3, 99, (4, 9)), torch.full((4, 9), -100)
    for row, (start, end) in enumerate([(2, 5), (4, 9), (1, 2), (3, 8)]):
        labels[row, start:end] = ids[row, start:end]
    batch = Batch(ids, labels, scored_positions(labels), teacher_input_ids=torch.cat([ids, ids], 1))
    batch.teacher_scored = batch.scored // 9 * 18 + batch.scored % 9 + 9
    rows = torch.tensor([1, 3])
    part, tokens = batch.only(rows)
    assert torch.equal(part.input_ids, ids[rows])
    assert torch.equal(part.scored, scored_positions(labels[rows]))
    assert torch.equal(part.input_ids.flatten()[part.scored], ids.flatten()[batch.scored[tokens]])
    assert torch.equal(part.teacher_input_ids.flatten()[part.teacher_scored], ids.flatten()[batch.scored[tokens]])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [16, 3])
def test_the_target_is_the_mixture_of_distributions(monkeypatch, beta, rows):
    torch.manual_seed(0)
    heads = [
        LogitHead(torch.nn.Linear(8, 40, bias=bias).double().requires_grad_(False), 1.0, None)
        for bias in (True, False)
    ]
    student = LogitHead(torch.nn.Linear(6, 40).double().requires_grad_(False), 1.0, 3.0)
    count, shares = 11, torch.tensor([[1, 0], [0, 1], [0.25, 0.75]]).double()[torch.arange(11) % 3]
    parts, laws = [], torch.zeros(count, 40).double()
    for share, head in zip(shares.T, heads, strict=True):
        at = share.nonzero()[:, 0]
        hidden = torch.randn(len(at), 8).double()
        laws[at] += share[at, None] * head(hidden).softmax(-1)
        parts.append((at, share[at], HiddenTarget(hidden, head)))
    hidden, labels = torch.randn(count, 6).double().requires_grad_(), torch.randint(0, 40, (count,))
    for place in ("gkd.losses.objective.chunk_tokens", "gkd.losses.topk.chunk_tokens"):
        monkeypatch.setattr(place, lambda *args: rows)
    loss, statistics = Objective(jsd(beta), 40).loss(hidden, SeveralTarget(parts, count), labels, student)
    expected, _ = statistics_and_gradient(student(hidden), laws.log(), labels, jsd(beta))
    torch.testing.assert_close(statistics, torch.stack(expected).detach())
    (gradient,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(_sum_of(student(hidden), laws.log(), beta), hidden)
    torch.testing.assert_close(gradient, wanted)


def _sum_of(logits, log_law, beta):
    """The generalized JSD by its definition, summed."""
    student, law = logits.log_softmax(-1), log_law.exp()
    if beta == 0:
        return (law * (log_law - student)).sum()
    if beta == 1:
        return (student.exp() * (student - log_law)).sum()
    middle = (beta * law + (1 - beta) * student.exp()).log()
    return (beta * law * (log_law - middle) + (1 - beta) * student.exp() * (student - middle)).sum()


def run(places, out, rows, *words, steps=1):
    """The log of one step by the real command, which moves no weight."""
    out.mkdir()
    (out / "rows.json").write_text(json.dumps(rows))
    models = [
        "--model_name_or_path",
        places / "student",
        "--dataset_name",
        out / "rows.json",
        "--output_dir",
        out / "run",
    ]
    steps = [
        "--max_steps",
        steps,
        "--per_device_train_batch_size",
        len(rows),
        "--learning_rate",
        0,
        "--preflight",
        "off",
    ]
    train_gkd.main([str(word) for word in [*models, *FAST, "--lmbda", 0, *words, *steps, "--save_strategy", "no"]])
    (log, *_) = json.loads((out / "run/trainer_state.json").read_text())["log_history"]
    return log


OF = ("math", "code", "math", "code")


@pytest.mark.parametrize(
    ("words", "alone"),
    [
        (("math=/math", "code=/code"), ("math", "code")),
        (("math=/code:/poems", "code=/code:/law"), ("poems-merged", "law-merged")),
        (("math=/code", "code=/code:/law"), ("code", "law-merged")),
    ],
    ids=["models", "adapters", "base and adapter"],
)
def test_each_row_learns_from_its_teacher(places, tmp_path, words, alone):
    rows = [row | {"teacher": name} for row, name in zip(ROWS, OF, strict=True)]
    both = run(places, tmp_path / "both", rows, "--teachers", *named(places, *words))
    total = tokens = 0
    for name, model in zip(NAMES, alone, strict=True):
        own = [row for row, of in zip(ROWS, OF, strict=True) if of == name]
        log = run(places, tmp_path / name, own, "--teacher_model_name_or_path", places / model)
        count = sum(len(row["messages"][1]["content"]) + 1 for row in own)  # a token a character, and the stop token
        total, tokens = total + log["loss"] * count, tokens + count
    assert both["loss"] == pytest.approx(total / tokens, rel=1e-4)
    swapped = run(places, tmp_path / "swapped", rows, "--teachers", *named(places, *reversed_models(words)))
    assert abs(swapped["loss"] - both["loss"]) > 1e-3


def reversed_models(words):
    (a, first), (b, second) = (word.split("=") for word in words)
    return f"{a}={second}", f"{b}={first}"


def test_each_writes_its_own_rows_text(places, tmp_path):
    questions = [{"prompt": row["messages"][:1], "teacher": name} for row, name in zip(ROWS, OF, strict=True)]
    (tmp_path / "held_out.json").write_text(json.dumps(questions))
    rows = [row | {"teacher": {"math": 0.3, "code": 0.7}} for row in ROWS]
    flags = ["--teachers", *named(places, "math=/math", "code=/code:/law"), "--seq_kd", "True"]
    run(places, tmp_path / "both", rows, *flags, "--eval_dataset_name", tmp_path / "held_out.json")
    tokenizer = make_tokenizer()
    written = {}
    for path in (tmp_path / "both/run/evaluation/rows").iterdir():
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if "own" not in records[0]:
            written = {record["row"]: record["tokens"] for record in records}
    encode = RowEncoder(tokenizer, 200, 8, "last_turn", [1, 2], teachers=NAMES)
    for i, (question, name) in enumerate(zip(questions, OF, strict=True)):
        model = AutoModelForCausalLM.from_pretrained(places / {"math": "math", "code": "law-merged"}[name])
        ids = torch.tensor([encode(question)["prompt_ids"]])
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [1, 2], "pad_token_id": 0}
        assert written[i] == model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    (before, *_) = [r for r in read_results(tmp_path / "both/run") if r["model"] == "before"]
    assert before["metrics"]["teacher/forward_kl"]["value"] > 0


def evaluated(places, out, rows, *words):
    """The results of `gkd evaluate` for the student alone, by model."""
    out.mkdir()
    (out / "rows.json").write_text(json.dumps(rows))
    fixed = ["--dataset_name", out / "rows.json", "--output_dir", out, "--metrics", "chrf", "--max_new_tokens", 8]
    eval_gkd.main([str(word) for word in ("--models", places / "student", *words, *fixed)])
    return {result["model"]: result for result in read_results(out)}


HALF = {"math": 1, "code": 1}


def test_figures_by_teacher_are_those_of_its_rows_alone(places, tmp_path):
    of = ("math", "code", "math", HALF)
    rows = [row | {"teacher": name} for row, name in zip(ROWS, of, strict=True)]
    both = evaluated(places, tmp_path / "both", rows, "--teachers", *named(places, "math=/math", "code=/code:/law"))
    parts = both["student"]["by_teacher"]
    assert {label: part["rows"] for label, part in parts.items()} == {"math": 2, "code": 1, "math 0.5 + code 0.5": 1}
    for name, model in (("math", "math"), ("code", "law-merged")):
        own = [row for row, teacher in zip(ROWS, of, strict=True) if teacher == name]
        alone = evaluated(places, tmp_path / name, own, "--teacher_model_name_or_path", places / model)
        assert "by_teacher" not in alone["student"]
        shown = parts[name]["metrics"]
        assert shown.keys() == {
            f"{where}/{figure}"
            for where in ("dataset", "on_policy")
            for figure in ("forward_kl", "reverse_kl", "agreement")
        } | {"score/chrf"}
        for figure, estimate in shown.items():
            assert estimate["value"] == pytest.approx(alone["student"]["metrics"][figure]["value"], rel=1e-4)
        text = both["teacher"]["by_teacher"][name]["metrics"]["score/chrf"]
        assert text["value"] == pytest.approx(alone["teacher"]["metrics"]["score/chrf"]["value"])


def test_training_tells_figures_by_teacher(places, tmp_path, capsys, pictures):
    rows = [row | {"teacher": name} for row, name in zip(ROWS, OF, strict=True)]
    (tmp_path / "held_out.json").write_text(json.dumps(rows[:3]))
    flags = [
        "--teachers",
        *named(places, "math=/math", "code=/code"),
        "--eval_dataset_name",
        tmp_path / "held_out.json",
    ]
    best = ["--eval_strategy", "steps", "--eval_steps", 1, "--metric_for_best_model"]
    run(places, tmp_path / "both", rows, *flags, *best, "eval_code/on_policy/reverse_kl", steps=2)
    shown, state = capsys.readouterr().out, json.loads((tmp_path / "both/run/trainer_state.json").read_text())
    logged = next(log for log in state["log_history"] if log["step"] == 1 and "eval_loss" in log)
    after = next(result for result in read_results(tmp_path / "both/run") if result["model"] == "after")
    value = after["by_teacher"]["code"]["metrics"]["on_policy/reverse_kl"]["value"]
    assert state["best_metric"] == logged["eval_code/on_policy/reverse_kl"] == value  # no weight has moved
    assert after["by_teacher"]["math"]["change"]["dataset/forward_kl"]["value"] == 0
    assert re.search(r"reverse KL .*\n.* of math \(2 rows\) .*\n.* of code \(1 rows?\) ", shown)
    for page in ("report.md", "report.html"):
        assert "of math (2 rows)" in (tmp_path / "both/run" / page).read_text()
    with pictures():
        curve = evaluation_curves([load_run(tmp_path / "both/run")])["Reverse KL, on its own text"]
    assert all(f">{label}<" in curve for label in ("student", "of math (2 rows)", "of code (1 row)"))
    one = [*flags, *best, "eval_math/on_policy/reverse_kl"]
    (tmp_path / "held_out.json").write_text(json.dumps([row | {"teacher": "math"} for row in ROWS]))
    with pytest.raises(SystemExit, match="no evaluation of this run gives that"):  # all rows have one teacher
        run(places, tmp_path / "one", rows, *one)


def test_many_mixtures_count_together():
    shares = [[1 - part / 10, part / 10] for part in range(7)]
    assert rows_by_teacher(shares[:3], NAMES) == {"math": [0], "math 0.9 + code 0.1": [1], "math 0.8 + code 0.2": [2]}
    assert rows_by_teacher([*shares, [0.0, 1.0]], NAMES) == {"math": [0], "code": [7], "mixture": [1, 2, 3, 4, 5, 6]}
    assert rows_by_teacher(shares[:1] * 4, NAMES) == {}


def test_text_is_kept_by_its_writer():
    prompts, mask = torch.tensor([[0, 5, 6], [0, 5, 6]]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    keys = text_keys(prompts, mask, torch.tensor([[1.0, 0.0], [0.4, 0.6]]))
    assert keys[0] != keys[1]
    assert [key[:2] for key in keys] == text_keys(prompts, mask, None) == [[5, 6], [5, 6]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--teachers", "math=/math", "code=/nowhere"], "nowhere"),
        (["--teachers", "math=/math", "--teacher_model_name_or_path", "/math"], "exclude each other"),
        (["--teachers", "math=/math", "code=/code", "--teacher_offload"], "leave out --teacher_offload"),
        (["--teachers", "math=/math"], "row 0: .*`teacher` must name one of math"),
    ],
)
def test_bad_input(places, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        run(places, tmp_path / "out", ROWS, *named(places, *words))
    assert re.search(said, f"{capsys.readouterr().err}{stop.value.code}")


@pytest.mark.parametrize("on_one_device", [True, False])
def test_a_base_over_several_devices_has_no_graph_and_no_kernels_of_one(monkeypatch, on_one_device):
    forwards = []
    monkeypatch.setattr(several, "TeacherForward", lambda model, pad, *how, **more: forwards.append((how, more)))
    forward = SimpleNamespace(pad=0)
    AdapterTeacher(SimpleNamespace(inner=None, forward=forward, packs=True, on_one_device=on_one_device), "a", True)
    assert forwards == [((on_one_device,), {"whole": on_one_device})]
