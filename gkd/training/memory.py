"""Peak memory of a run on one GPU, estimated from the models' configs before any weight loads."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from gkd.config.training import GKDArguments, StudentArguments
from gkd.generation.static import CAST_SHARE, KEPT_SHARE, length_bucket
from gkd.losses.projection import BYTES_PER_LOGIT, chunk_tokens
from gkd.teachers.forward import MOST_TOKENS

GIB = 2**30
# NF4: half a byte a weight and an fp32 scale for each block of 64; int8: one byte and a scale a row.
_QUANTIZED_BYTES = {4: 0.5 + 4 / 64, 8: 1.0}


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of a model, and the shapes of its activations."""

    parameters: int
    linear: int  # weights of linear layers without the output head: those are quantized
    lora: int  # parameters of the adapter that the flags ask for, 0 without one
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # key and value heads × head dimension
    vocabulary: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        lora_rank: int = 0,
        targets: Iterable[str] | str | None = None,
        trust_remote_code: bool = False,
    ) -> "ModelSize":
        """Builds the model on the meta device, which takes no memory.

        Args:
            lora_rank, targets: of `--use_peft`; targets None or "all-linear" are all linear layers but the head.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        head = model.get_output_embeddings()
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        body = {name: module for name, module in linears.items() if module is not head}
        adapted = body
        if targets not in (None, "all-linear") and "all-linear" not in targets:
            adapted = {n: m for n, m in linears.items() if n.rsplit(".", 1)[-1] in targets}
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(module.weight.numel() for module in body.values()),
            lora=lora_rank * sum(m.in_features + m.out_features for m in adapted.values()),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            kv_width=(getattr(text, "num_key_value_heads", None) or heads)
            * (getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocabulary=text.vocab_size,
            dtype=text.dtype or torch.float32,
        )

    def activations(self, tokens: int) -> int:
        """Elements that one layer's forward holds."""
        return tokens * (4 * self.hidden + 3 * self.intermediate)

    def cache(self, rows: int, length: int) -> int:
        """Elements of the keys and values of all layers."""
        return 2 * self.layers * self.kv_width * rows * length

    def weights(self, dtype: torch.dtype, bits: int | None = None) -> float:
        """Bytes of the weights; `bits` is 4 or 8 for a model that bitsandbytes quantizes."""
        if bits is None:
            return self.parameters * dtype.itemsize
        return self.linear * _QUANTIZED_BYTES[bits] + (self.parameters - self.linear) * dtype.itemsize


