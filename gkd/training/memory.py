"""Peak memory of a run on one GPU, estimated from the models' configs before any weight loads."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from gkd.config.generation import VLLM
from gkd.config.training import GKDArguments, StudentArguments
from gkd.generation.static import CAST_SHARE, KEPT_SHARE, PROMPT_TOKENS, length_bucket, rows_of_share
from gkd.losses.projection import BYTES_PER_LOGIT, chunk_tokens
from gkd.models.graphs import MOST_TOKENS
from gkd.models.sharding import ranks_that_share
from gkd.teachers.ahead import MOST_TOGETHER, STATES_SHARE

GIB = 2**30
# NF4: half a byte a weight and an fp32 scale for each block of 64; int8: one byte and a scale a row.
_QUANTIZED_BYTES = {4: 0.5 + 4 / 64, 8: 1.0}


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of a model, and the shapes of its activations."""

    parameters: int
    linear: int  # weights of linear layers without the output head: those are quantized
    lora: int  # parameters of adapters beside the weights, 0 without one
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # key and value heads × head dimension
    vocabulary: int
    dtype: torch.dtype
    readers: int = 1  # see `gkd.models.pairing.Loaded`

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
        body = adapted = [module for module in linears.values() if module is not head]
        if targets not in (None, "all-linear") and "all-linear" not in targets:
            adapted = [m for name, m in linears.items() if name.rsplit(".", 1)[-1] in targets]
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(module.weight.numel() for module in body),
            lora=lora_rank * sum(m.in_features + m.out_features for m in adapted),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
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
class Decoding:
    """How gkd's own decoder writes the student's text of a step.

    Attributes:
        rows: those that --generation_batch_size lets decode together.
        fit: those for whose cache there is memory.
        width: tokens that the cache of each has room for.
        token_bytes: of the keys and values of one.
    """

    rows: int
    fit: int
    width: int
    token_bytes: int


