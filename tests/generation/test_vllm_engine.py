"""`--generation_backend vllm`: its text is transformers', with the weights of the moment, and what goes wrong is one line.

Each test of text runs with a stand-in for vLLM, a model of transformers behind vLLM's calls, and with vLLM where it is
installed (tests/vllm_cpu.sh): a stand-in can't show that vLLM takes our weights, nor vLLM what a run repeats.
"""

import json
import re
import sys
from importlib.metadata import requires
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from peft import LoraConfig, get_peft_model
from progress import run
from prompts import MASK, PROMPTS, config
from tiny import REPO, ROWS, TINY, make_model, make_tokenizer
from trainers import losses, make_trainer, weights
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm_engines import SHAPE, needs_vllm

from gkd import evaluate
from gkd.cli import checks
from gkd.config.generation import VLLM_VERSIONS, GenerationArguments
from gkd.data.batch import unpadded_rows
from gkd.generation import vllm
from gkd.generation.generator import CompletionGenerator, complete
from gkd.generation.vllm import EngineFailed, VllmGenerator, named_weights
from gkd.io.errors import RunStopped
from gkd.runs.checkpoints import last_whole
from gkd.training.setup import start_engines

pytest_plugins = ["vllm_engines"]  # its fixtures
ARGS = SimpleNamespace(vllm_memory=0.3)


def make_student(kind="llama", **options):
    if kind == "llama":
        return make_model(0, **SHAPE, **options)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY | SHAPE | {"tie_word_embeddings": True} | options))


def write(generator, model, seed=3, **options):
    return complete(model, Accelerator(), generator, PROMPTS, MASK, config(**{"max_new_tokens": 20} | options), seed)


def assert_same_text(generator, model, **options):
    found = write(generator, model, **options)
    for one, other in zip(found, write(CompletionGenerator("dynamic"), model, **options), strict=True):
        assert one.tolist() == other.tolist()
    return found


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_text_is_transformers_before_and_after_training(engines, train, kind, adapter):
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if adapter else None
    student = make_student(kind)
    teacher = make_model(1, **SHAPE)
    options = {"peft_config": peft, "lmbda": 1.0, "max_steps": 10, "learning_rate": 1e-2, "run": False}
    trainer = train(student, teacher, generation_backend="vllm", **options)
    before, bits = assert_same_text(trainer.generator, trainer.model), weights(trainer)
    assert all(weight.equal(bits[name]) for name, weight in weights(trainer).items())
    trainer.train()
    after = assert_same_text(trainer.generator, trainer.model)
    assert before[0].tolist() != after[0].tolist()
    assert trainer.state.log_history[-2]["on_policy/completion_length"] > 0


def test_text_ends_at_each_stop_token_and_has_it(engines):
    model, generator = make_student(), VllmGenerator(ARGS)
    plain = write(generator, model, eos_token_id=None)[0]
    assert plain.shape == (3, 20)
    stops = [int(plain[0, 4]), int(plain[1, 9])]
    ids, mask = assert_same_text(generator, model, eos_token_id=stops, pad_token_id=5)
    assert [row[-1] in stops for row in unpadded_rows(ids, mask)] == [True, True, mask[2].sum() < 20]
    assert (ids[~mask.bool()] == 5).all()