@dataclass(frozen=True)
class Shape:
    """The largest micro-batch: rows, tokens a row, and tokens of a completion."""

    batch: int
    width: int
    completion: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU: what stays, and what each phase adds while it lasts."""

    resident: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.resident.values()) + max(self.phases.values())


@dataclass
class _Setup:
    """What each part of an estimate depends on."""

    student: ModelSize
    teacher: ModelSize | None
    student_args: StudentArguments
    args: GKDArguments
    shape: Shape
    ranks: int
    device_memory: float

    def __post_init__(self):
        args, student_args = self.args, self.student_args
        self.plugin = getattr(args, "deepspeed_plugin", None)
        self.stage = self.plugin.zero_stage if self.plugin is not None else 0
        self.bits = 4 if student_args.load_in_4bit else 8 if student_args.load_in_8bit else None
        self.compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.stored = _dtype(student_args.dtype, self.student.dtype)
        if self.bits or (
            self.stage and self.compute != torch.float32
        ):  # DeepSpeed stores weights in its compute dtype
            self.stored = self.compute
        self.trainable = self.student.lora or self.student.parameters
        self.tokens = self.shape.batch * self.shape.width
        self.teacher_dtype, self.whole_teacher = torch.float32, 0.0
        if self.teacher is not None:
            self.teacher_dtype = _dtype(args.teacher_dtype, self.teacher.dtype)
            bits = 4 if args.teacher_load_in_4bit else 8 if args.teacher_load_in_8bit else None
            self.whole_teacher = self.teacher.weights(self.teacher_dtype, bits)
        self.onloaded = self.whole_teacher if args.teacher_offload else 0  # while an offloaded teacher runs
        self.teacher_runs_here = self.teacher is not None and args.teacher_device is None


def estimate(
    student: ModelSize,
    teacher: ModelSize | None,
    student_args: StudentArguments,
    args: GKDArguments,
    shape: Shape,
    ranks: int,
    device_memory: float = 80 * GIB,
) -> Estimate:
    """Memory of one of `ranks` GPUs, which has `device_memory` bytes. No teacher: `--teacher_cache`."""
    setup = _Setup(student, teacher, student_args, args, shape, ranks, device_memory)
    resident, phases = _weights(setup), {}
    for stays, passes in (_teacher_forward(setup), _generation(setup)):
        resident |= stays
        phases |= passes
    return Estimate(resident, phases | _training(setup))


Bytes = dict[str, float]


def _weights(setup: _Setup) -> Bytes:
    """Weights, gradients and optimizer."""
    student, teacher, args = setup.student, setup.teacher, setup.args
    shards = setup.ranks if setup.stage == 3 else 1
    if args.teacher_is_student:
        teacher_here = 0
    elif args.teacher_offload or args.teacher_device is not None:
        teacher_here = teacher.vocabulary * teacher.hidden * setup.teacher_dtype.itemsize  # a copy of the head
    else:
        teacher_here = setup.whole_teacher / (setup.ranks if args.teacher_sharded else shards)
    # Of each trained weight: gradient and two moments of Adam, with an fp32 copy under ZeRO, which shards them.
    trained = torch.float32 if student.lora and not setup.stage else setup.stored
    if setup.stage:
        offloaded = str(getattr(setup.plugin, "offload_optimizer_device", "none")) == "cpu"
        optimizer = setup.trainable * (0 if offloaded else 12 / setup.ranks)
        optimizer += setup.trainable * trained.itemsize / (setup.ranks if setup.stage > 1 else 1)
    else:
        optimizer = setup.trainable * 3 * trained.itemsize
    if student.lora:
        optimizer += student.lora * trained.itemsize  # the adapter's weights come on top of the model's
    return {
        **({} if teacher is None else {"teacher": teacher_here}),
        "student": student.weights(setup.stored, setup.bits) / shards,
        "gradients and optimizer": optimizer,
    }


def _teacher_forward(setup: _Setup) -> tuple[Bytes, Bytes]:
    """What stays, and what the phase adds."""
    args = setup.args
    if not setup.teacher_runs_here:
        return {}, {}
    activations = setup.teacher.activations(setup.tokens) * setup.teacher_dtype.itemsize
    moves = args.teacher_offload or args.teacher_sharded or args.teacher_is_student or setup.stage == 3
    if args.teacher_cuda_graph and not moves and setup.tokens <= MOST_TOKENS:
        return {"teacher's CUDA graph": activations}, {}
    return {}, {"teacher forward": activations + setup.onloaded}


def _generation(setup: _Setup) -> tuple[Bytes, Bytes]:
    """What stays, and what each phase adds: one by the student, one by the teacher."""
    student, args, stage, element = setup.student, setup.args, setup.stage, setup.compute.itemsize
    resident, phases, writers = {}, {}, {}
    sampling = 4 * args.generation_batch_size * student.vocabulary * 4
    rows_of_steps = setup.shape.batch * args.gradient_accumulation_steps * args.steps_per_generation
    if args.lmbda > 0:
        merged = student.linear if student.lora and not setup.bits and stage != 3 else 0  # a copy of adapted weights
        writers["student"] = (student, element, rows_of_steps, merged * setup.stored.itemsize)
        cast = (student.linear + student.vocabulary * student.hidden) * element
        casts = setup.stored == torch.float32 != setup.compute and not (setup.bits or stage)
        if casts and cast <= CAST_SHARE * setup.device_memory:
            resident["student's weights cast for generation"] = cast
    if args.seq_kd and args.lmbda < 1 and setup.teacher_runs_here:
        in_step = stage == 3 or args.teacher_sharded
        ahead = (
            args.teacher_text_cache != "off" and not in_step
        )  # with the cache, the teacher writes for later steps too
        rows = args.generation_batch_size if ahead else rows_of_steps
        writers["teacher"] = (setup.teacher, setup.teacher_dtype.itemsize, rows, setup.onloaded)
    for name, (model, size, rows, copied) in writers.items():
        rows = min(rows, args.generation_batch_size)
        prompt = setup.shape.width - setup.shape.completion
        cache = model.cache(rows, length_bucket(setup.shape.width)) * size
        if cache <= KEPT_SHARE * setup.device_memory:
            resident[f"{name}'s decoding cache"] = cache
            cache = 0
        prefill = (model.cache(rows, prompt) + model.activations(rows * prompt)) * size
        if stage == 3:  # the generating model is gathered on each GPU
            copied += model.parameters * size * (1 - 1 / setup.ranks)
        phases[f"generation by the {name}"] = cache + prefill + sampling + copied
    return resident, phases


def _training(setup: _Setup) -> Bytes:
    """The student's forward with the divergence, and its backward."""
    student, teacher, tokens, element = setup.student, setup.teacher, setup.tokens, setup.compute.itemsize
    vocabulary = student.vocabulary if teacher is None else min(student.vocabulary, teacher.vocabulary)
    scored = min(chunk_tokens(vocabulary, "cuda"), setup.shape.batch * setup.shape.completion)
    one_layer = tokens * (12 * student.hidden + 4 * student.intermediate) * element  # what one layer's backward needs
    if setup.args.gradient_checkpointing:
        saved = student.layers * tokens * student.hidden * element
    else:
        saved = student.layers * one_layer
    # With a cache there is no kernel of ours: logits, log-probabilities and one more tensor, in fp32.
    per_logit = BYTES_PER_LOGIT if teacher is not None else 12 + element
    # A divergence without a closed form takes a quarter of the rows, with up to 16 fp32 copies for autograd.
    if setup.args.divergence != "jsd" and teacher is not None:
        per_logit = 16
    divergence = scored * vocabulary * per_logit
    if not student.lora:  # the head's gradient is summed in fp32, and a chunk's gradient added to it
        divergence += student.vocabulary * student.hidden * (4 + setup.stored.itemsize)
    backward = one_layer
    if setup.stage:  # DeepSpeed's communication buffers, allocated for the backward pass
        buckets = setup.plugin.hf_ds_config.config.get("zero_optimization", {}).get("reduce_bucket_size", 0)
        backward += min(buckets, setup.trainable) * 2 * element if isinstance(buckets, int) else 0
    return {"activations and divergence": saved + divergence, "activations and backward": saved + backward}