@dataclass
class Estimate:
    """Memory of one of `ranks` GPUs, which has `device_memory` bytes.

    Attributes:
        teachers: those in this process; none with `--teacher_cache` or `--teacher_url`.
        local_ranks: of each machine; 0 where there is one machine.
        head_size: of a cache with the teacher's hidden states or of servers, see `gkd.teachers.base.Teacher`.
        resident, phases: bytes by name: what stays, and what each phase adds while it lasts.
        decoding: None where the student writes no text, or not by gkd's own decoder.
    """

    student: ModelSize
    teachers: list[ModelSize]
    student_args: StudentArguments
    args: GKDArguments
    shape: Shape
    ranks: int
    device_memory: float = 80 * GIB
    local_ranks: int = 0
    head_size: tuple[int, int] | None = None

    def __post_init__(self):
        args, student_args = self.args, self.student_args
        self._plugin = getattr(args, "deepspeed_plugin", None)
        self._stage = self._plugin.zero_stage if self._plugin is not None else 0
        self._bits = 4 if student_args.load_in_4bit else 8 if student_args.load_in_8bit else None
        self._compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self._stored = _dtype(student_args.dtype, self.student.dtype)
        # DeepSpeed stores weights in its compute dtype.
        if self._bits or (self._stage and self._compute != torch.float32):
            self._stored = self._compute
        self._trainable = self.student.lora or self.student.parameters
        self._tokens = self.shape.batch * self.shape.width
        self.resident: dict[str, float] = {}
        self.phases: dict[str, float] = {}
        self.decoding: Decoding | None = None
        self._onloaded = 0.0  # while an offloaded teacher runs
        if self.teachers:
            self.resident["teacher"] = sum(map(self._of_teacher, self.teachers))
        if self.head_size is not None:
            head, position = self.head_size
            positions = self.shape.batch * args.gradient_accumulation_steps * self.shape.completion
            self.resident["teacher's head"] = head
            self.resident["teacher's hidden states of a step"] = positions * position
        self._add_student()
        if self.teachers and self._teacher_share:
            self._add_teacher_forward()
        self._add_generation()
        self._add_training()

    @property
    def peak(self) -> float:
        return sum(self.resident.values()) + max(self.phases.values())

    def _element(self, teacher: ModelSize) -> int:
        """Bytes of one of its weights and activations."""
        return _dtype(self.args.teacher_dtype, teacher.dtype).itemsize

    def _of_teacher(self, teacher: ModelSize) -> float:
        """Bytes of its weights that stay here."""
        args = self.args
        bits = 4 if args.teacher_load_in_4bit else 8 if args.teacher_load_in_8bit else None
        whole = teacher.weights(_dtype(args.teacher_dtype, teacher.dtype), bits)
        if args.teacher_is_student:
            return 0
        if args.teacher_offload:
            self._onloaded = whole
        if args.teacher_offload or args.teacher_device is not None:
            copy = teacher.vocabulary * teacher.hidden * self._element(teacher)  # of the head
            return copy + (0 if args.teacher_offload else whole * self._teacher_share)
        if self._stage == 3:
            return whole / self.ranks
        if args.teacher_sharded:
            return whole / ranks_that_share(whole, self.ranks, self.local_ranks or self.ranks, self.device_memory)
        return whole + teacher.lora * 4  # peft loads adapters in fp32

    @property
    def _teacher_share(self) -> float:
        """How much of a teacher computes on this GPU, which the student has."""
        devices, own = self.args.teacher_devices, getattr(self.args, "local_process_index", 0)
        here = sum(device.type == "cuda" and device.index in (None, own) for device in devices)
        return here / len(devices) if devices else 1.0

    def _add_student(self) -> None:
        """Weights, gradients and optimizer."""
        student, stage = self.student, self._stage
        self.resident["student"] = student.weights(self._stored, self._bits) / (self.ranks if stage == 3 else 1)
        # Of each trained weight: gradient and two moments of Adam, with an fp32 copy under ZeRO, which shards them.
        trained = torch.float32 if student.lora and not stage else self._stored
        if stage:
            offloaded = str(getattr(self._plugin, "offload_optimizer_device", "none")) == "cpu"
            optimizer = self._trainable * (0 if offloaded else 12 / self.ranks)
            optimizer += self._trainable * trained.itemsize / (self.ranks if stage > 1 else 1)
        else:
            optimizer = self._trainable * 3 * trained.itemsize
        # The adapter's weights come on top of the model's.
        self.resident["gradients and optimizer"] = optimizer + student.lora * trained.itemsize

    def _add_teacher_forward(self) -> None:
        args, tokens, rows = self.args, self._tokens, self.shape.batch * self.args.gradient_accumulation_steps
        if args.teacher_sharded or self._stage == 3:  # which reads micro-batches together
            tokens = max(tokens, min(rows * self.shape.width, MOST_TOGETHER))
        activations = [t.activations(tokens) * self._element(t) for t in self.teachers]
        moves = args.teacher_offload or args.teacher_sharded or args.teacher_is_student or self._stage == 3
        if moves:
            states = rows * self.shape.completion * sum(t.hidden * self._element(t) for t in self.teachers)
            self.resident["teacher's hidden states"] = min(states, STATES_SHARE * self.device_memory)
        if args.teacher_cuda_graph and not moves and self._tokens <= MOST_TOKENS:
            graphs = zip(activations, self.teachers, strict=True)
            self.resident["teacher's CUDA graph"] = sum(size * teacher.readers for size, teacher in graphs)
        else:
            self.phases["teacher forward"] = max(activations) + self._onloaded

    def _add_generation(self) -> None:
        """By the student and by the teacher."""
        student, args, stage, element = self.student, self.args, self._stage, self._compute.itemsize
        writers, engines = [], args.generation_backend == VLLM
        packed = args.teacher_load_in_4bit or args.teacher_load_in_8bit
        rows_of_steps = self.shape.batch * args.gradient_accumulation_steps * args.steps_per_generation
        if args.student_writes:
            # A copy of adapted weights.
            merged = student.linear if student.lora and not self._bits and stage != 3 else 0
            writers.append(("student", student, element, rows_of_steps, merged * self._stored.itemsize))
            cast = (student.linear + student.vocabulary * student.hidden) * element
            casts = self._stored == torch.float32 != self._compute and not (self._bits or stage or engines)
            if casts and cast <= CAST_SHARE * self.device_memory:
                self.resident["student's weights cast for generation"] = cast
        writes = args.seq_kd and args.is_supervised and args.teacher_text_url is None
        if writes and self._teacher_share:
            # With the cache, the teacher writes for later steps too.
            ahead = args.teacher_text_cache != "off" and stage != 3 and not args.teacher_sharded
            rows = args.generation_batch_size if ahead else rows_of_steps
            for teacher in self.teachers:  # each may have to write all rows
                merged = teacher.linear * self._element(teacher) if teacher.lora and not packed else 0
                writers.append(("teacher", teacher, self._element(teacher), rows, merged + self._onloaded))
        prompt = self.shape.width - self.shape.completion
        for name, model, size, rows, copied in writers:
            phase = f"generation by the {name}"
            if engines and not (name == "teacher" and (packed or args.teacher_sharded)):
                self.phases[phase] = args.vllm_memory * self.device_memory + copied
                continue
            length = length_bucket(self.shape.width)
            of_row = model.cache(1, length) * size
            rows, fit = min(rows, args.generation_batch_size), rows_of_share(self.device_memory, of_row)
            if name == "student":
                self.decoding = Decoding(rows, fit, length, model.cache(1, 1) * size)
            rows = min(rows, fit)
            cache = rows * of_row
            if cache <= KEPT_SHARE * self.device_memory:
                kept = f"{name}'s decoding cache"
                self.resident[kept] = self.resident.get(kept, 0) + cache
                cache = 0
            chunk = min(rows, max(1, PROMPT_TOKENS // max(prompt, 1)))  # prompts that are read together
            prefill = (model.cache(chunk, prompt) + model.activations(chunk * prompt)) * size
            sampling = 4 * rows * student.vocabulary * 4
            if stage == 3:  # the generating model is gathered on each GPU
                copied += model.parameters * size * (1 - 1 / self.ranks)
            self.phases[phase] = max(self.phases.get(phase, 0), cache + prefill + sampling + copied)

    def _add_training(self) -> None:
        """The student's forward with the divergence, and its backward."""
        student, tokens, element = self.student, self._tokens, self._compute.itemsize
        vocabulary = min(model.vocabulary for model in (student, *self.teachers))
        scored = min(chunk_tokens(vocabulary, "cuda"), self.shape.batch * self.shape.completion)
        # What one layer's backward needs.
        one_layer = backward = tokens * (12 * student.hidden + 4 * student.intermediate) * element
        saved = student.layers * (tokens * student.hidden * element if self.args.gradient_checkpointing else one_layer)
        several = len(self.args.teachers or ())
        mixing = 4 * (several - 1 + 4) if several > 1 else 0  # fp32 logits of each, and four copies to mix them
        if not self.teachers and self.head_size is None:
            # Of the top k there is no kernel of ours: logits, log-probabilities and one more, in fp32.
            per_logit = 12 + element
        elif self.args.divergence == "jsd":
            per_logit = BYTES_PER_LOGIT + mixing
        else:  # without a closed form it takes a quarter of the rows, with up to 16 fp32 copies for autograd
            per_logit = 16 + mixing / 4
        divergence = scored * vocabulary * per_logit
        if not student.lora:  # the head's gradient is summed in fp32, and a chunk's gradient added to it
            divergence += student.vocabulary * student.hidden * (4 + self._stored.itemsize)
        if self._stage:  # DeepSpeed's communication buffers, allocated for the backward pass
            buckets = self._plugin.hf_ds_config.config.get("zero_optimization", {}).get("reduce_bucket_size", 0)
            backward += min(buckets, self._trainable) * 2 * element if isinstance(buckets, int) else 0
        self.phases["activations and divergence"] = saved + divergence
        self.phases["activations and backward"] = saved + backward

    def vllm_advice(self) -> str | None:
        """A line where --generation_backend vllm should be faster; None where nothing measured says so.

        Measured for a student of 1B on an H200 with 6 to 256 rows (benchmarks/RESULTS.md, "Decoding, beside vLLM"): with all
        rows together vLLM takes at most 1.55 times as long as gkd's decoder, and a token of few rows takes at least 0.58 of
        one of many (1.36 ms of 2.36). Of texts that end by chance the longest of a quarter of 128 has 0.75 of the longest
        of all. So four rounds take 4 · 0.58 · 0.75 = 1.7 times as long as one, and vLLM less, if its cache, which grows with
        the text, holds all rows.
        """
        args, decoding = self.args, self.decoding
        if decoding is None or self._bits or self._stage == 3 or args.uses_fsdp or args.cross_tokenizer != "off":
            return None  # vLLM can't write either
        if not (6 <= decoding.fit <= decoding.rows / 4 and decoding.rows <= 256):
            return None
        share = args.vllm_memory * self.device_memory
        room = share - self.student.parameters * self._compute.itemsize
        mean = int(room / (decoding.rows * decoding.token_bytes))
        if (
            mean <= self.shape.width - self.shape.completion
            or sum(self.resident.values()) + share > self.device_memory
        ):
            return None  # prompts alone fill it, or training does not leave it so much
        return (
            f"{decoding.rows} texts of the student decode {decoding.fit} at a time, since each keeps room for {decoding.width:,} "
            "tokens. A lower --max_new_tokens helps most. Where that has to stay and texts have at most "
            f"{mean:,} tokens on average, with their prompts, --generation_backend vllm decodes all at once and should be "
            "faster, by what a student of 1B took on an H200."
        )

    def advice(self) -> str:
        """The flag that saves most."""
        args, student_args = self.args, self.student_args
        batches = "a lower --per_device_train_batch_size with more --gradient_accumulation_steps"
        lower = "vllm_memory" if args.generation_backend == VLLM else "generation_batch_size"
        generation = f"a lower --{lower}"
        placed = args.teacher_device or args.teacher_offload or args.teacher_sharded or args.teacher_is_student
        teacher = "--teacher_load_in_4bit True, --teacher_offload True or, on several GPUs, --teacher_sharded True"
        if args.teachers is not None:
            teacher = "--teacher_load_in_4bit True, --teacher_device cuda:1 or, for some of --teachers, gkd serve"
        remedies = {
            "teacher": None if placed or args.teacher_load_in_4bit else teacher,
            "student": None if student_args.load_in_4bit else "--use_peft --load_in_4bit, or ds_configs/zero3.yaml",
            "gradients and optimizer": None
            if student_args.use_peft
            else "--use_peft, or ds_configs/zero2_offload.yaml",
            "teacher's hidden states": None,
            "teacher's CUDA graph": "--teacher_cuda_graph False",
            "student's weights cast for generation": "--use_peft with --dtype bfloat16",
            "student's decoding cache": generation,
            "teacher's decoding cache": generation,
            "generation by the student": generation,
            "generation by the teacher": generation,
            "teacher's hidden states of a step": "a lower --gradient_accumulation_steps",
            "teacher's head": None,
            "teacher forward": "--teacher_device or --teacher_sharded" if args.teacher_offload else batches,
            "activations and divergence": batches,
            "activations and backward": None if args.gradient_checkpointing else "--gradient_checkpointing",
        }
        phase = max(self.phases, key=self.phases.get)
        sizes = {**self.resident, phase: self.phases[phase]}
        parts = sorted(sizes, key=sizes.get, reverse=True)
        return next((remedies[part] for part in parts if remedies[part]), batches)


def _dtype(name: str | None, auto: torch.dtype) -> torch.dtype:
    return auto if name in (None, "auto") else getattr(torch, name)
