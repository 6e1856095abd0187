"""A teacher with another tokenizer behind a server or in CPU memory: to the bit as one beside the student."""

import json

import pytest
import torch
from crossed import WORDY, byte_level, save, sentencepiece, trained
from serving import TOKEN, in_thread
from tiny import make_model
from trainers import losses

from gkd.cli.evaluate import evaluate
from gkd.config.teacher import TeacherArguments
from gkd.data.batch import Batch, GKDCollator
from gkd.teachers import describe
from train_gkd import main as train


@pytest.fixture(scope="module")
def two_tokenizers():
    return byte_level(340), sentencepiece("bpe", 640)


@pytest.mark.parametrize("place", ["served", "offloaded"])
@pytest.mark.parametrize("loss", ["shared", "uld"])
def test_a_teacher_elsewhere_has_the_bits_of_one_beside_the_student(
    two_tokenizers, tmp_path, monkeypatch, place, loss
):
    """In training on given text and on both models', with what it says of the step's batches asked for ahead; and held-out."""
    ours, theirs = two_tokenizers
    monkeypatch.setenv("GKD_TEACHER_TOKEN", TOKEN)
    flags = {"rows": WORDY, "held_out": WORDY[:3], "lmbda": 0.5, "seq_kd": True, "max_steps": 4, "tokenizer": ours}
    flags |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}

    def run(name, teacher, tokenizer, **more):
        student = make_model(0, vocab_size=len(ours))
        trainer = trained(tmp_path / name, loss, teacher, tokenizer, student=student, **flags, **more)
        figures = {k: v for k, v in trainer.evaluate().items() if "second" not in k and "runtime" not in k}
        return losses(trainer), figures

    def model():
        return make_model(1, vocab_size=len(theirs) + 3)

    beside = run("beside", model(), theirs)
    if place == "offloaded":
        assert run("offloaded", model(), theirs, teacher_offload=True) == beside
        return
    with in_thread(model().eval(), tmp_path, tokenizer=theirs) as served:
        teacher = describe(TeacherArguments(teacher_url=served.url, teacher_timeout=20.0))
        assert run("remote", teacher, None) == beside
    assert teacher.fingerprints["teacher_url"].startswith("weights ")


def test_the_commands_take_a_teacher_behind_a_server(two_tokenizers, tmp_path, monkeypatch, capsys):
    ours, theirs = two_tokenizers
    monkeypatch.setenv("GKD_TEACHER_TOKEN", TOKEN)
    teacher = make_model(1, vocab_size=len(theirs))
    save(tmp_path, "teacher", teacher, theirs)
    save(tmp_path, "student", make_model(0, vocab_size=len(ours)), ours)
    (tmp_path / "rows.json").write_text(json.dumps(WORDY[:4]))
    options = {
        "cross_tokenizer": "shared",
        "dataset_name": str(tmp_path / "rows.json"),
        "max_new_tokens": 6,
        "beta": 0.5,
    }

    def figures(name, **place):
        results = evaluate([tmp_path / "student"], output_dir=str(tmp_path / name), **options, **place)
        return {result["model"]: result["metrics"] for result in results}

    beside = figures("beside", teacher_model_name_or_path=str(tmp_path / "teacher"))
    with in_thread(teacher.eval(), tmp_path, tokenizer=theirs) as served:
        assert figures("served", teacher_url=served.url) == beside
        words = (
            f"--model_name_or_path {tmp_path}/student --teacher_url {served.url} --dataset_name {tmp_path}/rows.json"
        )
        words += f" --output_dir {tmp_path}/run --cross_tokenizer shared --lmbda 0.5 --seq_kd True --max_steps 2"
        train([*words.split(), *"--max_new_tokens 6 --report_to none --disable_tqdm True --save_strategy no".split()])
    assert "tokens begin where one of the teacher's does" in capsys.readouterr().out
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["log_history"][-1]["step"] == 2
    assert beside["student"]["dataset/teacher_bits_per_byte"]["value"] > 0


def test_a_part_of_a_batch_asks_anew(two_tokenizers, tmp_path):
    """Rows that are split when memory runs out: what was asked for ahead is of all of the teacher's tokens."""
    ours, theirs = two_tokenizers
    options = {
        "student": make_model(0, vocab_size=len(ours)),
        "tokenizer": ours,
        "rows": WORDY,
        "teacher_offload": True,
    }
    trainer = trained(tmp_path, "shared", make_model(1, vocab_size=len(theirs)), theirs, max_steps=1, **options)
    collated = GKDCollator(0)([trainer.pairing.encoder(row) for row in WORDY[:4]])
    batch = Batch.of(collated)
    trainer.teacher.read(batch, collated)
    trainer.teacher.prepare([batch])

    def hidden_of(batch):
        with trainer.teacher.target(batch) as target:
            assert len(target.spans.following) == len(target.teacher.hidden)
            return target.teacher.hidden

    assert batch.teacher_output is not None
    parts = list(batch.pieces(2))
    assert [part.teacher_output for part in parts] == [None, None]
    torch.testing.assert_close(torch.cat([hidden_of(part) for part in parts]), hidden_of(batch))
    trainer.teacher.prepare([])
    assert batch.teacher_output is None
