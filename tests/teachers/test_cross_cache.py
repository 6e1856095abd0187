"""A cache of a teacher with another tokenizer, through the commands: trained from as if the teacher were there, by any student."""

import json
import shutil

import pytest
import torch
from crossed import WORDY, byte_level, save, sentencepiece, word_piece
from inference_servers import InferenceServer
from serving import TOKEN, in_thread, running
from tiny import make_model, make_tokenizer
from trainers import tiny_trainer

from gkd.cli.cache import main as cache_teacher
from gkd.cli.evaluate import evaluate
from gkd.data.batch import IGNORE, Batch, GKDCollator
from gkd.io.files import sha256_of
from gkd.losses.objective import Objective
from gkd.models.heads import LogitHead
from gkd.runs.record import read_record
from gkd.teachers.cache import TeacherCache
from train_gkd import main as train

FLAGS = "--lmbda 0 --max_steps 4 --optim sgd --learning_rate 1e-2 --per_device_train_batch_size 3 --logging_steps 1"
FLAGS = [*FLAGS.split(), *"--report_to none --disable_tqdm True --max_length 200 --max_new_tokens 24".split()]
OFF = ["--save_strategy", "no", "--preflight", "off"]
SHARED = ["--cross_tokenizer", "shared"]


@pytest.fixture(scope="module")
def tokenizers():
    others = {"pieces": sentencepiece("unigram", 560, first=False), "words": word_piece()}
    return {"bytes": byte_level(340), "teacher": sentencepiece("bpe", 640), **others}


@pytest.fixture(scope="module")
def folder(tokenizers, tmp_path_factory):
    """Three students, the teacher, which pads its vocabulary, and rows; caches of all its ids, and of the likeliest 12."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        save(folder, name, make_model(seed, vocab_size=len(tokenizer) + 3 * (name == "teacher")), tokenizer)
    (folder / "rows.json").write_text(json.dumps(WORDY))
    for name, k in (("whole", len(tokenizers["teacher"])), ("top", 12)):
        cached(folder, folder / name, "--top_k", k)
    return folder


def cached(folder, out, *flags, teacher="teacher"):
    words = ["--dataset_name", folder / "rows.json", "--output_dir", out, "--max_length", 200, "--rows_per_shard", 5]
    words += ["--teacher_model_name_or_path", folder / teacher] if teacher else []
    cache_teacher([str(word) for word in (*words, "--max_new_tokens", 24, *SHARED, *flags)])
    return TeacherCache(out)


def trained(folder, out, *flags, student="bytes", cache=None):
    """The losses of the steps, and the first log."""
    rows = ["--teacher_model_name_or_path", folder / "teacher", "--dataset_name", folder / "rows.json"]
    words = ["--model_name_or_path", folder / student, *(["--teacher_cache", cache] if cache else rows), *FLAGS]
    train([str(word) for word in (*words, "--output_dir", out, *flags)])
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in logs if "loss" in log], logs[0]


@pytest.mark.parametrize("student", ["bytes", "pieces"])
@pytest.mark.parametrize("flags", [["--beta", "0"], ["--beta", "0.5"], ["--beta", "1", "--kd_ratio", "0.5"]])
def test_all_ids_train_like_the_teacher_itself(folder, tmp_path, student, flags):
    """Any student, from the same cache. Only the float16 of the log-probabilities is between the two: 2^-11 of them."""
    live, wanted = trained(folder, tmp_path / "live", *SHARED, *OFF, *flags, student=student)
    found, told = trained(folder, tmp_path / "run", *SHARED, *OFF, *flags, student=student, cache=folder / "whole")
    assert found == pytest.approx(live, rel=1e-3)
    assert len(live) == 4
    assert min(live) > 0.05
    names = {name for name in wanted if name.startswith("dataset/")}
    assert names >= {"dataset/forward_kl", "dataset/aligned", "dataset/agreement", "dataset/teacher_entropy"}
    assert {name: told[name] for name in names} == pytest.approx({name: wanted[name] for name in names}, rel=1e-3)


def test_a_student_that_lacks_characters_is_compared_with_the_text_as_it_is(folder, tmp_path):
    """The teacher beside it reads what the student's tokens write, without emoji; in the cache it has read the row."""
    live, _ = trained(folder, tmp_path / "live", *SHARED, *OFF, "--beta", "0", student="words")
    found, log = trained(
        folder, tmp_path / "run", *SHARED, *OFF, "--beta", "0", student="words", cache=folder / "whole"
    )
    assert found == pytest.approx(live, rel=0.1)
    assert log["dataset/aligned"] > 0.5


