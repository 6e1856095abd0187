"""Builds the parts of `GKDTrainer` from its arguments and flags: models, rows, the placed teacher, generator, rollout.

A `trainer` here is a `gkd.training.trainer.GKDTrainer` in construction; docstrings name the attributes that must be set.
"""

import time
from collections.abc import Callable
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import GenerationConfig, Trainer, set_seed

from gkd import teachers
from gkd.compat import GKDConfig, set_checkpointing_kwargs
from gkd.config.generation import VLLM
from gkd.config.teacher import SELF, teacher_flag
from gkd.config.training import GKDArguments
from gkd.data.batch import Source, by_shares
from gkd.data.encoding import encode_dataset, never_stops
from gkd.generation.generator import Generator, complete, new_generator
from gkd.generation.sampling import sampling_config
from gkd.generation.vllm import refusal
from gkd.models.heads import LogitHead, base_of, check_projection, is_plain_linear
from gkd.models.loading import check_architecture, compile_layers, freeze, load_pretrained
from gkd.models.lora import add_lora
from gkd.models.pairing import Pairing
from gkd.models.sharding import check_fsdp
from gkd.rollout.cache import TextCache
from gkd.rollout.guard import RolloutGuard
from gkd.rollout.lmbda import lambda_of
from gkd.rollout.planner import Rollout
from gkd.rollout.steps import TextWriter
from gkd.teachers.base import Teacher
from gkd.teachers.crossed import place_paired
from gkd.training.dropout import disable_base_dropout, settle_dropout
from gkd.training.evaluation import HeldOutProbe, held_out_rows

logger = get_logger(__name__)

# In the output folder, for --teacher_text_cache auto; --push_to_hub leaves out names that begin with _.
TEXT_FOLDER = "_teacher_text"

Rows = Dataset | IterableDataset


def settle_arguments(args: GKDArguments | GKDConfig | None) -> GKDArguments:
    """GKDArguments of these, which may be TRL's, set for our data and loss."""
    if args is None:
        args = GKDArguments()
    elif not isinstance(args, GKDArguments):
        values = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
        if values["loss_type"] == "chunked_nll":  # TRL before 1.15 sets it in place of its default
            values["loss_type"] = None
        args = GKDArguments(**values)
    if args.n_gpu > 1:  # transformers would wrap the model in nn.DataParallel, whose replicas share no loss
        if args.teacher_device is None:
            logger.warning("Started without a launcher: one GPU of several is used. `accelerate launch` uses all.")
        args._n_gpu = 1
    args.remove_unused_columns = False
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    if args.router_aux_loss_coef is None:  # of a TRL GKDConfig
        args.router_aux_loss_coef = 0.0
    return args


# ---------------------------------------------------------------------- models and rows


def described(teacher: nn.Module | Teacher | str | None, args: GKDArguments) -> nn.Module | Teacher | str | None:
    """The server of text where it is the only teacher, else `teacher` as it is."""
    alone = teacher is None and teacher_flag(args) == "teacher_text_url"
    return teachers.describe(args) if alone else teacher


def load_models(
    student: nn.Module | str, teacher: nn.Module | Teacher | str | None, args: GKDArguments, peft: PeftConfig | None
) -> tuple[nn.Module, nn.Module | Teacher]:
    """Student and teacher, loaded if they are names: the student ready to train, the teacher frozen.

    Args:
        teacher: None is the one that the flags name. If it is the student's base, the student is returned as teacher.
        peft: a new adapter for the student.

    Raises:
        ValueError: no teacher; an architecture or an adapter that can't be trained.
    """
    if teacher is None and args.teacher_model_name_or_path is None:
        raise ValueError("GKD needs a teacher: pass teacher_model= or --teacher_model_name_or_path.")
    teacher = teacher if teacher is not None else args.teacher_model_name_or_path
    for role, model in (("student", student), ("teacher", teacher)):
        if isinstance(model, nn.Module):
            check_architecture(base_of(model).config, f"The {role}")
    if isinstance(student, str):
        options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        student = load_pretrained(student, **options)
    if isinstance(teacher, str) and not args.teacher_is_student:
        options = {"trust_remote_code": args.teacher_trust_remote_code, "dtype": args.teacher_dtype}
        teacher = load_pretrained(teacher, **options | (args.teacher_model_init_kwargs or {}))
    if isinstance(teacher, nn.Module) and not args.teacher_is_student:
        freeze(teacher)
    if args.disable_dropout:
        disable_base_dropout(student)
    if peft is not None:
        set_seed(args.seed)  # its weights are drawn at random
        student = add_lora(student, peft, args)
    if isinstance(student, PeftModel) and student.active_peft_config.is_prompt_learning:
        raise ValueError("Prompt-learning adapters (prefix tuning, prompt tuning) are not supported; use LoRA.")
    if args.teacher_is_student:
        if not isinstance(student, PeftModel):
            raise ValueError(f"A teacher {SELF!r} is the student without its adapter: pass peft_config=.")
        teacher = student
    return student, teacher


