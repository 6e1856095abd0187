"""Training and evaluation with a teacher that has another tokenizer, against the path of one tokenizer and a direct forward."""

import json
import math
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from crossed import CORPUS, SIZE, WORDY, byte_level, permuted, save, sentencepiece, trained
from tiny import ROWS, make_model, make_tokenizer
from trainers import losses, weights
from trl.experimental.gold import gold_trainer
from trl.experimental.utils import encode_with_byte_offsets

from gkd.cli.evaluate import evaluate
from gkd.config.training import GKDArguments
from gkd.data.batch import IGNORE, Batch, GKDCollator
from gkd.data.rows import DataError
from gkd.models import cross_vocabulary
from gkd.models.cross_vocabulary import CrossVocabulary
from gkd.models.pairing import Pairing
from gkd.models.tokenizers import VocabularyMismatch
from gkd.runs.results import read_results
from train_gkd import main as train


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "flags",
    [{}, {"kd_ratio": 0.5, "loss_temperature": 2.0}, {"lmbda": 1.0}, {"seq_kd": True, "temperature": 1e-3}],
    ids=["dataset", "mixed", "on_policy", "teacher"],
)
def test_another_order_of_ids_changes_nothing(tmp_path, flags, beta):
    """The same losses, and after steps of plain gradient descent the same weights."""
    teacher = make_model(1, vocab_size=SIZE)
    other, moved = permuted(make_tokenizer(), 3, teacher)
    same = trained(tmp_path / "same", "off", teacher, make_tokenizer(), beta=beta, **flags)
    crossed = trained(tmp_path / "crossed", "shared", moved, other, beta=beta, **flags)
    assert same.pairing.cross is None
    assert crossed.pairing.cross is not None
    assert losses(crossed) == pytest.approx(losses(same), abs=1e-6)
    for name, weight in weights(crossed).items():
        torch.testing.assert_close(weight, weights(same)[name], rtol=0, atol=1e-6)
    before = make_model(0, vocab_size=SIZE).state_dict()
    assert any((weight - before[name]).abs().max() > 1e-4 for name, weight in weights(crossed).items())
    logs = [next(log for log in trainer.state.log_history if "loss" in log) for trainer in (same, crossed)]
    shared = [name for name in logs[0] if "/" in name]
    assert {name: logs[1][name] for name in shared} == pytest.approx({n: logs[0][n] for n in shared}, abs=1e-5)


def test_an_evaluation_with_another_order_of_ids_measures_the_same(tmp_path):
    teacher = make_model(1, vocab_size=SIZE)
    other, moved = permuted(make_tokenizer(), 3, teacher)
    rows = [*ROWS, {"messages": [{"role": "user", "content": "and now?"}]}]
    figures = []
    for cross, model, tokenizer in (("off", teacher, make_tokenizer()), ("shared", moved, other)):
        trainer = trained(tmp_path / cross, cross, model, tokenizer, held_out=rows, learning_rate=0.0)
        figures.append(trainer.evaluate())
    same, crossed = figures
    both = same.keys() & crossed.keys() - {
        f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")
    }
    assert {f"eval_{source}/reverse_kl" for source in ("dataset", "teacher", "on_policy")} <= both
    assert {name: crossed[name] for name in both} == pytest.approx({name: same[name] for name in both}, abs=1e-5)
    assert crossed["eval_dataset/aligned"] == 1
    # Each token is a byte, and there is one stop token an answer.
    answers = [row["messages"][1]["content"] for row in ROWS]
    size = sum(len(answer.encode()) for answer in answers)
    for side in ("student", "teacher"):
        bits = math.log2(same[f"eval_dataset/{side}_perplexity"]) * (size + len(answers)) / size
        assert crossed[f"eval_dataset/{side}_bits_per_byte"] == pytest.approx(bits, abs=1e-5)


@pytest.fixture(scope="module")
def two_tokenizers():
    return byte_level(340), sentencepiece("bpe", 640)


