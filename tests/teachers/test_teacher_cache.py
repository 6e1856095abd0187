"""A cache of the teacher: made, cut off, damaged, refused, and trained from as if the teacher were there."""

import json
import pickle
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from chat_models import CHAT_MODELS, tokenizer_of
from families import make_family
from peft import LoraConfig, PeftModel, get_peft_model
from preloaded import run_ranks
from tiny import REPO, ROWS, make_model, make_tokenizer
from trainers import losses, tiny_trainer
from workers.cache_worker import one_step, trainer_of

import cache_teacher
import train_gkd
from gkd.config.training import GKDArguments
from gkd.data.batch import IGNORE, Batch, GKDCollator
from gkd.models.heads import LogitHead, last_hidden_states
from gkd.models.loading import load_pretrained
from gkd.models.pairing import Side
from gkd.models.tokenizers import tokenizer_fingerprint
from gkd.runs.record import read_record
from gkd.teachers.cache import TeacherCache
from gkd.teachers.cache_files import CacheWriter
from gkd.teachers.caching import TeacherPass

V = 264  # ids of the tiny models
LIMITS = ["--max_new_tokens", "8", "--max_length", "200"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def command(saved, data, out, *flags, keep="topk", teacher=None):
    models = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", teacher or saved / "teacher"]
    small = ["--rows_per_shard", 2, "--batch_size", 2, *(["--top_k", 5] if keep == "topk" else ["--keep", keep])]
    return [str(word) for word in (*models, "--dataset_name", data, "--output_dir", out, *LIMITS, *small, *flags)]


@pytest.fixture(scope="module")
def made(saved, data, tmp_path_factory):
    """Caches of the dataset's text, and of the teacher's; of its top k, and of its hidden states."""
    folder = tmp_path_factory.mktemp("caches")
    for keep, name in (("topk", ""), ("hidden", "hidden-")):
        cache_teacher.main(command(saved, data, folder / f"{name}dataset", keep=keep))
        cache_teacher.main(command(saved, data, folder / f"{name}teacher", "--seq_kd", keep=keep))
    return folder


def bytes_of(cache):
    return {path.name: path.read_bytes() for path in sorted((cache / "shards").iterdir())}


def test_what_is_in_it(made, saved, data):
    """Each scored token has the teacher's five likeliest and the mass of the rest, as a forward of the row alone gives."""
    teacher = make_model(1, hidden_size=48)
    for name in ("dataset", "teacher"):
        cache = TeacherCache(made / name)
        rows, tail_mass = cache.rows(), 0.0
        assert len(rows) == len(ROWS)
        assert cache.settings["text"]["writer"] == name
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), np.array(row["labels"])
            assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
            at = np.flatnonzero(labels[1:] != IGNORE)
            log_probs = teacher(ids).logits[0, at].log_softmax(-1)
            top, expected = log_probs.topk(5)
            assert (row["topk_ids"].reshape(-1, 5) == expected.numpy()).all()
            stored = torch.tensor(row["topk_log_probs"], dtype=torch.float32).view(-1, 5)
            torch.testing.assert_close(stored, top, rtol=2**-10, atol=1e-5)
            tail = (1 - top.double().exp().sum(1)).log()
            torch.testing.assert_close(torch.tensor(row["tail_log_mass"]).double(), tail, rtol=1e-3, atol=1e-3)
            tail_mass += tail.exp().sum().item()
            if name == "teacher":
                assert len(at) <= 8
                assert row["answer_cut"] == (not {1, 2} & set(labels[labels != IGNORE].tolist()))
        shards = json.loads((made / name / "manifest.json").read_text())["shards"]
        assert sum(entry["rows"] for entry in shards) == len(rows)
        assert sum(entry["tail_mass"] for entry in shards) == pytest.approx(tail_mass, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"beta": 0.0, "kd_ratio": 0.3}], ids=["jsd", "kl and cross-entropy"])