def test_sampling_repeats_by_its_seed_and_rows_differ(engines):
    model, generator = make_student(), VllmGenerator(ARGS)
    state = torch.get_rng_state()
    options = {"do_sample": True, "temperature": 2.0, "eos_token_id": None, "suppress_tokens": list(range(200, 264))}
    first, again, other = (write(generator, model, seed, **options)[0] for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert int(torch.cat([first, other]).max()) < 200  # padding ids are never sampled
    assert torch.get_rng_state().equal(state)
    prompt = PROMPTS[1:2].expand(3, -1)
    settings = config(max_new_tokens=20, **options)
    ids, _ = complete(model, Accelerator(), generator, prompt, torch.ones_like(prompt), settings, 1)
    assert len({tuple(row) for row in ids.tolist()}) == 3


@needs_vllm
def test_it_samples_from_the_models_distribution():
    """What a token costs is on average the entropy of the distribution that it is drawn from."""
    model = make_student()
    prompt = PROMPTS[1:2].expand(600, -1)
    settings = config(max_new_tokens=12, do_sample=True, temperature=1.0)
    ids, mask = complete(model, Accelerator(), VllmGenerator(ARGS), prompt, torch.ones_like(prompt), settings, 1)
    with torch.no_grad():
        log_probs = model(torch.cat([prompt, ids], 1)).logits.log_softmax(-1)[:, prompt.shape[1] - 1 : -1]
    cost, entropy = -log_probs.gather(2, ids[..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)
    off = (cost - entropy)[mask.bool()]
    assert len(off) > 5000
    assert abs(off.mean()) < 3 * off.std() / len(off) ** 0.5
    assert off.std() / len(off) ** 0.5 < 0.03


def test_both_writers_by_engines_of_their_own(engines, train):
    teacher = make_model(1, hidden_size=192, num_attention_heads=3, num_key_value_heads=1)
    flags = {"lmbda": 0.5, "seq_kd": True, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
    trainer = train(make_student(), teacher, generation_backend="vllm", **flags)
    if not engines:
        assert len(vllm._ENGINES) == 2
    logged = {name for log in trainer.state.log_history for name in log}
    assert {"on_policy/loss", "teacher/loss"} <= logged
    seconds = [log["seconds_generating"] for log in trainer.state.log_history if "seconds_generating" in log]
    assert min(seconds) >= 0  # without the start of engines
    assert_same_text(trainer.generator, trainer.teacher.inner)


def test_a_run_resumes(engines, tmp_path):
    """With the stand-in, whose sums do not depend on other rows, to the same weights."""
    flags = {"lmbda": 1.0, "generation_backend": "vllm"}

    def trainer(folder):
        return make_trainer(tmp_path / folder, student=make_student(), **flags)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/run/checkpoint-1"))
    assert resumed.state.global_step == 3
    assert losses(resumed)[0] == losses(whole)[0]
    assert all(torch.isfinite(torch.tensor(losses(resumed))))
    if not engines:
        assert losses(resumed) == losses(whole)
        assert all(weight.equal(weights(whole)[name]) for name, weight in weights(resumed).items())


def save_models(folder):
    """Two students of one shape and a teacher of another, and rows."""
    for name, seed, width in (("student", 0, 128), ("other", 1, 128), ("teacher", 2, 192)):
        make_model(seed, hidden_size=width, num_attention_heads=width // 64, num_key_value_heads=1).save_pretrained(
            folder / name
        )
        make_tokenizer().save_pretrained(folder / name)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "many.json").write_text(json.dumps([row for n in range(16) for row in ROWS]))


def evaluated(folder, backend, students, rows, **flags):
    """The figures of each student by name; of the teacher none."""
    flags |= {"dataset_name": str(folder / rows), "max_new_tokens": 12, "output_dir": str(folder / backend / rows)}
    flags |= {"teacher_model_name_or_path": str(folder / "teacher"), "generation_backend": backend}
    results = evaluate([folder / name for name in students], **flags)
    return {r["model"]: r["metrics"] for r in results if r["model"] != "teacher"}


def test_evaluations_write_by_engines_too(engines, tmp_path, groups_stay):
    """Three models of two shapes by two engines, with the figures that gkd's own decoder gets."""
    save_models(tmp_path)
    found, wanted = (evaluated(tmp_path, by, ["student", "other"], "rows.json") for by in ("vllm", "dynamic"))
    assert found.keys() == wanted.keys() == {"student", "other"}
    for name, figures in wanted.items():
        assert found[name]["on_policy/loss"]["value"] == pytest.approx(figures["on_policy/loss"]["value"], rel=1e-5)


def test_sampled_evaluations_differ_by_their_noise(engines, tmp_path, groups_stay):
    """Of 64 rows: by less than both intervals of a figure together, five standard errors."""
    save_models(tmp_path)
    found, wanted = (
        evaluated(tmp_path, by, ["student"], "many.json", eval_temperature=1.0, seed=3)["student"]
        for by in ("vllm", "dynamic")
    )
    sampled = [name for name in wanted if name.startswith("on_policy/") and wanted[name]["low"] < wanted[name]["high"]]
    assert "on_policy/loss" in sampled
    for name in sampled:
        widths = [figures[name]["high"] - figures[name]["low"] for figures in (found, wanted)]
        assert abs(found[name]["value"] - wanted[name]["value"]) < sum(widths), name
    assert found["on_policy/loss"]["value"] != wanted["on_policy/loss"]["value"]


@needs_vllm
def test_each_rank_has_an_engine(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run([*torchrun, str(REPO / "tests/workers/vllm_worker.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second


# ---------------------------------------------------------------------- what goes wrong


def test_an_engine_that_breaks_ends_the_run_with_a_checkpoint(stand_in, tmp_path):
    def trainer(folder):
        flags = {"lmbda": 1.0, "generation_backend": "vllm", "save_strategy": "no"}
        return make_trainer(tmp_path / folder, student=make_student(), **flags)

    whole = trainer("whole")
    whole.train()
    stand_in.breaks_after = 8  # the other run had four; the first is before training
    broken = trainer("broken")
    with pytest.raises(RunStopped) as stopped:
        broken.train()
    message = str(stopped.value)
    assert (
        "LlamaForCausalLM wrote: RuntimeError: EngineCore encountered an issue. --generation_backend auto" in message
    )
    assert message.endswith("checkpoint-2 is whole: go on with it by --resume_from_checkpoint auto.")
    checkpoint, problems = last_whole(tmp_path / "broken/run")
    assert not problems
    stand_in.breaks_after = None
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 3
    assert all(weight.equal(weights(whole)[name]) for name, weight in weights(resumed).items())


def test_an_engine_that_does_not_start_ends_the_run_before_training(stand_in, train, monkeypatch):
    with pytest.raises(
        EngineFailed, match="did not start for LlamaForCausalLM: Free memory on device is less. --vllm_mem"
    ):
        train(make_student(), lmbda=1.0, generation_backend="vllm", vllm_memory=0.95)
    train(make_student(), lmbda=0.0, generation_backend="vllm", vllm_memory=0.95)  # nobody writes
    write(VllmGenerator(ARGS), make_student())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # as after Accelerator.end_training
    with pytest.raises(EngineFailed, match="a run before has ended what the engines of this process share"):
        write(VllmGenerator(SimpleNamespace(vllm_memory=0.95)), make_student())


def test_an_adapter_that_cannot_be_merged_ends_the_run_before_training(stand_in, train):
    peft = LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    with pytest.raises(EngineFailed, match="needs the adapter of LlamaForCausalLM merged"):
        train(make_student(tie_word_embeddings=True), lmbda=1.0, generation_backend="vllm", peft_config=peft)


def test_weights_that_are_not_finite_do_not_write(stand_in):
    model = make_student()
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(RunStopped, match="The weights of LlamaForCausalLM are not finite"):
        write(VllmGenerator(ARGS), model)


def test_weights_that_vllm_lacks_are_noticed(stand_in, monkeypatch):
    monkeypatch.setattr(vllm, "named_weights", lambda *given: [*named_weights(*given)][:-1])
    with pytest.raises(EngineFailed, match="it has weights that the model lacks, such as lm_head.weight"):
        write(VllmGenerator(ARGS), make_student())


def test_a_quantized_teacher_writes_without_vllm(stand_in):
    model, generator = make_student(), VllmGenerator(ARGS)
    model.is_quantized = True
    assert_same_text(generator, model)
    assert not stand_in.made


def test_a_quantized_student_is_refused(stand_in, train):
    trainer = train(make_student(), lmbda=1.0, run=False)
    trainer.args.generation_backend, trainer.model.is_quantized = "vllm", True
    with pytest.raises(ValueError, match="can't have the student: its weights are quantized"):
        start_engines(trainer)


@pytest.mark.parametrize("by", ["flag", "config"])
def test_a_quantized_student_is_refused_before_it_loads(by, monkeypatch):
    config = SimpleNamespace(quantization_config={"load_in_4bit": True})
    monkeypatch.setattr(checks, "rehearse", lambda *_: SimpleNamespace(config=config))
    monkeypatch.setattr(checks.models, "student_options", lambda *_: {})
    student = SimpleNamespace(model_name_or_path="STUDENT", load_in_4bit=by == "flag", load_in_8bit=False)
    with pytest.raises(ValueError, match="takes plain weights, and the student's are quantized"):
        checks.check_student(student, SimpleNamespace(generation_backend="vllm"))


def test_sharded_students_are_refused():
    with pytest.raises(ValueError, match="--generation_backend vllm needs whole weights on each GPU"):
        VllmGenerator(ARGS, sharded=True)
    with pytest.raises(ValueError, match="not ZeRO-3 or FSDP: use ZeRO-2 or DDP"):
        checked(sharded=True)


def checked(installed="0.31.0", memory=0.3, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gkd.config.generation.need", lambda *_: None)
        patch.setattr("gkd.config.generation.version", lambda _: installed)
        GenerationArguments("vllm", memory).check_generation(**options)


def test_flags_are_checked(monkeypatch):
    for installed in ("0.22.0", "0.25.1", "0.31.0+cpu"):
        checked(installed)
    for installed in ("0.21.9", "0.32.0"):
        with pytest.raises(ValueError, match=rf"works with vLLM >=0.22,<0.32, not {installed}: pip install"):
            checked(installed)
    (of_trl,) = (word for word in map(Requirement, requires("trl")) if word.name == "vllm")
    (of_gkd,) = re.findall(r'"vllm(.+?);', (REPO / "pyproject.toml").read_text())
    assert of_gkd == VLLM_VERSIONS
    for installed in ("0.21.9", "0.22.0", "0.31.0", "0.32.0"):
        assert of_trl.specifier.contains(installed) == SpecifierSet(VLLM_VERSIONS).contains(installed)
    with pytest.raises(ValueError, match="--vllm_memory is a share of the GPU's memory, between 0 and 1, not 1"):
        checked(memory=1.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    checked(in_step=True)
    with pytest.raises(ValueError, match="works in a single process here"):
        checked()


# ---------------------------------------------------------------------- what an engine gets


@pytest.mark.parametrize("tied", [False, True])
def test_names_are_those_of_a_saved_model(tied):
    """With an adapter merged or disabled, and with a head of its own."""
    base = make_student(tie_word_embeddings=tied)
    expected = {name: weight.clone() for name, weight in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]))
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    trained.data += 1
    with model.disable_adapter():
        found = dict(named_weights(model, 264))
        assert found.keys() == expected.keys()
        assert all(weight.equal(expected[name]) for name, weight in found.items())
    found = dict(named_weights(model, 200))
    assert found.keys() == expected.keys() | {"lm_head.weight"}
    assert found["lm_head.weight"].equal(trained[:200])
    assert found["model.embed_tokens.weight"].shape == (200, 128)


def test_a_head_of_its_own_is_not_tied_in_an_engine(stand_in):
    base = make_student(tie_word_embeddings=True)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
    generator = VllmGenerator(ARGS)
    ids, _ = assert_same_text(generator, model)
    with model.disable_adapter():
        assert assert_same_text(generator, model)[0].tolist() != ids.tolist()


def test_an_engine_computes_in_autocasts_dtype(stand_in):
    model, generator = make_student(), VllmGenerator(ARGS)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            generator(model, PROMPTS, MASK, config())
    assert [engine.model.dtype for engine in stand_in.made] == [torch.bfloat16, torch.float32]
    assert model.dtype is torch.float32


def test_an_engine_sleeps_on_a_gpu_but_while_it_writes(stand_in):
    model = make_student()
    write(VllmGenerator(ARGS), model)
    (engine,) = stand_in.made
    engine.calls.clear()
    sampling = vllm.sampling_parameters(config(), 1, 1, 264)
    vllm._completions(engine, dict(named_weights(model, 264)), [[20, 21]], sampling, torch.device("cuda"))
    assert engine.calls == ["wake weights", "load", "wake kv_cache", "generate", "sleep 2"]
