"""What an estimate of memory reads: settings of a run, and the sizes of Llama 1B and 8B, shapes without weights."""

import json
import sys
from types import SimpleNamespace

from tiny import REPO
from transformers import LlamaConfig

from gkd.training.memory import ModelSize

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
    args |= {"teacher_text_cache": "auto", "teacher_cuda_graph": True}
    args |= {"teacher_device": None, "teacher_offload": False, "teacher_sharded": False, "teacher_is_student": False}
    args["deepspeed_plugin"] = plugin if zero2 else None
    return student_args, SimpleNamespace(**(args | changes))


def sizes():
    student, teacher = (
        LlamaConfig(**random_pair.BASE, **random_pair.SHAPES[n], dtype="bfloat16") for n in ("1b", "8b")
    )
    return ModelSize.of(student, 8), ModelSize.of(teacher)