def test_all_tokens_train_like_the_teacher_itself(tmp_path, saved, data, options):
    """At k = V only the float16 of the log-probabilities is between the two: 2^-11 of |log p|, a thousandth of p."""
    cache_teacher.main([*command(saved, data, tmp_path / "cache"), "--top_k", str(V)])
    cache = TeacherCache(tmp_path / "cache")
    rows = cache.rows().remove_columns(["topk_ids", "topk_log_probs", "tail_log_mass"])
    (live, wanted), (cached, found) = (
        one_step(trainer_of(tmp_path / "run", rows=rows, **options)),
        one_step(trainer_of(tmp_path / "run", cache, **options)),
    )
    assert cached["loss"] == pytest.approx(live["loss"], rel=1e-3)
    assert live["loss"] > 0.05
    for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "agreement"):
        assert cached[f"dataset/{name}"] == pytest.approx(live[f"dataset/{name}"], rel=1e-3)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() < 2e-3 * grad.norm(), name


def save_teacher(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def equal_steps(tmp_path, teacher, cache, **options):
    """Trains a row a step with the teacher and with its cache, of one row a batch: losses and gradients have the same bits."""
    options = {"per_device_train_batch_size": 1, "max_steps": 4, "max_new_tokens": 8, "max_length": 200} | options
    rows = cache.rows().remove_columns(["hidden_shard", "hidden_start"])
    live = tiny_trainer(tmp_path / "run", make_model(0), teacher, rows, **options)
    cached = tiny_trainer(tmp_path / "run", make_model(0), None, None, more={"teacher_cache": cache}, **options)
    wanted, found = (one_step(trainer)[1] for trainer in (live, cached))
    assert losses(cached) == losses(live)
    assert len(losses(live)) == 4
    assert min(losses(live)) > 0.05
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.equal(found[name], grad), name


SETTINGS = [{"beta": 0.0}, {"beta": 0.5}, {"beta": 1.0}, {"divergence": "tv"}]
SETTINGS += [{"beta": 0.3, "loss_temperature": 2.0, "kd_ratio": 0.3}]
# Heads of all kinds: bf16, softcap, bias and scale.
EXACT = {
    "llama": (lambda: make_model(1, hidden_size=48), SETTINGS),
    "bf16": (lambda: make_model(1, hidden_size=48, dtype=torch.bfloat16), SETTINGS[1:3]),
    **{kind: (lambda kind=kind: make_family(kind, 1).eval(), SETTINGS[2:3]) for kind in ("gemma2", "phi", "granite")},
}


@pytest.mark.parametrize("kind", EXACT)
def test_hidden_states_train_exactly_like_the_teacher_itself(tmp_path, saved, data, kind):
    make, settings = EXACT[kind]
    folder = save_teacher(tmp_path / "teacher", make())
    teacher = load_pretrained(str(folder), dtype="auto").eval()
    words = command(saved, data, tmp_path / "cache", "--batch_size", 1, keep="hidden", teacher=folder)
    cache_teacher.main(words)
    cache = TeacherCache(tmp_path / "cache")
    stored = LogitHead.load(cache.folder / "shards/head.safetensors", torch.device("cpu"))
    live = LogitHead.of(teacher)
    assert (stored.scale, stored.softcap, stored.linear[1] is None) == (
        live.scale,
        live.softcap,
        live.head.bias is None,
    )
    for row in cache.rows():  # as a forward of the row alone gives
        at = np.flatnonzero(np.array(row["labels"])[1:] != IGNORE)
        found = cache.columns([row])["teacher_output"]
        assert found.dtype == teacher.dtype
        ids = torch.tensor([row["input_ids"]])
        assert torch.equal(found, last_hidden_states(teacher, ids, None)[0, at])
        torch.testing.assert_close(stored(found), teacher(ids).logits[0, at])
    for options in settings:
        equal_steps(tmp_path, teacher, cache, **options)
    with cache.target(Batch(ids, ids, ids[0], teacher_output=found)) as target:
        assert cache._head is target.head  # which a worker that collates rows is not sent
    assert pickle.loads(pickle.dumps(cache))._head is None


def test_hidden_states_of_the_teachers_own_text(made):
    """They stand beside the text that the cache of the top k has, whose probabilities they give."""
    top_k, hidden = (TeacherCache(made / name) for name in ("teacher", "hidden-teacher"))
    head = LogitHead.load(made / "hidden-teacher/shards/head.safetensors", torch.device("cpu"))
    for expected, row in zip(top_k.rows(), hidden.rows(), strict=True):
        assert row["input_ids"] == expected["input_ids"]
        log_probs = head(hidden.columns([row])["teacher_output"]).log_softmax(-1)
        ids = torch.tensor(expected["topk_ids"]).view(-1, 5).long()
        stored = torch.tensor(expected["topk_log_probs"]).view(-1, 5).float()
        torch.testing.assert_close(log_probs.gather(1, ids), stored, rtol=2**-10, atol=1e-5)


def test_an_adapter_on_the_teachers_head(tmp_path, saved, data, monkeypatch):
    """It is stored merged; where it can't be merged, it is refused before a row is read."""
    options = LoraConfig(target_modules=["lm_head", "q_proj"], r=4, init_lora_weights=False)
    teacher = get_peft_model(make_model(1, hidden_size=48), options)
    teacher.save_pretrained(tmp_path / "adapter")
    words = command(
        saved, data, tmp_path / "cache", "--teacher_adapter", tmp_path / "adapter", "--batch_size", 1, keep="hidden"
    )
    unmerged = PeftModel.from_pretrained(load_pretrained(str(saved / "teacher")), tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr("gkd.models.loading.load_teacher", lambda args: unmerged.eval())
        with pytest.raises(SystemExit, match="output head .* is no plain linear layer in memory: it has an adapter"):
            cache_teacher.main(words)
    assert not bytes_of(tmp_path / "cache")
    cache_teacher.main(words)
    equal_steps(tmp_path, unmerged.merge_and_unload(), TeacherCache(tmp_path / "cache"), beta=1.0)


def test_rows_that_share_a_batch_with_one_of_no_answer(made):
    """Of rows in any order each has its own hidden states, and one with nothing to score has none."""
    cache = TeacherCache(made / "hidden-dataset")
    rows = list(cache.rows())
    rows[1] = rows[1] | {"labels": [IGNORE] * len(rows[1]["labels"])}
    order = (3, 1, 0, 2)
    batch = GKDCollator(0, cache.columns)([rows[i] for i in order])
    alone = [cache.columns([rows[i]])["teacher_output"] for i in order]
    assert len(alone[1]) == 0
    assert torch.equal(batch["teacher_output"], torch.cat(alone))


@pytest.mark.parametrize(("flags", "refused"), [([], True), (["--seq_kd"], False), (["--seq_kd"], True)])
def test_too_little_disk(tmp_path, saved, data, monkeypatch, capsys, flags, refused):
    """Hidden states of known text must fit; of text that is yet to be written, the least there can be."""
    head, row = 264 * 48 * 4, 48 * 4
    scored = sum(len(text) + 1 for text in ("1", "four, I think", "hello", "well"))  # each with <|end|>
    free = head + (4 if flags else scored) * row - refused
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    monkeypatch.setattr("gkd.models.loading.load_teacher", lambda *a: pytest.fail("a model was loaded"))
    words = command(saved, data, tmp_path / "cache", *flags, keep="hidden")
    if refused:
        with pytest.raises(
            SystemExit, match="--keep hidden stores .* of 192 bytes.*GB left: free some, choose another"
        ):
            cache_teacher.main(words)
    else:
        with pytest.raises(pytest.fail.Exception):
            cache_teacher.main(words)
        assert "up to 32 scored tokens" in (told := capsys.readouterr().out)
        assert "which may not do" in told


@pytest.mark.parametrize("name", ["teacher", "hidden-teacher"])
def test_a_caching_that_is_killed_goes_on_to_the_same_bytes(tmp_path, saved, data, made, monkeypatch, name):
    out, calls, ask = tmp_path / "cache", [], TeacherPass.__call__
    words = command(saved, data, out, "--seq_kd", keep="hidden" if "hidden" in name else "topk")
    out.mkdir()
    (out / "manifest.json.1.partial").write_text("killed at the very first file")

    def killed_at_the_second(self, rows, shard, tell):
        if calls:
            raise KeyboardInterrupt
        calls.append(shard)
        return ask(self, rows, shard, tell)

    monkeypatch.setattr(TeacherPass, "__call__", killed_at_the_second)
    with pytest.raises(SystemExit, match="130"):
        cache_teacher.main(words)
    with pytest.raises(ValueError, match="the caching was not finished. Run cache_teacher.py again"):
        TeacherCache(out)
    (out / "shards/00001.parquet.1.partial").write_bytes(b"half of it")
    monkeypatch.setattr(TeacherPass, "__call__", lambda *a: calls.append(a[2]) or ask(*a))
    cache_teacher.main(words)
    assert calls == [0, 1]  # the first shard was not made again
    assert bytes_of(out) == bytes_of(made / name)
    assert (out / "manifest.json").read_text() == (made / name / "manifest.json").read_text()


def test_a_kill_between_the_two_files_of_a_shard(tmp_path, saved, data, made, monkeypatch):
    out, save = tmp_path / "cache", CacheWriter._save

    def killed(self, name, *args, **about):
        if name == "00000.parquet":
            raise KeyboardInterrupt
        save(self, name, *args, **about)

    words = command(saved, data, out, keep="hidden")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(CacheWriter, "_save", killed)
        cache_teacher.main(words)
    assert (out / "shards/00000-hidden.safetensors").is_file()
    cache_teacher.main(words)
    assert bytes_of(out) == bytes_of(made / "hidden-dataset")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dataset", "00001.parquet"),
        ("hidden-dataset", "00001-hidden.safetensors"),
        ("hidden-dataset", "head.safetensors"),
    ],
)
def test_a_damaged_shard_is_named_and_made_again(tmp_path, saved, data, made, monkeypatch, name, file):
    out = tmp_path / "cache"
    shutil.copytree(made / name, out)
    words = command(saved, data, out, keep="hidden" if "hidden" in name else "topk")
    shard = out / "shards" / file
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{file} is damaged. Run cache_teacher.py again"):
        TeacherCache(out)
    TeacherCache(out, verify=False)
    cache_teacher.main(words)
    assert bytes_of(out) == bytes_of(made / name)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing"):
        TeacherCache(out, verify=False)
    # Complete again: no model is loaded any more.
    cache_teacher.main(words)
    monkeypatch.setattr("gkd.models.loading.load_teacher", lambda *a: pytest.fail("a model was loaded"))
    cache_teacher.main(words)


