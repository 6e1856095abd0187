"""Wherever the teacher is, a run is that of the plain teacher: text, losses, trained weights, evaluation."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from commands import ANSWERS, command
from peft import LoraConfig, get_peft_model
from tiny import ROWS, make_model
from trainers import tiny_trainer
from transformers import GenerationConfig

import train_gkd
from gkd.config.teacher import SELF, PlacementArguments, adopt_student
from gkd.config.training import GKDArguments
from gkd.generation.sampling import writer_fingerprint
from gkd.models import loading
from gkd.models.heads import last_hidden_states
from gkd.models.lora import base_parameters
from gkd.rollout.steps import TextWriter
from gkd.teachers.placed import LocalTeacher, OffloadedTeacher, OwnBase, SpreadTeacher, TeacherElsewhere
from gkd.training.trainer import GKDTrainer


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains four steps of a mix; returns the trainer, with the text of its steps."""

    def make(student, teacher, **options):
        texts, write = [], TextWriter.write

        def watched(self, planned, *args):
            made = write(self, planned, *args)
            texts.extend((text.source.label, batch["input_ids"].tolist()) for text in made for batch in text.batches)
            return made

        monkeypatch.setattr(TextWriter, "write", watched)
        options = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "lmbda": 0.5,
            "seq_kd": True,
            "gradient_checkpointing": True,
            "eval_on_start": True,
        } | options
        torch.manual_seed(0)  # of LoRA's dropout
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        trainer = tiny_trainer(folder, student, teacher, held_out=ROWS, **options)
        trainer.train()
        monkeypatch.setattr(TextWriter, "write", write)
        trainer.texts = texts
        return trainer

    return make


def told(trainer):
    """All figures of the log that are no time."""
    apart = ("second", "runtime", "memory")
    return [{k: v for k, v in log.items() if not any(a in k for a in apart)} for log in trainer.state.log_history]


def check_same(one, other):
    assert one.texts == other.texts
    assert {source for source, _ in one.texts} == {"on_policy", "teacher"}
    assert told(one) == told(other)
    mine, theirs = (dict(trainer.model.named_parameters()) for trainer in (one, other))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name


def test_a_teacher_on_a_device_of_its_own(train):
    plain = train(make_model(0), make_model(1))
    placed = train(make_model(0), make_model(1), teacher_device="cpu")
    assert type(plain.teacher) is LocalTeacher
    assert type(placed.teacher) is TeacherElsewhere
    with placed.teacher.head() as head:
        assert head.head is not placed.teacher_model.lm_head
    check_same(plain, placed)


def test_a_teacher_over_several_devices(train, monkeypatch):
    plain = train(make_model(0), make_model(1))
    teacher = make_model(1)
    parts = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    dispatch_model(teacher, parts | {"lm_head": "cpu"}, force_hooks=True)  # the CPU alone, by the hooks of several
    devices = [torch.device("cpu")] * 2
    monkeypatch.setattr(GKDArguments, "teacher_devices", devices)
    spread = train(make_model(0), teacher)
    assert type(spread.teacher) is SpreadTeacher
    with spread.teacher.head() as head:
        assert head.head is not spread.teacher_model.lm_head
        assert not hasattr(head.head, "_hf_hook")
    check_same(plain, spread)


def test_a_map_of_its_layers_that_is_typed_counts(monkeypatch):
    loads = []
    monkeypatch.setattr(loading, "load_pretrained", lambda *names, **options: loads.append(options) or make_model(1))
    monkeypatch.setattr(loading, "_room", lambda devices: {0: 1, 1: 2})
    monkeypatch.setattr(PlacementArguments, "teacher_devices", [torch.device("cuda", n) for n in (0, 1)])
    typed = {"device_map": {"model": 0, "lm_head": 1}}
    for more in ({}, typed):
        loading.load_teacher(PlacementArguments(teacher_model_name_or_path="unused", teacher_model_init_kwargs=more))
    by_itself, as_typed = loads
    assert (by_itself["device_map"], by_itself["max_memory"]) == ("balanced", {0: 1, 1: 2})
    assert as_typed["device_map"] == typed["device_map"]


def test_an_offloaded_teacher_is_only_used_while_it_is_there(train, monkeypatch):
    plain = train(make_model(0), make_model(1))
    visits, come, leave = [], OffloadedTeacher._come, OffloadedTeacher._leave

    def coming(self):
        visits.append(trainer_state().global_step)
        come(self)

    def leaving(self):
        leave(self)
        for weight in self._weights:  # what is away must not be read
            weight.data = torch.full_like(weight.data, float("nan"))

    seen, steps = [], GKDTrainer.get_batch_samples

    def trainer_state():
        return seen[-1].state if seen else SimpleNamespace(global_step="before")

    def watched(self, *args):
        seen.append(self)
        return steps(self, *args)

    monkeypatch.setattr(OffloadedTeacher, "_come", coming)
    monkeypatch.setattr(OffloadedTeacher, "_leave", leaving)
    monkeypatch.setattr(GKDTrainer, "get_batch_samples", watched)
    offloaded = train(make_model(0, tie_word_embeddings=False), make_model(1), teacher_offload=True)
    check_same(plain, offloaded)
    assert visits == ["before", "before", 0, 1, 2, 3]  # a check, an evaluation, and once a step, whoever writes