def test_the_loss_is_that_of_both_models_at_common_boundaries(tmp_path, two_tokenizers):
    """Against a plain forward of each model on its own ids, and sums over classes as products with a matrix."""
    ours, theirs = two_tokenizers
    student, teacher = make_model(0, vocab_size=len(ours)), make_model(1, vocab_size=len(theirs) + 3)
    options = {"student": student, "tokenizer": ours, "rows": WORDY, "learning_rate": 0.0, "max_steps": 1}
    trainer = trained(tmp_path, "shared", teacher, theirs, per_device_train_batch_size=12, max_length=120, **options)
    cross = trainer.pairing.cross
    classes_of_student, classes_of_teacher, count, _ = cross.classes
    total = tokens = compared = 0
    for row in WORDY:
        encoded = trainer.pairing.encoder(row)
        prompt, answer = encoded["prompt_ids"], encoded["input_ids"][len(encoded["prompt_ids"]) :]
        asked = theirs.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        assert encoded["teacher_prompt_ids"] == asked
        written = cross.to_teacher(answer)
        assert cross.teacher.text(written).decode() == row["messages"][1]["content"]
        with torch.no_grad():
            logits = student(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            of_teacher = teacher(torch.tensor([asked + written])).logits[0, len(asked) - 1 : -1, : len(theirs)]
        sides = zip((logits, of_teacher), (classes_of_student, classes_of_teacher), strict=True)
        p, q = (
            (of.double().softmax(-1) @ (F.one_hot(c.clamp(min=0), count) * (c >= 0)[:, None]).double()).log()
            for of, c in sides
        )
        p, q = (log - log.logsumexp(-1, keepdim=True) for log in (p, q))
        for i, j in cross.align(answer, written).boundaries[:-1]:
            total += ((q[j].exp() * (q[j] - p[i])).sum() * 0.5 + (p[i].exp() * (p[i] - q[j])).sum() * 0.5).item()
            compared += 1
        tokens += len(answer)
    log = trainer.state.log_history[0]
    assert log["dataset/aligned"] == pytest.approx(compared / tokens)
    assert 0.3 < log["dataset/aligned"] < 1
    assert (log["dataset/forward_kl"] + log["dataset/reverse_kl"]) / 2 == pytest.approx(total / compared, rel=1e-4)
    options |= {"student": make_model(0, vocab_size=len(ours)), "kd_ratio": 0.0}
    trainer = trained(
        tmp_path / "text", "shared", teacher, theirs, per_device_train_batch_size=12, max_length=120, **options
    )
    log = trainer.state.log_history[0]  # of cross-entropy alone, which all tokens have
    assert log["dataset/student_entropy"] <= math.log(len(ours))
    assert "dataset/aligned" not in log


def test_with_uld_the_loss_is_that_of_trls_gold(tmp_path):
    """On their own reading of the texts; theirs is averaged over spans, ours over tokens."""
    ours, theirs = byte_level(340), byte_level(380, corpus=CORPUS[::3])
    student, teacher = make_model(0, vocab_size=len(ours)), make_model(1, vocab_size=len(theirs))
    options = {"student": student, "tokenizer": ours, "rows": WORDY, "learning_rate": 0.0, "max_steps": 1}
    trainer = trained(
        tmp_path, "uld", teacher, theirs, per_device_train_batch_size=12, max_length=None, beta=0.3, **options
    )
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0, uld_teacher_temperature=1.0,
        uld_skip_student_eos=False, uld_skip_teacher_eos=False, use_extended_uld=True, uld_use_hybrid_loss=True, beta=0.3,
        uld_token_merge_strategy="bayesian",
    )  # fmt: skip
    loss_of = gold_trainer.ULDLoss(config, ours, theirs)
    total = tokens = several = 0
    for row in WORDY:
        question, answer = row["messages"][:1], row["messages"][1]["content"]
        prompts = [t.apply_chat_template(question, add_generation_prompt=True, tokenize=False) for t in (ours, theirs)]
        asked, (written, offsets) = (
            ours(prompts[0])["input_ids"],
            encode_with_byte_offsets(ours.backend_tokenizer, [answer])[0],
        )
        size = len(answer.encode())
        ids = torch.tensor([[*asked, *written, ours.eos_token_id]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(asked), -100)
        offsets = torch.tensor([[*[(0, 0)] * len(asked), *offsets, (size, size)]])
        of_teacher = gold_trainer.build_teacher_inputs_from_texts(theirs, prompts[1:], [answer])
        with torch.no_grad():
            logits = student(ids).logits, teacher(of_teacher[0]).logits
            loss = loss_of(*logits, labels, of_teacher[1], ids, of_teacher[0], offsets, of_teacher[3])
        groups, _ = loss_of._align_by_byte_offsets(
            offsets[0, len(asked) :].tolist(), of_teacher[3][0, of_teacher[1][0] != -100].tolist()
        )
        total, tokens = total + loss.item() * len(groups), tokens + len(written) + 1
        several += sum(len(group) > 1 for group in groups)
    log = trainer.state.log_history[0]
    assert several > 10
    assert log["dataset/loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert 0.2 < log["dataset/aligned"] < 1
    assert "dataset/forward_kl" not in log
    assert trainer.teacher.cross.matched.shape == (2, len(loss_of._vocab_mapping))


def pairing_of(ours, theirs, window=512, missing=(0, 0)):
    """`missing`: so many of the last ids the models have no logits for."""
    args = SimpleNamespace(
        cross_tokenizer="shared", max_length=None, max_new_tokens=4, train_on="last_turn", system_as_user=False,
        chat_template_kwargs=None, eos_token=None, pad_token=None, chat_template_path=None, trust_remote_code=False,
    )  # fmt: skip
    teacher = make_model(1, vocab_size=len(theirs) - missing[1], max_position_embeddings=window)
    return Pairing.of_models(make_model(0, vocab_size=len(ours) - missing[0]), teacher, args, ours, theirs)


def test_ids_that_a_model_has_no_logits_for(two_tokenizers):
    with pytest.raises(VocabularyMismatch, match=f"produces id {len(two_tokenizers[0]) - 1}.*Resize its embeddings"):
        pairing_of(*two_tokenizers, missing=(1, 0))
    theirs = len(two_tokenizers[1])
    student, teacher, count, _ = pairing_of(*two_tokenizers, missing=(0, theirs - 300)).cross.classes
    assert len(teacher) == 300
    assert {*student.tolist(), *teacher.tolist()} - {-1} == {*range(count)}


def test_a_window_and_padding_keep_to_the_teacher(two_tokenizers):
    """A text that is too long for the teacher is cut, and a student's id of padding may be none of the teacher's."""
    ours, theirs = two_tokenizers
    pairing = pairing_of(ours, theirs, 60)
    row = pairing.encoder(WORDY[0])
    collated = GKDCollator(len(theirs) + 50)([row, pairing.encoder(ROWS[0])])
    batch = Batch.of(collated)
    pairing.cross.read(batch, collated["teacher_prompts"], collated["teacher_prompt_attention_mask"])
    assert batch.teacher_input_ids.max() < len(theirs)
    assert batch.teacher_input_ids.shape[1] <= 60
    assert len(batch.scored) == len(batch.teacher_scored) == len(batch.aligned)
    narrow = pairing.cross
    narrow.window = len(row["teacher_prompt_ids"]) + 3
    narrow.read(batch, collated["teacher_prompts"], collated["teacher_prompt_attention_mask"])
    own = (batch.labels[0] != IGNORE).sum()
    assert batch.teacher_attention_mask[0].sum() == narrow.window
    assert not batch.aligned[4:own].any()


def test_a_row_that_the_teachers_template_refuses_is_told_with_the_flag_that_helps(two_tokenizers):
    ours, theirs = two_tokenizers[0], copy(two_tokenizers[1])
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    theirs.chat_template = refusal + theirs.chat_template
    encoder = pairing_of(ours, theirs).encoder
    row = {"messages": [{"role": "system", "content": "be brief"}, *WORDY[0]["messages"]]}
    with pytest.raises(
        DataError, match="as the teacher reads it: .*no system prompts.* It passes with --system_as_user"
    ):
        encoder(row)
    assert replace(encoder, system_as_user=True, reader=replace(encoder.reader, system_as_user=True))(row)
    theirs.chat_template = "{{ raise_exception('nothing') }}"
    with pytest.raises(DataError, match="No other flag helps: give either tokenizer another chat template"):
        encoder(WORDY[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher_logprobs_url": "http://127.0.0.1:1/v1"}, "--teacher_logprobs_url does not go with it"),
        ({"teachers": ["a=b", "c=d"]}, "--teachers does not go with it"),
        ({"teacher_model_name_or_path": "self"}, "has the student's tokenizer"),
        ({"train_on": "all_turns"}, "needs --train_on last_turn"),
        ({"teacher_sharded": True}, "needs whole weights"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        GKDArguments(output_dir=str(tmp_path), cross_tokenizer="shared", use_cpu=True, **flags)


def test_without_the_flag_the_message_names_it(two_tokenizers, tmp_path):
    ours, theirs = two_tokenizers
    models = make_model(0, vocab_size=len(ours)), make_model(1, vocab_size=len(theirs))
    with pytest.raises(VocabularyMismatch, match="--cross_tokenizer shared"):
        trained(tmp_path, "off", models[1], theirs, student=models[0], tokenizer=ours)


def test_a_teacher_without_a_template_is_refused_before_it_loads(two_tokenizers, tmp_path, capsys):
    ours, theirs = byte_level(340), sentencepiece("bpe", 640)
    theirs.chat_template = None
    save(tmp_path, "student", make_model(0, vocab_size=len(ours)), ours)
    save(tmp_path, "teacher", make_model(1, vocab_size=len(theirs)), theirs)
    (tmp_path / "rows.json").write_text(json.dumps(WORDY))
    names = {"model": "student", "teacher_model": "teacher"}
    words = [word for flag, name in names.items() for word in (f"--{flag}_name_or_path", str(tmp_path / name))]
    words += ["--dataset_name", str(tmp_path / "rows.json"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        train([*words, "--cross_tokenizer", "shared", "--report_to", "none"])
    said = f"{ended.value} {capsys.readouterr().err}"
    assert "the teacher's tokenizer has no chat template" in said


@pytest.fixture(scope="module")
def taught(two_tokenizers, tmp_path_factory):
    """A folder with a teacher that knows the language."""
    _, theirs = two_tokenizers
    teacher = make_model(1, vocab_size=len(theirs), initializer_range=0.05)
    ids = [torch.tensor(theirs.apply_chat_template(row["messages"])["input_ids"]) for row in WORDY]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORE)
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    for _ in range(60):
        teacher(batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("taught")
    save(folder, "teacher", teacher, theirs)
    return folder / "teacher"


@pytest.mark.parametrize(
    "flags",
    ["shared --lmbda 0", "shared --lmbda 0.5 --seq_kd True", "uld --lmbda 0 --eval_strategy steps --eval_steps 20"],
    ids=["given", "written", "uld"],
)
def test_the_command_brings_bits_per_byte_down(two_tokenizers, taught, tmp_path, flags, capsys, monkeypatch):
    """From a teacher that knows the language, though its tokens are others. Rows are surveyed, and classes made, once."""
    calls = []
    for owner, name in ((CrossVocabulary, "survey"), (cross_vocabulary, "shared_classes")):
        function = getattr(owner, name)

        def counted(*args, function=function, name=name):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(owner, name, counted)
    ours, _ = two_tokenizers
    save(tmp_path, "student", make_model(0, vocab_size=len(ours), initializer_range=0.05), ours)
    (tmp_path / "rows.json").write_text(json.dumps(WORDY))
    (tmp_path / "held_out.json").write_text(json.dumps(WORDY[:4]))
    words = "--model_name_or_path student --dataset_name rows.json --output_dir run "
    words = [str(tmp_path / word) if not word.startswith("--") else word for word in words.split()]
    words += [
        "--teacher_model_name_or_path",
        str(taught),
        "--eval_dataset_name",
        str(tmp_path / "held_out.json"),
        "--cross_tokenizer",
        *flags.split(),
    ]
    words += "--max_steps 30 --learning_rate 5e-3 --per_device_train_batch_size 12 --max_length 160".split()
    words += "--max_new_tokens 24 --beta 0 --report_to none --disable_tqdm True --save_strategy no".split()
    train(words)
    shown = capsys.readouterr().out
    assert sorted(calls) == ["shared_classes", "survey"]
    assert "of the student's and" in shown
    assert "of the answers' tokens begin where one of the teacher's does" in shown
    results = {result["model"]: result["metrics"] for result in read_results(tmp_path / "run")}
    name = "dataset/student_bits_per_byte"
    before, after = (results[model][name]["value"] for model in ("before", "after"))
    assert after < 0.9 * before
    assert results["after"]["dataset/teacher_bits_per_byte"]["value"] < after


def test_the_teacher_has_a_prompt_of_its_own_too(tmp_path, two_tokenizers):
    ours, theirs = two_tokenizers
    pairing = pairing_of(ours, theirs)
    prompt = [{"role": "system", "content": "Well."}, {"role": "user", "content": "hello"}]
    encoded = pairing.encoder(WORDY[0] | {"teacher_prompt": prompt})
    asked = theirs.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert encoded["teacher_prompt_ids"] == asked
    assert encoded["prompt_ids"] == pairing.encoder(WORDY[0])["prompt_ids"]


def test_a_resumed_run_goes_on_with_the_text_that_was_written_ahead(tmp_path, two_tokenizers):
    ours, theirs = two_tokenizers
    flags = {"lmbda": 1.0, "steps_per_generation": 3, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    flags |= {"tokenizer": ours, "rows": WORDY, "learning_rate": 1e-3, "per_device_train_batch_size": 2}

    def run(folder, checkpoint=None):
        models = make_model(0, vocab_size=len(ours)), make_model(1, vocab_size=len(theirs))
        trainer = trained(tmp_path / folder, "shared", models[1], theirs, student=models[0], start=checkpoint, **flags)
        return trainer.state.log_history

    whole = [log["loss"] for log in run("whole") if "loss" in log]
    resumed = run("whole", str(tmp_path / "whole/checkpoint-1"))
    assert [log["loss"] for log in resumed if "loss" in log] == whole
    assert len(whole) == 3


def test_evaluating_a_run_reads_the_flag_from_its_record(two_tokenizers, tmp_path):
    ours, theirs = two_tokenizers
    save(tmp_path, "teacher", make_model(1, vocab_size=len(theirs)), theirs)
    save(tmp_path, "student", make_model(0, vocab_size=len(ours)), ours)
    (tmp_path / "rows.json").write_text(json.dumps(WORDY[:4]))
    words = (
        "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name rows.json --output_dir run "
    )
    words = [str(tmp_path / word) if not word.startswith("--") else word for word in words.split()]
    words += "--cross_tokenizer shared --lmbda 0 --max_steps 1 --max_length 160 --max_new_tokens 6".split()
    train([*words, *"--report_to none --disable_tqdm True --save_strategy no --preflight off".split()])
    results = evaluate(tmp_path / "run", dataset_name=str(tmp_path / "rows.json"))
    figures = {result["model"]: result["metrics"] for result in results}
    assert figures["before"].keys() >= {f"{text}/student_bits_per_byte" for text in ("dataset", "on_policy")}
    assert 0 < figures["after"]["dataset/aligned"]["value"] < 1


@pytest.mark.parametrize("lost", [2, 4])
def test_answers_that_the_teacher_does_not_write_are_counted(two_tokenizers, tmp_path, capsys, lost):
    """▁ is the space of SentencePiece's own tokens. Some such answers are a warning, and if there are no others an error."""
    ours, theirs = two_tokenizers
    save(tmp_path, "teacher", make_model(1, vocab_size=len(theirs)), theirs)
    save(tmp_path, "student", make_model(0, vocab_size=len(ours)), ours)
    answers = ["a ▁ b"] * lost + ["hello world"] * (4 - lost)
    messages = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}] for answer in answers]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": part} for part in messages]))
    words = (
        "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name rows.json --output_dir run "
    )
    words = [str(tmp_path / word) if not word.startswith("--") else word for word in words.split()]
    words += "--cross_tokenizer shared --lmbda 0 --report_to none --preflight only".split()
    if lost < 4:
        train(words)
        shown = " ".join(capsys.readouterr().out.split())
        assert "2 of 4 answers have text that the teacher's tokenizer changes, the first in row 0" in shown
        return
    with pytest.raises(SystemExit) as ended:
        train(words)
    assert (
        "all of 4 answers that were looked at have text that the teacher's tokenizer changes"
        in f"{ended.value} {capsys.readouterr().err}"
    )