BAD = {
    "other k": (["--top_k", "6"], "of other settings: top_k is 5 there and 6 here"),
    "other kind": (
        ["--keep", "hidden", "--top_k", "64"],
        "of other settings: keep is 'topk' there and 'hidden' here",
    ),
    "k of the whole": (["--keep", "hidden"], "--top_k has no effect on --keep hidden"),
    "other text": (["--seq_kd"], "of other settings: text.writer is 'dataset' there and 'teacher' here"),
    "other limit": (["--max_length", "100"], "max_length is 200 there and 100 here"),
    "k too large": (
        ["--top_k", "265", "--output_dir", "{tmp}/new"],
        "--top_k 265: student and teacher share 264 ids.",
    ),
    "other files": (["--output_dir", "{tmp}"], "holds other files"),
    "no answers": (["--dataset_name", "{tmp}/prompts.json"], "1 of 1 rows have no answer"),
    "no rows": (["--dataset_name", "nowhere.json"], "nowhere.json: no such file or folder"),
    "no room": (["--seq_kd", "True", "--max_new_tokens", "200"], "leaves no room for a prompt"),
    "typo": (["--topk", "6"], "--topk"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_of_the_caching(saved, data, made, tmp_path, capsys, monkeypatch, flags, message):
    (tmp_path / "prompts.json").write_text('[{"prompt": "a"}]')
    monkeypatch.setattr("gkd.models.loading.load_teacher", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        cache_teacher.main([*command(saved, data, made / "dataset"), *(f.format(tmp=tmp_path) for f in flags)])
    assert stop.value.code != 0
    assert message in f"{stop.value} {capsys.readouterr().err}"


def train(saved, cache, out, *flags):
    student = ["--model_name_or_path", saved / "student", "--teacher_cache", cache, "--output_dir", out]
    fast = ["--per_device_train_batch_size", 1, "--logging_steps", 1, "--report_to", "none", "--disable_tqdm", "True"]
    return [str(word) for word in (*student, *fast, "--lmbda", 0, *flags)]


@pytest.mark.parametrize("cache", ["teacher", "hidden-teacher"])
def test_a_run_and_its_resumption(saved, made, tmp_path, monkeypatch, capsys, cache):
    monkeypatch.setattr("gkd.models.loading.load_teacher", lambda *a: pytest.fail("the teacher was loaded"))
    flags = ["--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, "--max_steps", 4, "--save_steps", 2]
    flags += ["--use_peft", "--lora_r", 4]
    train_gkd.main(train(saved, made / cache, tmp_path / "whole", *flags))
    assert ("teacher's head" in capsys.readouterr().out) == ("hidden" in cache)
    record = read_record(tmp_path / "whole")
    assert record["arguments"]["teacher_model_name_or_path"] == str(saved / "teacher")
    assert record["arguments"]["max_new_tokens"] == 8
    assert record["arguments"]["seq_kd"] is True  # the record tells who wrote the text
    assert record["data"]["train"]["rows"] == len(ROWS)
    assert "dataset" in (tmp_path / "whole/report.md").read_text()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "again/checkpoint-2")
    train_gkd.main(train(saved, made / cache, tmp_path / "again", *flags, "--resume_from_checkpoint", "auto"))
    logs = [
        {log["step"]: log["loss"] for log in json.loads(path.read_text())["log_history"] if "loss" in log}
        for path in (tmp_path / "whole/trainer_state.json", tmp_path / "again/trainer_state.json")
    ]
    assert logs[0] == logs[1]
    assert set(logs[0]) == {1, 2, 3, 4}
    assert (tmp_path / "again/adapter_model.safetensors").is_file()


BAD_RUN = {
    "λ": (["--lmbda", "0.5"], "needs --lmbda 0, not 0.5"),
    "evaluation": (["--eval_strategy", "steps", "--eval_steps", "1"], "--eval_strategy needs the teacher"),
    "held-out rows": (["--eval_dataset_name", "x.json"], "--eval_dataset_name needs the teacher"),
    "metrics": (["--metrics", "exact_match"], "evaluate afterwards, by eval_gkd.py RUN"),
    "loss temperature": (["--loss_temperature", "2"], "holds probabilities at temperature 1.0"),
    "other data": (["--dataset_name", "x.json"], "Leave the flag out"),
    "other limit": (["--max_length", "300"], "was made with 200"),
    "wrong student": (["--model_name_or_path", "{tmp}/other"], "made for another tokenizer or chat template"),
    "smaller student": (
        ["--model_name_or_path", "{tmp}/small"],
        "made for 264 ids, but the student has logits for 262",
    ),
    "no cache": (["--teacher_cache", "{tmp}/other"], "no manifest.json there"),
    "hidden states, wrong student": (
        ["--teacher_cache", "{made}/hidden-dataset", "--model_name_or_path", "{tmp}/other"],
        "made for another tokenizer or chat template",
    ),
    "hidden states, smaller student": (
        ["--teacher_cache", "{made}/hidden-dataset", "--model_name_or_path", "{tmp}/small"],
        "made for 264 ids, but the student has logits for 262",
    ),
    "hidden states, λ": (["--teacher_cache", "{made}/hidden-dataset", "--lmbda", "1"], "needs --lmbda 0, not 1.0"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_RUN.values(), ids=BAD_RUN.keys())
def test_bad_input_of_a_run(saved, made, tmp_path, capsys, monkeypatch, flags, message):
    make_model(0).save_pretrained(tmp_path / "other")
    make_tokenizer(extra=("extra",)).save_pretrained(tmp_path / "other")
    make_model(0, vocab_size=262).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    monkeypatch.setattr("gkd.models.loading.load_student", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        flags = [f.format(tmp=tmp_path, made=made) for f in flags]
        train_gkd.main([*train(saved, made / "dataset", tmp_path / "out"), *flags])
    assert stop.value.code != 0
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_the_trainer_by_itself(made, tmp_path):
    cache = TeacherCache(made / "dataset")
    with pytest.raises(ValueError, match="needs --lmbda 0, not 0.5"):
        trainer_of(tmp_path, cache, lmbda=0.5)
    trainer = trainer_of(tmp_path, cache, seq_kd=True, learning_rate=1e-3)
    trainer.train()
    assert trainer.state.log_history[0]["dataset/loss"] > 0
    assert trainer.teacher_model is None
    with pytest.raises(ValueError, match="needs the teacher"):
        trainer.evaluate(TeacherCache(made / "dataset").rows().map(lambda row: {"row": "{}"}))


def test_an_adapter_on_the_head(made, tmp_path):
    """Its gradient comes from autograd through the head, a chunk at a time, as without a cache."""
    student = get_peft_model(make_model(0), LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False))
    trainer = trainer_of(tmp_path, TeacherCache(made / "dataset"), student=student, learning_rate=1e-2)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert before
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


def test_settings_of_a_newer_version_are_not_guessed(tmp_path):
    CacheWriter(str(tmp_path / "cache"), {"top_k": 1}, rows=1, rows_per_shard=1)
    path = tmp_path / "cache/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        TeacherCache(tmp_path / "cache")
    shards = {"version": 1, "count": 0, "shards": []}
    for damaged in ("{", "[]", '{"version": 1}', "[" * 100_000, *({"settings": 1}, {"settings": {"flags": []}})):
        damaged = damaged if isinstance(damaged, str) else json.dumps(shards | damaged)
        path.write_text(damaged)
        with pytest.raises(ValueError, match="can't be read"):
            TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize("torn", ["", "[]", "{}"])
def test_a_shard_whose_entry_is_damaged_is_made_again(tmp_path, torn):
    writer = CacheWriter(str(tmp_path / "cache"), {"top_k": 1}, rows=1, rows_per_shard=1)
    (writer.shards / "00000.parquet").write_bytes(b"half of it")
    (writer.shards / "00000.json").write_text(torn)
    assert writer.missing() == [0]


def test_answers_behind_a_space_of_the_tokenizer_are_refused(made, tmp_path):
    """Of a cache from before rows were encoded without it; other tokenizers' caches are good."""
    args = GKDArguments(output_dir=str(tmp_path), lmbda=0.0, bf16=False, use_cpu=True)
    folder = shutil.copytree(made / "dataset", tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["encoding"], manifest["settings"]["flags"]["system_as_user"]
    for kind, refused in (("sentencepiece", True), ("sentencepiece, legacy", True), ("byte-level", False)):
        tokenizer = tokenizer_of(CHAT_MODELS["llama-2"], kind)
        manifest["settings"]["tokenizer"] = tokenizer_fingerprint(tokenizer)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        cache = TeacherCache(folder)
        assert cache.settings["flags"]["system_as_user"] is False
        with (
            pytest.raises(ValueError, match="put a space before each answer.*make it anew")
            if refused
            else nullcontext()
        ):
            cache.side(Side(tokenizer, 1000, ()), args)


def test_a_caching_of_rows_encoded_otherwise_does_not_go_on(saved, data, made, tmp_path):
    folder = shutil.copytree(made / "dataset", tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["rows"]["tokens"] = "of an older encoder"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="its rows have other tokens: .*Choose another --output_dir"):
        cache_teacher.main(command(saved, data, folder))


@pytest.mark.parametrize("name", ["teacher", "hidden-teacher"])
def test_two_ranks_equal_one(tmp_path, saved, data, made, name):
    """The caching, byte for byte, and then a step of training with half of the accumulation."""
    out = tmp_path / "ranks"
    words = command(saved, data, out / "cache", "--seq_kd", keep="hidden" if "hidden" in name else "topk")
    done = run_ranks([REPO / "tests/workers/cache_worker.py", out, *words], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert bytes_of(out / "cache") == bytes_of(made / name)
    log, wanted = one_step(trainer_of(tmp_path / "run", TeacherCache(made / name), max_grad_norm=0.0))
    found = torch.load(out / "grads.pt")
    assert found["loss"] == pytest.approx(log["loss"], rel=1e-5)
    for name, grad in wanted.items():
        assert (found["grads"][name] - grad).norm() < 1e-5 * grad.norm(), name