def test_a_space_that_the_students_tokenizer_puts_first_costs_one_token(folder, tokenizers, tmp_path):
    """It trains on its own tokens; the teacher has read the answer without the space."""
    trainers = [
        tiny_trainer_of(tmp_path, TeacherCache(folder / "whole"), sentencepiece("unigram", 560, first=first))
        for first in (True, False)
    ]
    batches = []
    for trainer in trainers:
        collated = GKDCollator(0, trainer.teacher.columns)(list(trainer.train_dataset))
        batches.append(Batch.of(collated))
        trainer.teacher.read(batches[-1], collated)
    spaced, same = (unpadded(batch, batch.aligned) for batch in batches)
    assert all(row[0] for row in same)
    assert not any(row[0] for row in spaced)
    assert all(sum(row) > 1 for row in spaced)
    assert sum(map(sum, spaced)) > 0.8 * (sum(map(sum, same)) - len(WORDY))


def unpadded(batch, values):
    """Those of each row's scored positions."""
    rows = batch.scored // batch.input_ids.shape[1]
    return [values[rows == row].tolist() for row in range(batch.rows)]


def test_fewer_ids_have_less_of_the_divergence(folder, tmp_path):
    loss = {
        name: trained(folder, tmp_path / name, *SHARED, *OFF, "--beta", "0", cache=folder / name)[0][0]
        for name in ("top", "whole")
    }
    assert 0.1 * loss["whole"] < loss["top"] < 0.9 * loss["whole"]


def test_what_is_in_it(folder, tokenizers):
    """The teacher's own tokens of the text, with what a forward of them says, and nothing of a student."""
    cache = TeacherCache(folder / "top")
    assert cache.settings["tokenizer"] != TeacherCache(folder / "whole").settings["rows"]["tokens"]
    assert cache.settings["vocab_size"] == len(tokenizers["teacher"])
    teacher = make_model(1, vocab_size=len(tokenizers["teacher"]) + 3)
    for row, raw in zip(cache.rows(), WORDY, strict=True):
        question = tokenizers["teacher"].apply_chat_template(raw["messages"][:1], add_generation_prompt=True)
        assert row["prompt_ids"] == question["input_ids"]
        ids = torch.tensor(row["input_ids"])
        scored = (torch.tensor(row["labels"])[1:] != IGNORE).nonzero()[:, 0]
        assert tokenizers["teacher"].decode(ids[scored + 1], skip_special_tokens=True) == raw["messages"][1]["content"]
        logits = teacher(ids[None]).logits[0, scored, : cache.settings["vocab_size"]]
        following = logits.log_softmax(-1).gather(1, ids[scored + 1][:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["following_log_prob"]), following, rtol=1e-4, atol=1e-4)
    assert "row" not in cache.rows().column_names


def test_a_run_and_its_resumption(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gkd.models.loading.load_teacher", lambda *a: pytest.fail("the teacher was loaded"))
    flags = [*SHARED, "--save_strategy", "steps", "--save_steps", "2", "--beta", "0", "--optim", "adamw_torch"]
    flags += ["--gradient_accumulation_steps", "2"]
    whole, _ = trained(folder, tmp_path / "run", *flags, cache=folder / "top")
    shown = " ".join(capsys.readouterr().out.split())
    assert "of the student's and" in shown
    assert "of the answers' tokens begin where one of the teacher's does" in shown
    assert "each model reads its own" in shown
    assert "Peak memory" in shown
    assert not any(word in shown for word in ("warning", "not estimated", "teacher's head"))
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "again/checkpoint-2")
    resumed, _ = trained(folder, tmp_path / "again", *flags, "--resume_from_checkpoint", "auto", cache=folder / "top")
    assert resumed == whole
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]
    arguments = read_record(tmp_path / "run")["arguments"]
    assert arguments["teacher_model_name_or_path"] == str(folder / "teacher")
    assert arguments["cross_tokenizer"] == "shared"
    report = (tmp_path / "run/report.md").read_text()
    assert "cross_tokenizer" in report
    assert str(folder / "top") in report