def name_of_teacher(teacher: nn.Module | Teacher, args: GKDArguments) -> str | None:
    """The name that results give it."""
    name = args.teacher_model_name_or_path
    if name is None and isinstance(teacher, Teacher):
        return teacher.name
    return base_of(teacher).config._name_or_path if name in (None, SELF) and isinstance(teacher, nn.Module) else name


def encode_rows(
    train: Rows | None,
    held_out: Rows | dict[str, Rows] | None,
    teacher: nn.Module | Teacher,
    pairing: Pairing,
    args: GKDArguments,
) -> tuple[Rows | None, Dataset | dict[str, Dataset] | None]:
    """Training and held-out rows as tokens; rows that are encoded are returned as they are."""
    served = args.teacher_text_url is not None
    keeps_rows = served or (isinstance(teacher, Teacher) and teacher.keeps_rows)
    encoded = encode_dataset(train, pairing.encoder, args.dataset_num_proc, keeps_rows)
    if served and encoded is train and isinstance(train, Dataset) and "row" not in train.column_names:
        raise ValueError(
            "--teacher_text_url sends the rows' messages: pass raw rows, or encode them with keep_rows=True."
        )
    given = encoded is train and isinstance(train, Dataset)
    if pairing.cross is not None and given and "teacher_prompt_ids" not in train.column_names:
        raise ValueError("--cross_tokenizer: these rows have no prompts for the teacher: pass raw rows.")
    reads_answers = args.is_supervised and not args.seq_kd
    # The preflight warns of rows that are already encoded.
    if encoded is not train and reads_answers and (warning := never_stops(encoded, pairing.stop_ids)):
        logger.warning("Warning: %s.", warning)
    if isinstance(held_out, dict):
        return encoded, {name: held_out_rows(part, pairing.encoder) for name, part in held_out.items()}
    return encoded, None if held_out is None else held_out_rows(held_out, pairing.encoder)


# ---------------------------------------------------------------------- placing


def put_teacher(teacher: nn.Module | Teacher, trainer: Trainer) -> tuple[Teacher, bool]:
    """The placed teacher, and whether the student is sharded. Reads `pairing`.

    Raises:
        ValueError: a head that ZeRO-3 can't gather; a kind of FSDP that is not supported.
    """
    accelerator, fsdp = trainer.accelerator, trainer.is_fsdp_enabled
    zero3 = trainer.is_deepspeed_enabled and accelerator.deepspeed_plugin.zero_stage == 3
    if zero3 and not all(is_plain_linear(LogitHead.of(model).head) for model in _modules(trainer.model, teacher)):
        raise ValueError(
            "ZeRO-3 with an output head that is not a plain linear layer (LoRA on lm_head, 4-bit weights) is not "
            "supported: use --use_peft with other targets, ds_configs/zero2.yaml or ds_configs/fsdp2.yaml."
        )
    if fsdp:
        check_fsdp(accelerator)
    student_size, teacher_size = trainer.pairing.sizes
    if trainer.pairing.cross is None and isinstance(teacher, nn.Module) and student_size != teacher_size:
        logger.warning(
            f"Vocabularies of {student_size} (student) and {teacher_size} (teacher) differ in padding alone: training over "
            f"the {trainer.pairing.vocab_size} ids that both have."
        )
    return place_paired(teacher, accelerator, trainer.args, trainer.pairing, zero3, fsdp), zero3 or fsdp


def _modules(student: nn.Module, teacher: nn.Module | Teacher) -> list[nn.Module]:
    """Those of the two that are models, once each: a student may be its own teacher."""
    return list(dict.fromkeys(model for model in (student, teacher) if isinstance(model, nn.Module)))


def settle_student(trainer: Trainer) -> tuple[bool, list[nn.Module]]:
    """Sets dropout and gradient checkpointing of the student. Reads `sharded`.

    Returns:
        Whether a forward in training mode draws random numbers, and the modules that have to be in evaluation mode.
    """
    args, model, checkpointed = trainer.args, trainer.model, trainer.args.gradient_checkpointing
    if not trainer.sharded:  # sharded weights are gathered only in their wrapper
        check_projection(model, "student")
    draws, evaluating = settle_dropout(model, args.disable_dropout, checkpointed, callable_alone=not trainer.sharded)
    # Without dropout a recomputed layer does not depend on the random state.
    set_checkpointing_kwargs(args, **({} if draws else {"use_reentrant": False, "preserve_rng_state": False}))
    reentrant = checkpointed and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if trainer.aux_loss_enabled and reentrant:
        raise ValueError("--router_aux_loss_coef: reentrant checkpointing drops the gradient of the routers.")
    return draws, evaluating


def compile_models(student: nn.Module, teacher: nn.Module | Teacher, args: GKDArguments) -> None:
    """--torch_compile, layer by layer."""
    if args.torch_compile:
        for model in _modules(student, teacher):
            compile_layers(model, args.torch_compile_backend, args.torch_compile_mode)


# ---------------------------------------------------------------------- text


def sampling_configs(pairing: Pairing, args: GKDArguments) -> dict[Source, GenerationConfig]:
    """How student and teacher sample text to train on: only ids that both have."""
    sizes = zip((Source.ON_POLICY, Source.TEACHER), pairing.sizes, strict=True)
    return {source: sampling_config(pairing, size, args.max_new_tokens, args.temperature) for source, size in sizes}