def _dtype(name: str | None, auto: torch.dtype) -> torch.dtype:
    return auto if name in (None, "auto") else getattr(torch, name)


def advice(estimated: Estimate, student_args: StudentArguments, args: GKDArguments) -> str:
    """The flag that saves most."""
    phase = max(estimated.phases, key=estimated.phases.get)
    smaller_batches = "a lower --per_device_train_batch_size with more --gradient_accumulation_steps"
    placed = args.teacher_device or args.teacher_offload or args.teacher_sharded or args.teacher_is_student
    smaller_teacher = "--teacher_load_in_4bit True, --teacher_offload True or, on several GPUs, --teacher_sharded True"
    remedies = {
        "teacher": None if placed or args.teacher_load_in_4bit else smaller_teacher,
        "student": None if student_args.load_in_4bit else "--use_peft --load_in_4bit, or ds_configs/zero3.yaml",
        "gradients and optimizer": None if student_args.use_peft else "--use_peft, or ds_configs/zero2_offload.yaml",
        "teacher's CUDA graph": "--teacher_cuda_graph False",
        "student's weights cast for generation": "--use_peft with --dtype bfloat16",
        "student's decoding cache": "a lower --generation_batch_size",
        "teacher's decoding cache": "a lower --generation_batch_size",
        "generation by the student": "a lower --generation_batch_size",
        "generation by the teacher": "a lower --generation_batch_size",
        "teacher forward": "--teacher_device or --teacher_sharded" if args.teacher_offload else smaller_batches,
        "activations and divergence": smaller_batches,
        "activations and backward": None if args.gradient_checkpointing else "--gradient_checkpointing",
    }
    sizes = {**estimated.resident, phase: estimated.phases[phase]}
    parts = sorted(sizes, key=sizes.get, reverse=True)
    return next((remedies[part] for part in parts if remedies[part]), smaller_batches)
