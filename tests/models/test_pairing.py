"""Pairings from names, loaded models, several students and a cache are equal."""

from types import SimpleNamespace

import pytest
from tiny import make_model, make_tokenizer

from gkd.models.loading import load_pretrained
from gkd.models.pairing import Pairing, Side
from gkd.models.tokenizers import VocabularyMismatch
from gkd.teachers.base import Teacher
from gkd.teachers.placed import NamedTeacher


@pytest.fixture
def args(tmp_path):
    for name, seed, size, stop in (("student", 0, 264, 1), ("teacher", 1, 272, 5)):
        model = make_model(seed, vocab_size=size, max_position_embeddings=150)
        model.generation_config.eos_token_id = [stop, 270]  # 270 is padding, which the student lacks
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    options = dict.fromkeys("eos_token pad_token chat_template_path chat_template_kwargs teacher_adapter".split())
    options |= {"max_length": 200, "max_new_tokens": 8, "generates": True, "train_on": "last_turn"}
    options |= dict.fromkeys("trust_remote_code teacher_trust_remote_code system_as_user".split(), False)
    names = {"model_name_or_path": str(tmp_path / "student"), "teacher_model_name_or_path": str(tmp_path / "teacher")}
    return SimpleNamespace(**options, **names, model_revision="main", teacher_revision="main")


class Elsewhere(Teacher):
    """A teacher without a model in this process: it has a number of ids and stop tokens."""

    def side(self, student, args):
        return Side(student.tokenizer, 266, (SimpleNamespace(eos_token_id=7),))


def facts(pairing):
    return pairing.vocab_size, pairing.stop_ids, pairing.encoder.max_length, pairing.sizes


def test_of_names_and_of_loaded_models(args):
    by_name = Pairing.read(args, NamedTeacher(args), args)
    assert facts(by_name) == (264, [1, 2, 5], 150, (264, 272))  # of generation configs 1 and 5, of configs 2
    student, teacher = (load_pretrained(name) for name in (args.model_name_or_path, args.teacher_model_name_or_path))
    loaded = Pairing.of_models(student, teacher, args, teacher_tokenizer=make_tokenizer())
    assert facts(loaded) == facts(by_name)
    assert loaded.tokenizer.get_vocab() == by_name.tokenizer.get_vocab()
    row = {"prompt": "hello", "completion": " there"}
    assert loaded.encoder(row) == by_name.encoder(row)


def test_a_teacher_that_is_no_model(args):
    pairing = Pairing.read(args, Elsewhere(), args)
    assert (pairing.vocab_size, pairing.sizes) == (264, (264, 266))
    assert 7 in pairing.stop_ids
    assert pairing.teacher_tokenizer is pairing.tokenizer


def test_several_students_share_what_all_have(args):
    teacher, student = Side.of_teacher(args), Side.of_student(args, args)
    smaller = Side(make_tokenizer(), 263, (SimpleNamespace(eos_token_id=263),))
    pairing = Pairing.of(student, teacher, args, (smaller,))
    assert (pairing.shared, pairing.vocab_size) == ([264, 263], 263)
    assert max(pairing.stop_ids) < 263
    other = Side(make_tokenizer(extra=("extra",)), 264, ())
    with pytest.raises(VocabularyMismatch):
        Pairing.of(student, teacher, args, (other,))