LORA = {
    "all": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_lora(kind, **model):
    torch.manual_seed(5)
    return get_peft_model(make_model(0, **model), LoraConfig(r=4, init_lora_weights=False, **LORA[kind]))


@pytest.mark.parametrize("kind", LORA)
def test_the_students_base_is_its_teacher(train, kind):
    plain = train(with_lora(kind), make_model(0))
    own = train(with_lora(kind), None, teacher_model_name_or_path=SELF)
    assert type(own.teacher) is OwnBase
    check_same(plain, own)
    adapter = [p for p in own.model.parameters() if p.requires_grad]
    assert adapter
    before = {n: p for n, p in with_lora(kind).named_parameters() if p.requires_grad}
    assert any(not torch.equal(dict(own.model.named_parameters())[n], p) for n, p in before.items())


def test_the_base_is_known_without_its_adapter():
    config = GenerationConfig(max_new_tokens=8)
    plain = make_model(0)
    known = writer_fingerprint(plain, config)
    for kind in LORA:
        student = with_lora(kind)
        assert [name for name, _ in base_parameters(student)] == [name for name, _ in plain.named_parameters()]
        assert writer_fingerprint(student, config, without_adapter=True) == known
        assert writer_fingerprint(student, config) != known


def test_a_visit_leaves_the_student_as_it_was():
    student = with_lora("all")
    student.train()
    student.base_model.model.lm_head.eval()
    accelerator = SimpleNamespace(device=torch.device("cpu"), unwrap_model=lambda model: model)
    teacher = OwnBase(student, accelerator, 0, True)
    ids = torch.randint(3, 264, (2, 9))
    training = [module.training for module in student.modules()]
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    with teacher.visit(), torch.no_grad():
        found = last_hidden_states(student, ids, None)
        assert torch.equal(found, last_hidden_states(make_model(0).eval(), ids, None))
    assert training == [module.training for module in student.modules()]
    assert trained == [name for name, p in student.named_parameters() if p.requires_grad]
    assert not torch.equal(last_hidden_states(student.eval(), ids, None), found)


REFUSED = {
    "two places": (["--teacher_offload", "--teacher_device", "cpu"], "--teacher_device and --teacher_offload exclude"),
    "no such device": (["--teacher_device", "gpu1"], "--teacher_device gpu1: no such device"),
    "no such GPU": (["--teacher_device", f"cuda:{torch.cuda.device_count()}"], "visible GPUs"),
    "one of several is not there": (["--teacher_device", "cpu,gpu1"], "--teacher_device gpu1: no such device"),
    "one twice": (["--teacher_device", "cpu,cpu"], "several must be different GPUs"),
    "no GPU behind": (["--teacher_device", "auto"], f"cuda:1: there are {torch.cuda.device_count()} visible GPUs"),
    "no adapter": (["--teacher_model_name_or_path", SELF], "there is none: add --use_peft or --student_adapter"),
    "own dtype": (
        ["--teacher_model_name_or_path", SELF, "--use_peft", "--teacher_dtype", "bfloat16"],
        "--teacher_dtype does not apply to --teacher_model_name_or_path self",
    ),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_a_model_loads(saved, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("gkd.models.loading.load_student", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train_gkd.main([*command(saved, ANSWERS, tmp_path / "out", "--lmbda", "0"), *flags])
    assert stop.value.code != 0
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_refused_beside_a_sharded_student(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for options in ({"teacher_offload": True}, {"teacher_device": "cpu"}, {"teacher_model_name_or_path": SELF}):
        with pytest.raises(ValueError, match="needs whole weights on each GPU, but ZeRO-3 and FSDP shard"):
            GKDArguments(output_dir="x", use_cpu=True, bf16=False, fsdp=None, **options)


def test_a_packed_teacher_is_not_moved(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name in ("teacher_offload", "teacher_sharded"):
        with pytest.raises(ValueError, match=f"--{name} does not work with a 4- or 8-bit teacher"):
            GKDArguments(output_dir="x", use_cpu=True, bf16=False, teacher_load_in_4bit=True, **{name: True})


def test_the_teachers_flags_follow_the_students():
    args = GKDArguments(output_dir="x", use_cpu=True, bf16=False, teacher_model_name_or_path=SELF)
    student = SimpleNamespace(use_peft=True, student_adapter=None, model_name_or_path="hub/base", model_revision="v2")
    student.dtype, student.load_in_4bit, student.load_in_8bit = "bfloat16", True, False
    adopt_student(student, args)
    assert (args.teacher_model_name_or_path, args.teacher_revision) == ("hub/base", "v2")
    assert (args.teacher_dtype, args.teacher_load_in_4bit, args.teacher_load_in_8bit) == ("bfloat16", True, False)


def test_the_command_records_the_base_as_the_teacher(saved, tmp_path, capsys):
    import eval_gkd
    from gkd.runs.record import read_record
    from gkd.runs.results import read_results

    flags = ["--teacher_model_name_or_path", SELF, "--use_peft", "--lora_r", "4", "--max_steps", "2"]
    flags += ["--lmbda", "0.5", "--seq_kd", "True", "--eval_dataset_name", str(ANSWERS)]
    train_gkd.main([*command(saved, ANSWERS, tmp_path / "run"), *flags])
    assert read_record(tmp_path / "run")["arguments"]["teacher_model_name_or_path"] == str(saved / "student")
    inside = read_results(tmp_path / "run")
    start = next(r for r in inside if r["model"] == "before")["metrics"]
    assert start["dataset/forward_kl"]["value"] == pytest.approx(0, abs=1e-6)  # a fresh adapter changes nothing
    eval_gkd.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "evaluated")])
    outside = read_results(tmp_path / "evaluated")
    for label in ("after", "teacher"):
        one, other = (next(r for r in found if r["model"] == label) for found in (inside, outside))
        assert one["settings"] == other["settings"]
        for name in one["metrics"]:
            assert one["metrics"][name]["value"] == pytest.approx(other["metrics"][name]["value"], abs=1e-5), name
