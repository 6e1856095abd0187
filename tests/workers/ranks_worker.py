"""Started by test_two_ranks.py and test_sharded.py under torchrun: one optimizer step a case; rank 0 saves the gradients.

torchrun --nproc_per_node 2 tests/workers/ranks_worker.py OUT.pt WRAPPER ACCUMULATION KIND:WRITER...

WRAPPER is ddp, fsdp2, zero2 or zero3; ddp+sharded and zero2+sharded shard the teacher alone, ddp+machines within each of
two machines, which are half of the ranks each. WRITER is 0 (the dataset), 1
(the student) or teacher.
"""

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer
from torch.distributed.tensor import DTensor
from trainers import FLAGS

from gkd.config.training import GKDArguments
from gkd.losses import objective
from gkd.models.heads import base_of, hidden_at_scored, last_hidden_states
from gkd.training.trainer import GKDTrainer

# Rows of very different length, one without an answer: the mean of means is not the mean.
ROWS = [("one?", "1"), ("say a lot", "much and more and more"), ("hm?", ""), ("two?", "2, or 3")]
MORE = [
    ("three?", "3"),
    ("tell all", "word by word, " * 4),
    ("so?", "yes"),
    ("what is the longest answer of all?", "this " * 12),
]

# What `accelerate launch --config_file ds_configs/fsdp2.yaml` sets.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def rows_of(ranks: int) -> list[tuple[str, str]]:
    """Question and answer of the rows of the step, as many as there are ranks or more."""
    return ROWS if ranks <= len(ROWS) else ROWS + MORE


def make_student(kind: str):
    """`full`: all weights train, `double`: in float64; `tied`: one for embedding and head. `lora`, `lora_head`: an adapter, on the head too;
    `lora_self`: its base is its teacher."""
    model = make_model(0, tie_word_embeddings=kind == "tied")
    if kind.startswith("lora"):  # weights that are not zero: both halves get a gradient
        targets = ["q_proj", "down_proj", "lm_head"] if kind == "lora_head" else "all-linear"
        model = get_peft_model(model, LoraConfig(target_modules=targets, r=4, init_lora_weights=False))
    return model.double() if kind == "double" else model


def make_teacher(kind: str):
    model = make_model(0 if kind == "lora_self" else 1)
    return model.double() if kind == "double" else model


def watch_teacher(trainer: GKDTrainer, kind: str) -> dict:
    """Fills in, when the step is prepared: the forwards of each rank, its micro-batches, and how far the hidden states are
    from those of the whole teacher on single micro-batches."""
    teacher, plain, seen = trainer.teacher, make_teacher(kind).eval(), {}
    prepare, hidden = teacher.prepare, teacher._hidden

    def watched(batches):
        forwards = []
        with patch.object(teacher, "_hidden", lambda *inputs: (forwards.append(1), hidden(*inputs))[1]):
            prepare(batches)
        counts = torch.tensor([[len(forwards), len(batches)]])
        seen["forwards"], seen["batches"] = trainer.accelerator.gather(counts).T.tolist()
        with torch.no_grad():
            expected = [hidden_at_scored(partial(last_hidden_states, plain), *b.teacher_inputs) for b in batches]
        seen["error"] = max(
            float((batch.teacher_output - states).abs().max() / states.abs().max())
            for batch, states in zip(batches, expected, strict=True)
            if len(states)
        )

    teacher.prepare = watched
    return seen


def one_step(kind: str, writer: str, accumulation: int, wrapper: str, sharded_teacher: bool) -> dict:
    deepspeed = wrapper.startswith("zero")
    own = kind == "lora_self"
    pairs = rows_of(int(os.environ["WORLD_SIZE"]))
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    flags = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "max_new_tokens": 9,
        "max_grad_norm": 0.0,
        "lmbda": float(writer == "1"),
        "seq_kd": writer == "teacher",
        "teacher_sharded": sharded_teacher and not own,
        "teacher_model_name_or_path": "self" if own else None,
        # (all but) greedy: the noise differs per rank on purpose, the comparison is of one text
        "temperature": 1e-4,
        "gradient_checkpointing": wrapper != "ddp",  # which recomputes layers whose weights have been sharded again
        "use_cpu": not deepspeed,  # with it accelerate would leave DeepSpeed out
        "train_sampling_strategy": "sequential",
        "eval_on_start": True,
        "per_device_eval_batch_size": len(rows),  # one batch of all rows: the other ranks have none
        "deepspeed": str(REPO / f"ds_configs/{wrapper}.json") if deepspeed else None,
    }
    args = GKDArguments(output_dir=tempfile.mkdtemp(), **(FLAGS | flags))
    if wrapper == "fsdp2":
        assert args.device.type == "cpu"
        # accelerate lets GPUs alone shard
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = GKDTrainer(
        make_student(kind),
        None if own else make_teacher(kind),
        args,
        None,
        Dataset.from_list(rows),
        Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    weight = next(base_of(trainer.accelerator.unwrap_model(trainer.teacher_model)).model.layers.parameters())
    sharded = wrapper == "fsdp2" or (sharded_teacher and not own)
    assert isinstance(weight, DTensor) == sharded, "the teacher's weights are sharded"
    assert hasattr(weight, "ds_id") == (wrapper == "zero3")
    shards = weight.device_mesh.size() if sharded else 1
    ahead = watch_teacher(trainer, kind) if sharded or wrapper == "zero3" else {}
    grads = {}

    def keep(*_args, **_kwargs):
        for name, p in trainer.model.named_parameters():
            if deepspeed and p.requires_grad:
                grads[name] = safe_get_full_grad(p).clone()
            elif p.grad is not None:
                grads[name] = p.grad.full_tensor() if wrapper == "fsdp2" else p.grad.clone()

    if deepspeed:
        from deepspeed import DeepSpeedEngine
        from deepspeed.utils import safe_get_full_grad

        step = DeepSpeedEngine.step
        with patch.object(DeepSpeedEngine, "step", lambda *a, **k: (keep(), step(*a, **k))[1]):
            trainer.train()
    else:
        original = trainer.create_optimizer

        def create(*a, **k):
            optimizer = original(*a, **k)
            optimizer.register_step_pre_hook(keep)
            return optimizer

        trainer.create_optimizer = create
        trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    tokens = sum(int((batch.input_ids != 0).sum()) for batch in trainer.step.batches)
    tokens = trainer.accelerator.gather(torch.tensor([tokens])).tolist()  # of each rank, after rows were dealt to them
    return {
        "loss": log["loss"],
        "log": log,
        "grads": grads,
        "evaluated": evaluated,
        "tokens": tokens,
        "shards": shards,
    } | ahead


def main(out: str, wrapper: str, accumulation: str, *cases: str) -> None:
    wrapper, _, teacher = wrapper.partition("+")
    if wrapper == "fsdp2":
        os.environ |= FSDP2
    if wrapper.startswith("zero"):
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        os.environ.pop("ACCELERATE_USE_CPU", None)
    if wrapper != "ddp" or teacher:
        objective.chunk_tokens = lambda *_: 5  # ranks have different numbers of chunks
    if teacher == "machines":
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // 2)
    found = {}
    for case in cases:
        kind, writer = case.split(":")
        found[case] = one_step(kind, writer, int(accumulation), wrapper, teacher in ("sharded", "machines"))
    if os.environ["RANK"] == "0":
        torch.save(found, out)
    # Not through the interpreter's end: a gloo thread that frees its last tensor meanwhile waits for a GIL that is
    # gone, and aborts the process (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