def text_server(teacher: nn.Module | Teacher, pairing: Pairing, args: GKDArguments) -> Teacher | None:
    """The server that writes the teacher's text, if there is one; it may be the teacher itself."""
    server = teachers.text_writer(args)
    if server is not None:
        server = teacher if type(teacher) is type(server) else server
        server.encoder = pairing.encoder
    return server


def columns_of(adding: list[Teacher], rows: list[dict]) -> dict:
    """The columns that these teachers add to a batch of encoded rows."""
    return {name: column for teacher in adding for name, column in teacher.columns(rows).items()}


def _text_cache(trainer: Trainer) -> TextCache | None:
    """The cache of the teacher's text, if it writes any."""
    args, teacher, server = trainer.args, trainer.teacher, trainer.text_server
    if not args.caches_teacher_text or not (teacher.writes or server is not None):
        return None
    identity = (server or teacher).identity(trainer.generation_configs[Source.TEACHER])
    if identity is None:
        logger.warning("The teacher's text is not cached: ZeRO-3 spread its weights, by which it is known.")
        return None
    auto = Path(args.output_dir, TEXT_FOLDER)
    folder = auto if args.teacher_text_cache == "auto" else args.teacher_text_cache
    if server is not None:  # bytes of its text
        return TextCache(folder, identity, vocab_size=256, keeps_all=True)
    return TextCache(folder, identity, vocab_size=trainer.pairing.vocab_size)


def generator_of(trainer: Trainer) -> Generator:
    """The generator of the flags, which student and teacher share. Reads `sharded`, `teacher` and `choices`."""
    args, teacher = trainer.args, trainer.teacher
    generator = new_generator(
        args,
        args.generation_batch_size,
        trainer.choices,
        sharded=trainer.sharded,
        moving=() if teacher.stays else (teacher.inner,),
    )
    teacher.decode_by(generator)
    return generator


def rollout_of(trainer: Trainer) -> Rollout:
    """Reads `pairing`, `teacher`, `text_server`, `generation_configs`, `generator`, `phases`, `student` and `seq_kd`."""
    accelerator, generator, pad = trainer.accelerator, trainer.generator, trainer.processing_class.pad_token_id
    configs, show, cache = trainer.generation_configs, trainer.phases.show, _text_cache(trainer)

    def write(prompts, mask, config, seed) -> tuple[torch.Tensor, torch.Tensor]:
        return complete(trainer.model_wrapped, accelerator, generator, prompts, mask, config, seed, autocast=True)

    def clock() -> float:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        return time.perf_counter() - trainer.phases.captured()

    # What a micro-batch costs whatever its size, in tokens: gathering sharded weights, or launching kernels.
    overhead = 1_000_000 if trainer.sharded else 2048 if accelerator.device.type == "cuda" else 512
    writer = TextWriter(
        accelerator,
        write,
        trainer.teacher,
        configs,
        show,
        pad,
        cache,
        keep_mask=trainer.aux_loss_enabled,
        max_length=trainer.args.max_length,
        packs=lambda: trainer.teacher.packs and trainer.student.packs,  # the first may be collective
        overhead=overhead,
        most_rows=lambda: trainer.stability.micro_rows,
        server=trainer.text_server,
    )
    args, supervised = trainer.args, Source.TEACHER if trainer.seq_kd else Source.DATASET
    lmbda = lambda_of(args, supervised, lambda: HeldOutProbe(trainer), clock)
    guard = RolloutGuard(args, trainer.pairing.stop_ids) if args.guarded else None
    return Rollout(args, supervised, lmbda, writer, trainer.phases.at, guard)


def start_engines(trainer: Trainer) -> None:
    """With vLLM has each model that will write try it, so that engines start, or fail, before training, on all ranks at the
    same time. Reads `rollout`, `phases` and `eval_dataset`.

    Raises:
        ValueError: an engine can't have the student's weights.
        gkd.generation.vllm.EngineFailed: an engine does not start.
    """
    args, teacher, writer = trainer.args, trainer.teacher, trainer.rollout.writer
    if args.generation_backend != VLLM:
        return
    if (why := refusal(trainer.model)) is not None:
        raise ValueError(f"--generation_backend vllm can't have the student: {why}. Take auto.")
    evaluates, several = trainer.eval_dataset is not None, len(teacher.names)
    prompts = torch.zeros(max(several, 1), 4, dtype=torch.long, device=trainer.accelerator.device)

    def tries(write: Callable[..., Any], source: Source, **more: Any) -> None:
        config = copy(trainer.generation_configs[source])
        config.max_new_tokens = 1
        write(prompts, torch.ones_like(prompts), config, 0, **more)

    with trainer.phases.apart("starting vLLM", then=None):
        if args.student_writes or evaluates:
            tries(writer.write_student, Source.ON_POLICY)
        if teacher.writes and (evaluates or (trainer.seq_kd and args.is_supervised and writer.server is None)):
            tries(teacher.write, Source.TEACHER, **by_shares(torch.eye(several) if several else None))