def test_the_run_is_evaluated_with_the_teacher(folder, tmp_path):
    trained(folder, tmp_path / "run", *SHARED, *OFF, "--max_length", "160", cache=folder / "top")
    results = evaluate(tmp_path / "run", dataset_name=str(folder / "rows.json"), max_new_tokens=6)
    figures = {result["model"]: result["metrics"] for result in results}
    assert 0 < figures["after"]["dataset/aligned"]["value"] < 1
    assert figures["after"]["dataset/teacher_bits_per_byte"]["value"] > 0


def test_the_teachers_own_text(folder, tokenizers, tmp_path):
    cache = cached(folder, tmp_path / "cache", "--top_k", 12, "--seq_kd", "True")
    losses, log = trained(folder, tmp_path / "run", *SHARED, *OFF, cache=tmp_path / "cache")
    assert min(losses) > 0.1
    assert log["dataset/aligned"] > 0.5
    assert read_record(tmp_path / "run")["arguments"]["seq_kd"] is True
    trainer = tiny_trainer_of(tmp_path, cache, tokenizers["bytes"])
    student, teacher = trainer.pairing.cross.student, trainer.pairing.cross.teacher
    for row, own in zip(trainer.train_dataset, cache.rows(), strict=True):
        told = [token for token in own["labels"] if token != IGNORE]
        assert row["teacher_answer_ids"] == told
        answer = row["input_ids"][len(row["prompt_ids"]) :]
        assert student.text(answer) == teacher.text(told)[: len(student.text(answer))]
        assert 0 < len(answer) <= 24


def tiny_trainer_of(folder, cache, tokenizer, **flags):
    student = make_model(0, vocab_size=len(tokenizer))
    more = {"processing_class": tokenizer, "teacher_cache": cache}
    options = {"cross_tokenizer": "shared", "max_length": 200, "max_new_tokens": 24} | flags
    return tiny_trainer(folder / "run", student, None, None, more=more, **options)


