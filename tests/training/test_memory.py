"""The estimate of a run's memory beside peaks measured on an H100."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import REPO
from transformers import LlamaConfig

from gkd.losses.projection import chunk_tokens
from gkd.training.memory import GIB, Decoding, Estimate, ModelSize, Shape

sys.path.insert(0, str(REPO / "benchmarks"))
import random_pair


def settings(bits4=False, zero2=False, **changes):
    student_args = SimpleNamespace(load_in_4bit=bits4, load_in_8bit=False, dtype="auto", use_peft=True)
    plugin = SimpleNamespace(
        zero_stage=2,
        offload_optimizer_device="none",
        hf_ds_config=SimpleNamespace(config=json.loads((REPO / "ds_configs/zero2.json").read_text())),
    )
    args = {"teacher_load_in_4bit": bits4, "teacher_load_in_8bit": False, "teacher_dtype": "auto", "bf16": True}
    args |= {
        "fp16": False,
        "gradient_checkpointing": True,
        "divergence": "jsd",
        "kd_ratio": 1.0,
        "lmbda": 0.5,
        "seq_kd": True,
    }
    args |= {"gradient_accumulation_steps": 2, "generation_batch_size": 64, "steps_per_generation": 1}
    args |= {"generation_backend": "auto", "vllm_memory": 0.3}
    args |= {"teacher_text_cache": "auto", "teacher_text_url": None, "teacher_cuda_graph": True}
    args |= {
        "teachers": None,
        "teacher_device": None,
        "teacher_offload": False,
        "teacher_sharded": False,
        "teacher_is_student": False,
        "uses_fsdp": False,
        "cross_tokenizer": "off",
    }
    args["deepspeed_plugin"] = plugin if zero2 else None
    args["teacher_devices"] = [torch.device(d) for d in (changes.get("teacher_device") or "").split(",") if d]
    args |= changes
    args |= {"student_writes": args["lmbda"] > 0, "is_supervised": args["lmbda"] < 1}  # properties of the flags
    return student_args, SimpleNamespace(**args)


def sizes():
    student, teacher = (
        LlamaConfig(**random_pair.BASE, **random_pair.SHAPES[n], dtype="bfloat16") for n in ("1b", "8b")
    )
    return ModelSize.of(student, 8), ModelSize.of(teacher)


# Peaks of torch.cuda.max_memory_allocated on H100 80GB (torch 2.11, transformers 5.23), shapes of Llama 1B and 8B, LoRA
# of rank 8, gradient checkpointing: benchmarks/step_time.py, shapes seed (3 × 192 tokens) and long (4 × 1024).
@pytest.mark.parametrize(
    ("measured", "shape", "changes"),
    [
        (17.96, Shape(3, 192, 128), {"lmbda": 0.0, "seq_kd": False}),
        (18.73, Shape(4, 1024, 768), {"lmbda": 0.0, "seq_kd": False}),
        (19.40, Shape(3, 192, 128), {"lmbda": 1.0}),
        (20.56, Shape(3, 192, 128), {"lmbda": 0.5}),
    ],
    ids=["seed", "long", "seed, on-policy", "seed, mix"],
)
def test_estimate_is_near_the_measured_peak(measured, shape, changes):
    student, teacher = sizes()
    found = Estimate(student, [teacher], *settings(**changes), shape, 1)
    print(f"estimated {found.peak / GIB:.2f} GiB, measured {measured}")
    assert found.peak / GIB == pytest.approx(measured, rel=0.05)


def test_an_engine_takes_its_share_while_it_writes():
    student, teacher = sizes()
    vllm = {"generation_backend": "vllm", "vllm_memory": 0.4}
    found = Estimate(student, [teacher], *settings(**vllm), Shape(3, 192, 128), 1, device_memory=80 * GIB)
    merged = student.linear * 2
    assert found.phases["generation by the student"] == 32 * GIB + merged
    assert found.phases["generation by the teacher"] == 32 * GIB
    assert "student's decoding cache" not in found.resident
    assert found.advice() == "a lower --vllm_memory"
    packed = settings(**vllm, teacher_load_in_4bit=True)
    found = Estimate(student, [teacher], *packed, Shape(3, 192, 128), 1, device_memory=80 * GIB)
    assert found.phases.get("generation by the teacher", 0) < 2 * GIB


def test_when_vllm_should_be_faster():
    """Where few of the rows fit, of a student that an engine can have, beside what trains."""
    student, teacher = sizes()

    def found(rows=64, cap=16384, memory=140, **changes):
        changes = {"lmbda": 1.0, "generation_batch_size": 256, "gradient_accumulation_steps": rows // 4} | changes
        shape = Shape(4, 256 + cap, cap)
        return Estimate(student, [teacher], *settings(**changes), shape, 1, device_memory=memory * GIB)

    assert found().decoding == Decoding(64, 44, 20480, 2**15)  # as benchmarks/RESULTS.md has it
    assert found().vllm_advice() is None  # two rounds
    assert found(rows=256).decoding.fit == 44
    said = found(rows=256).vllm_advice()
    assert said.startswith("256 texts of the student decode 44 at a time, since each keeps room for 20,480 tokens.")
    mean = int((0.3 * 140 * GIB - student.parameters * 2) / (256 * 2**15))
    assert f"texts have at most {mean:,} tokens on average" in said
    assert mean == 5081
    for refused in (
        found(rows=256, generation_backend="vllm"),
        found(rows=256, uses_fsdp=True),
        found(rows=256, cross_tokenizer="shared"),
        found(rows=256, bits4=True),
        found(rows=256, lmbda=0.0),
        found(rows=256, cap=4096),  # all fit
        found(rows=256, generation_batch_size=64),  # two rounds for each 64
        found(rows=1024, generation_batch_size=1024),  # not measured
        found(rows=256, memory=24),  # no room for an engine beside the teacher
        found(rows=256, memory=80, vllm_memory=0.05),  # none for prompts
        found(rows=64, cap=120_000, memory=80),  # fewer at a time than measured
    ):
        assert refused.vllm_advice() is None


def test_sizes_and_advice():
    student, teacher = sizes()
    assert student.parameters == 1_235_814_400  # as published for Llama-3.2-1B
    assert teacher.parameters == 8_030_261_248  # Llama-3.1-8B
    student_args, args = settings()
    found = Estimate(student, [teacher], student_args, args, Shape(3, 352, 128), 1)
    assert found.advice().startswith("--teacher_load_in_4bit")
    full = Estimate(ModelSize.of(LlamaConfig(**random_pair.BASE, **random_pair.SHAPES["1b"])), [teacher], student_args, args, Shape(3, 352, 128), 1)  # fmt: skip
    assert full.resident["gradients and optimizer"] == 3 * 4 * student.parameters
    cast = (student.linear + 128256 * 2048) * 2  # fp32 weights under bf16 autocast
    assert full.resident["student's weights cast for generation"] == cast
    assert "student's weights cast for generation" not in found.resident
    top_k, hidden = (
        Estimate(student, [], student_args, args, Shape(3, 352, 128), 1, head_size=size)
        for size in (None, (128256 * 8192, 8192))
    )
    more = {"teacher's head": 128256 * 8192, "teacher's hidden states of a step": 2 * 3 * 128 * 8192}
    assert hidden.resident == more | top_k.resident  # and no teacher
    assert hidden.phases["activations and divergence"] == found.phases["activations and divergence"]
    head = 128256 * 2048 * (4 + 4)
    assert full.phases["activations and divergence"] == found.phases["activations and divergence"] + head


def test_memory_knows_where_the_teacher_is():
    student, teacher = sizes()

    def found(**changes):
        return Estimate(student, [teacher], *settings(lmbda=0.0, **changes), Shape(3, 192, 128), 2)

    plain = found()
    whole = plain.resident["teacher"]
    head = 128256 * 4096 * 2
    assert found(teacher_is_student=True).resident["teacher"] == 0
    elsewhere = found(teacher_text_url="http://a/v1")  # its text
    for one, other in ((plain.resident, elsewhere.resident), (plain.phases, elsewhere.phases)):
        assert {name for name in one if name not in other} <= {"teacher's decoding cache", "generation by the teacher"}
    assert "generation by the teacher" in plain.phases.keys() - elsewhere.phases.keys()
    assert found(teacher_sharded=True).resident["teacher"] == whole / 2
    # Within a machine of two, where that takes at most a quarter of a GPU.
    for memory, shards in ((2.1 * whole, 2), (1.9 * whole, 4)):
        args = (student, [teacher], *settings(lmbda=0.0, teacher_sharded=True), Shape(3, 192, 128), 4, memory, 2)
        assert Estimate(*args).resident["teacher"] == whole / shards
    states = 3 * 2 * 128 * 4096 * 2
    assert found(teacher_sharded=True).resident["teacher's hidden states"] == states
    assert "teacher's hidden states" not in plain.resident
    # Micro-batches that it reads together.
    long = Estimate(student, [teacher], *settings(teacher_sharded=True), Shape(8, 1024, 128), 2)
    alone = Estimate(student, [teacher], *settings(teacher_is_student=True), Shape(8, 1024, 128), 2)
    assert long.phases["teacher forward"] == 2 * alone.phases["teacher forward"]
    for options in ({"teacher_device": "cuda:1"}, {"teacher_offload": True}):
        assert found(**options).resident["teacher"] == head
    away, offloaded = found(teacher_device="cuda:1"), found(teacher_offload=True)
    assert found(teacher_device="cuda").phases.keys() == plain.phases.keys()
    half = found(teacher_device="cuda:0,cuda:1").resident["teacher"]
    assert half == pytest.approx(found().resident["teacher"] / 2 + away.resident["teacher"])
    assert not {"teacher forward", "generation by the teacher"} & away.phases.keys()
    assert offloaded.phases["teacher forward"] > whole
    assert offloaded.phases["generation by the teacher"] == pytest.approx(
        plain.phases["generation by the teacher"] + whole
    )
    assert "offload" not in offloaded.advice()


def test_memory_of_several_teachers():
    student, teacher = sizes()
    adapted = replace(teacher, lora=10**7, readers=2)

    def found(*models, width=192, head_size=None, **changes):
        flags = {"lmbda": 0.0, "teachers": ["a", "b", "c"]} | changes
        return Estimate(student, list(models), *settings(**flags), Shape(3, width, 128), 1, head_size=head_size)

    one, both = found(teacher, teachers=None), found(teacher, adapted)
    whole = one.resident["teacher"]
    assert both.resident["teacher"] == 2 * whole + 4 * 10**7
    graph = one.resident["teacher's CUDA graph"]
    assert both.resident["teacher's CUDA graph"] == 3 * graph  # one of each adapter
    cache = one.resident["teacher's decoding cache"]
    assert both.resident["teacher's decoding cache"] == 2 * cache
    merged = 2 * teacher.linear  # a copy, while an adapter is merged
    assert both.phases["generation by the teacher"] == one.phases["generation by the teacher"] + merged
    packed = found(adapted, teacher_load_in_4bit=True)
    assert packed.phases["generation by the teacher"] == one.phases["generation by the teacher"]
    logits = min(chunk_tokens(128256, "cuda"), 3 * 128) * 128256
    apart = [e.phases["activations and divergence"] for e in (one, both)]
    assert apart[1] - apart[0] == logits * 4 * (2 + 4)
    # Too long for a graph: they read one after the other.
    forward = [found(*models, width=8192).phases["teacher forward"] for models in ([teacher], [teacher, adapted])]
    assert forward[0] == forward[1]
    head = 128256 * 8192
    assert found(teacher, adapted, teacher_device="cuda:1").resident["teacher"] == 2 * head
    served = found(adapted, head_size=(2 * head, 0))
    assert served.resident["teacher"] == whole + 4 * 10**7
    assert served.resident["teacher's head"] == 2 * head
    assert "offload" not in both.advice()