def test_rows_of_a_batch_in_parts_have_the_same_losses(folder, tokenizers, tmp_path):
    """As where memory is short, or rows are joined by length: what the teacher says goes with the student's tokens."""
    trainer = tiny_trainer_of(tmp_path, TeacherCache(folder / "top"), tokenizers["bytes"])
    rows = list(trainer.train_dataset)[:5]
    rows[1] = rows[1] | {"labels": [IGNORE] * len(rows[1]["labels"])}  # nothing is scored
    collated = GKDCollator(0, trainer.teacher.columns)(rows)
    batch = Batch.of(collated)
    trainer.teacher.read(batch, collated)
    head, objective = LogitHead.of(trainer.model), Objective(trainer.objective.divergence, trainer.pairing.vocab_size)

    def statistics(part):
        hidden = trainer.model.model(part.input_ids).last_hidden_state.flatten(0, 1)[part.scored]
        labels = part.labels.flatten()[part.scored + 1]
        with trainer.teacher.target(part) as target:
            return objective.loss(hidden, target, labels, head)[1]

    whole = statistics(batch)
    parts = torch.cat([statistics(part) for part in batch.pieces(2)], 1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert (whole[0] > 0).sum() > 0.5 * len(batch.scored)


def test_a_caching_that_was_cut_off_goes_on_to_the_same_bytes(folder, tmp_path, capsys):
    shutil.copytree(folder / "top", tmp_path / "cache")
    for name in ("00001.parquet", "teacher.tokenizer"):
        (tmp_path / "cache/shards" / name).unlink()
        with pytest.raises(ValueError, match="is missing. Run cache_teacher.py again"):
            TeacherCache(tmp_path / "cache")
    cached(folder, tmp_path / "cache", "--top_k", 12)
    assert "--cross_tokenizer shared --lmbda 0" in capsys.readouterr().out
    files = [sorted((root / "shards").iterdir()) for root in (folder / "top", tmp_path / "cache")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_student_with_the_teachers_tokenizer_needs_no_flag(folder, tokenizers, tmp_path):
    """Unless tokens behind a special one are others there than in the words of other tokenizers."""
    shutil.copy(folder / "rows.json", tmp_path / "rows.json")
    size = len(tokenizers["bytes"])
    save(tmp_path, "student", make_model(0, vocab_size=size), tokenizers["bytes"])
    save(tmp_path, "teacher", make_model(1, vocab_size=size), tokenizers["bytes"])
    cached(tmp_path, tmp_path / "cache", "--top_k", size)
    live, _ = trained(tmp_path, tmp_path / "live", *OFF, student="student")
    for name, flags in (("off", []), ("shared", SHARED)):
        found, log = trained(tmp_path, tmp_path / name, *OFF, *flags, student="student", cache=tmp_path / "cache")
        assert found == pytest.approx(live, rel=1e-3)
        assert "dataset/aligned" not in log
    with pytest.raises(SystemExit, match="puts a space before an answer: make one for this student"):
        trained(folder, tmp_path / "run", *OFF, *SHARED, student="teacher", cache=folder / "top")


def test_a_teacher_that_reads_less_than_the_student_is_compared_that_far(folder, tmp_path, capsys):
    """Its own --max_length cuts its tokens; the student's may be another."""
    cached(folder, tmp_path / "cache", "--top_k", 12, "--max_length", 24, "--max_new_tokens", 6)
    losses, log = trained(folder, tmp_path / "run", *SHARED, "--save_strategy", "no", cache=tmp_path / "cache")
    shown = " ".join(capsys.readouterr().out.split())
    assert "answers have text that the teacher has read otherwise, or not to the end" in shown
    assert "may be missing. --beta 0 loses little; exact is the teacher here or behind gkd serve." in shown
    whole = trained(folder, tmp_path / "whole", *SHARED, *OFF, cache=folder / "top")[1]
    assert 0 < log["dataset/aligned"] < whole["dataset/aligned"]
    assert min(losses) > 0


def test_what_vllm_tells_is_what_is_cached(folder, tokenizers, tmp_path):
    """Of a server of log-probabilities; and of `gkd serve`, which sends its tokenizer too."""
    model = make_model(1, vocab_size=len(tokenizers["teacher"]))
    save(tmp_path, "teacher", model, tokenizers["teacher"])
    shutil.copy(folder / "rows.json", tmp_path / "rows.json")
    here = cached(tmp_path, tmp_path / "here", "--top_k", 12)
    with running(InferenceServer(model, tokenizers["teacher"]).app) as url:
        flags = ["--teacher_logprobs_url", f"{url}/v1", "--teacher_top_k", 12]
        named = ["--model_name_or_path", tmp_path / "teacher"]
        told = cached(tmp_path, tmp_path / "vllm", *flags, *named, teacher=None)
    with (
        pytest.MonkeyPatch.context() as patch,
        in_thread(model.eval(), tmp_path, tokenizer=tokenizers["teacher"]) as at,
    ):
        patch.setenv("GKD_TEACHER_TOKEN", TOKEN)
        served = cached(tmp_path, tmp_path / "served", "--teacher_url", at.url, "--top_k", 12, teacher=None)
    for other in (told, served):
        assert other.settings["tokenizer"] == here.settings["tokenizer"]
        for row, own in zip(other.rows(), here.rows(), strict=True):
            assert row["input_ids"] == own["input_ids"]
            assert list(row["topk_ids"]) == list(own["topk_ids"])
            for name in ("topk_log_probs", "following_log_prob", "tail_log_mass"):
                found, wanted = (torch.tensor(of[name], dtype=torch.float32) for of in (row, own))
                torch.testing.assert_close(found, wanted, rtol=2**-9, atol=1e-3)
    assert trained(tmp_path, tmp_path / "run", *SHARED, *OFF, student=folder / "bytes", cache=tmp_path / "vllm")[0]


WRONG = {
    "another teacher": (["--teacher_model_name_or_path", "{folder}/bytes"], "was made with {folder}/teacher"),
    "other rows": (["--dataset_name", "other.json"], "was made with {folder}/rows.json"),
    "without the flag": (["--cross_tokenizer", "off"], "than the student's: add --cross_tokenizer shared"),
    "uld": (
        ["--cross_tokenizer", "uld"],
        "has the teacher's likeliest tokens alone, and --cross_tokenizer uld compares",
    ),
    "the student's text": (["--lmbda", "0.5"], "needs --lmbda 0, not 0.5"),
    "another temperature": (["--loss_temperature", "2"], "holds probabilities at temperature 1.0"),
    "of one tokenizer": (
        ["--teacher_cache", "{tmp}/plain"],
        "is for students of one tokenizer, and this student has another. Make one for students of any",
    ),
    "a tokenizer with nothing in common": (
        ["--model_name_or_path", "{tmp}/letters"],
        "the tokenizers share no token of more than one byte",
    ),
    "another answer": (
        ["--model_name_or_path", "{tmp}/thinking"],
        "all of 12 answers that were looked at have text that the teacher has read otherwise",
    ),
    "another tokenizer": (
        ["--teacher_cache", "{tmp}/moved"],
        "is another tokenizer than the one that this cache was made",
    ),
    "a damaged tokenizer": (["--teacher_cache", "{tmp}/torn"], "no tokenizer can be read there"),
}


@pytest.fixture(scope="module")
def wrong(folder, tokenizers, tmp_path_factory):
    """Students and caches that do not fit."""
    tmp = tmp_path_factory.mktemp("wrong")
    letters = byte_level(264, ["zyx zyq"] * 9)
    save(tmp, "letters", make_model(0, vocab_size=len(letters)), letters)
    thinking = byte_level(340)
    thinking.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ '(hm) ' if m.role == 'assistant' }}{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    save(tmp, "thinking", make_model(0, vocab_size=len(thinking)), thinking)
    one = ["--model_name_or_path", folder / "teacher", "--cross_tokenizer", "off", "--top_k", "4"]
    cached(folder, tmp / "plain", *one)
    for name, path in (("moved", make_tokenizer()), ("torn", None)):
        shutil.copytree(folder / "top", tmp / name)
        file = tmp / name / "shards/teacher.tokenizer"
        described = json.loads(file.read_text())
        described["tokenizer"] = path.backend_tokenizer.to_str() if path else "{"
        file.write_text(json.dumps(described))
        told = json.loads((tmp / name / "manifest.json").read_text())
        entry = next(entry for entry in told["shards"] if entry["name"] == file.name)
        entry["sha256"] = sha256_of(file)
        (tmp / name / "manifest.json").write_text(json.dumps(told))
    return tmp


@pytest.mark.parametrize(("flags", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_told_before_a_model_loads(folder, wrong, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("gkd.models.loading.load_student", lambda *a: pytest.fail("a model was loaded"))
    names = {"folder": folder, "tmp": wrong}
    with pytest.raises(SystemExit) as stop:
        trained(folder, tmp_path / "out", *SHARED, *OFF, *(f.format(**names) for f in flags), cache=folder / "top")
    assert stop.value.code != 0
    assert message.format(**names) in f"{stop.value} {capsys.readouterr().err}"


REFUSED = {
    "hidden states": (["--keep", "hidden"], "does not go with --keep hidden yet"),
    "all turns": (["--train_on", "all_turns"], "needs --train_on last_turn"),
    "several": (["--teachers", "a=x", "b=y"], "takes one teacher"),
    "a student": (["--model_name_or_path", "{folder}/bytes"], "leave out --model_name_or_path"),
    "too many": (["--top_k", "9999"], "--top_k 9999: the teacher has 404 ids"),
    "no student": (["--cross_tokenizer", "off"], "--model_name_or_path is required"),
    "a server of no name": (["--teacher_logprobs_url", "http://127.0.0.1:1/v1"], "needs --model_name_or_path"),
    "other settings": (["--output_dir", "{folder}/top"], "top_k is 12 there and 64 here"),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_not_be_cached(folder, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("gkd.models.loading.load_teacher", lambda *a: pytest.fail("a model was loaded"))
    teacher = None if "http" in flags[-1] else "teacher"
    with pytest.raises(SystemExit) as stop:
        cached(folder, tmp_path / "out", *(flag.format(folder=folder) for flag in flags), teacher=teacher)
    assert message in f"{stop.value} {capsys.readouterr().err}"
