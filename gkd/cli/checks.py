"""Checks of the flags of `gkd train` that need the system, the data or the models' architecture, before weights load.

Ranges of single flags are checked where they are parsed (gkd.config.training).
"""

import difflib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import ParallelMode
from transformers.utils.hub import is_offline_mode

from gkd import teachers
from gkd.config.generation import VLLM
from gkd.config.teacher import named_teachers
from gkd.config.training import AUTO, NEEDS_HELD_OUT, DataArguments, GKDArguments, StudentArguments
from gkd.data.loading import token_lengths
from gkd.evaluation.bootstrap import figures_ahead, rows_by_teacher, shown_by_teacher
from gkd.io.errors import one_line
from gkd.models import loading as models
from gkd.models.cross_vocabulary import Survey
from gkd.models.lora import lora_config
from gkd.models.pairing import Pairing
from gkd.models.weights import check_adapter_weights, rehearse

_PLAIN = (
    "--generation_backend vllm takes plain weights, and the student's are quantized: take auto, or leave out --load_in_4bit "
    "and --load_in_8bit."
)


def check_flags(data_args: DataArguments, args: GKDArguments) -> None:
    """Checks that need no model and no row. Raises ValueError with the flag and what to do."""
    outside_of_data(args.output_dir, data_args.dataset_name, data_args.eval_dataset_name)
    unnamed = data_args.eval_dataset_name is None
    if unnamed and args.eval_strategy != "no" and Path(data_args.dataset_name or "").is_file():
        raise ValueError(
            f"--eval_strategy {args.eval_strategy.value} needs held-out rows, and {data_args.dataset_name} is a single "
            "file: name some by --eval_dataset_name."
        )
    if unnamed and args.eval_strategy == "no" and args.eval_on_start:
        raise ValueError("--eval_on_start needs held-out rows: name some by --eval_dataset_name.")
    if unnamed and args.eval_strategy == "no" and args.lmbda == AUTO:
        raise ValueError(f"--lmbda auto {NEEDS_HELD_OUT}: name some by --eval_dataset_name.")
    if data_args.dataset_streaming and args.max_steps <= 0 and args.needs_length:
        raise ValueError(
            f"--lmbda_schedule {args.lmbda_schedule} needs to know how many steps the run has, and a stream has no length: "
            "give --max_steps, or --lmbda_steps as a number of steps."
        )
    if data_args.dataset_streaming and args.teacher_text_url is not None and args.world_size > 1:
        raise ValueError(
            "--dataset_streaming with --teacher_text_url works in a single process: leave one of them out."
        )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "--fsdp shards the student over processes, and this is the only one: start it by accelerate launch "
            "--config_file ds_configs/fsdp2.yaml."
        )
    loader = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context")
    try:  # torch's loader checks its own flags
        DataLoader([], **{name: getattr(args, f"dataloader_{name}", None) for name in loader})
    except (ValueError, TypeError) as error:
        raise ValueError(f"--dataloader_*: {one_line(error)}") from None
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"--report_to {name}: no such tracker; {_near(name, INTEGRATION_TO_CALLBACK, 1)}")
        if name not in [
            *get_available_reporting_integrations(),
            "azure_ml",
        ]:  # the latter is listed only without mlflow
            raise ValueError(f"--report_to {name} needs a package that is not installed: pip install {name}.")
    if args.push_to_hub:  # transformers makes the repository once both models have loaded
        repository = args.hub_model_id or Path(args.output_dir).absolute().name
        check_hub(repository, args.hub_token, asks=args.process_index == 0)


def check_server(args: GKDArguments) -> None:
    """Raises RunStopped where the server of text is not there or refuses its key."""
    if (server := teachers.text_writer(args)) is not None:
        server.check()


def outside_of_data(output_dir: str, *datasets: str | None) -> None:
    """Raises ValueError for an output folder inside a folder of rows, whose files would be read as rows next time."""
    for name in filter(None, datasets):
        folder = Path(name).resolve()
        if Path(name).is_dir() and Path(output_dir).resolve().is_relative_to(folder):
            raise ValueError(
                f"--output_dir {output_dir} lies in the dataset's folder {name}, where its files would be read as rows: "
                "choose another."
            )


def check_hub(repository: str, token: str | None = None, asks: bool = True) -> None:
    """Raises ValueError if --push_to_hub can't work. `asks`: the hub is asked whether the token is valid."""
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"--push_to_hub: {one_line(error)}") from error
    if is_offline_mode():
        raise ValueError("--push_to_hub can't work while HF_HUB_OFFLINE is set: unset it, or push later.")
    token = token or get_token()
    if token is None:
        raise ValueError("--push_to_hub needs a token of the hub: hf auth login, or HF_TOKEN.")
    if asks:
        try:
            HfApi().whoami(token)
        except Exception as error:  # the network and the hub raise many classes
            raise ValueError(f"--push_to_hub: the hub does not answer as it should: {one_line(error)}") from error


def check_student(student_args: StudentArguments, args: GKDArguments) -> None:
    """Builds the student without weights. Raises ValueError if files are incomplete, or a flag does not fit it."""
    by_vllm, refused = args.generation_backend == VLLM, ValueError(_PLAIN)
    if by_vllm and (student_args.load_in_4bit or student_args.load_in_8bit):
        raise refused
    student = rehearse(student_args.model_name_or_path, models.student_options(student_args, args))
    if by_vllm and getattr(getattr(student, "config", None), "quantization_config", None) is not None:
        raise refused
    _check_optimizer(args, student)
    if student_args.student_adapter is not None:
        check_adapter_weights(student_args.student_adapter, student)
    elif student_args.use_peft and student is not None:
        _check_lora(student_args, student)


def _check_lora(student_args: StudentArguments, student: nn.Module) -> None:
    """Adds the adapter that the flags describe to a student without weights. Raises ValueError if it does not fit."""
    config = lora_config(student_args)
    names = [name for name, _ in student.named_modules()]
    layers = sorted(
        {name.rpartition(".")[2] for name, m in student.named_modules() if getattr(m, "weight", None) is not None}
    )
    for flag in ("target_modules", "modules_to_save"):
        wanted = getattr(config, flag)
        if isinstance(wanted, str) or wanted is None:  # a pattern, or all-linear
            continue
        for name in sorted(wanted):
            if name != "all-linear" and not any(n == name or n.endswith(f".{name}") for n in names):
                hint = _near(name, layers, 2, cutoff=0.5)
                raise ValueError(f"--lora_{flag} {name}: the student has no such module; {hint}")
    try:
        get_peft_model(student, config)
    except re.error as error:
        raise ValueError(f"--lora_target_modules {config.target_modules}: no pattern of names: {error}.") from error
    except ValueError as error:
        raise ValueError(f"--use_peft with these flags does not fit the student: {one_line(error)}") from error


def _check_optimizer(args: GKDArguments, student: nn.Module | None) -> None:
    """Builds the optimizer and the schedule for a single parameter, as transformers builds them for the student."""
    if args.deepspeed_plugin is not None:  # its config may name both
        return
    parameters = [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=args.learning_rate)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, student)
        if isinstance(kind, type) and kind.__module__.startswith(("torch.", "transformers.")):
            optimizer = kind(parameters, **options)
    except Exception as error:  # whatever the optimizer's package raises, or its absence
        given = f" --optim_args {args.optim_args}" if args.optim_args else ""
        raise ValueError(f"--optim {args.optim.value}{given} can't be made: {one_line(error)}") from error
    steps = args.max_steps if args.max_steps > 0 else 100
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except Exception as error:
        given = f" --lr_scheduler_kwargs {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(f"--lr_scheduler_type {name}{given} can't be made: {one_line(error)}") from error


def check_rows(args: GKDArguments, train_set: Iterable, eval_set: Dataset | None, pairing: Pairing) -> Survey | None:
    """Checks encoded rows, and returns a survey of them for a teacher with another tokenizer.

    Raises ValueError if an epoch has no batch or scored token, the template refuses a server's text, no evaluation yields
    --metric_for_best_model, or a teacher with another tokenizer reads none of the answers.
    """
    if (server := teachers.text_writer(args)) is not None:
        server.check_template(pairing.encoder, json.loads(next(iter(train_set))["row"]))
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(train_set, Dataset) and len(train_set) < batch:
        raise ValueError(
            f"--dataloader_drop_last with {len(train_set)} rows and batches of {batch} leaves nothing to train on: lower "
            "--per_device_train_batch_size."
        )
    from_rows = args.is_supervised and (not args.seq_kd or args.teacher_cache is not None)
    survey = None if pairing.cross is None else pairing.cross.survey(train_set)
    if survey is not None and from_rows and survey.is_lost:
        raise ValueError(
            f"--cross_tokenizer: all of {survey.rows} answers that were looked at have text that {survey.changed}, so the "
            "teacher's tokens can't be aligned with the student's: take another teacher."
        )
    if from_rows and isinstance(train_set, Dataset) and not token_lengths(train_set)["answer"].any():
        raise ValueError(
            f"No row has a token of its answer left in --max_length {args.max_length}: there is nothing to train on."
        )
    if args.lmbda == AUTO and eval_set is not None and len(eval_set) < 2:
        raise ValueError(f"--lmbda auto {NEEDS_HELD_OUT}, and one is too few.")
    wanted = args.metric_for_best_model
    if wanted is not None and eval_set is not None:
        _check_metric(args, wanted, eval_set, pairing)
    return survey


def _check_metric(args: GKDArguments, wanted: str, eval_set: Dataset, pairing: Pairing) -> None:
    """Raises ValueError if no evaluation yields the metric."""
    answered = token_lengths(eval_set)["answer"] > 0
    scores = [*args.metrics, *([args.scorer.partition(":")[2]] if args.scorer else [])]
    crossed = pairing.cross is not None
    figures = figures_ahead(bool(answered.any()), bool((~answered).any()), scores, crossed)
    figures += ["loss", "runtime", "samples_per_second", "steps_per_second"]
    if args.teachers is not None:
        names = list(named_teachers(args.teachers))
        for label, rows in rows_by_teacher(eval_set["teacher_shares"], names).items():
            own = answered[rows]
            of_rows = figures_ahead(bool(own.any()), bool((~own).any()), scores)
            figures += [f"{label}/{name}" for name in shown_by_teacher(of_rows)]
    name = wanted.removeprefix("eval_")
    if name not in figures:
        hint = _near(name, figures, 3)
        raise ValueError(f"--metric_for_best_model {wanted}: no evaluation of this run gives that; {hint}")


def _near(name: str, choices: Collection[str], most: int, cutoff: float = 0.6) -> str:
    """A hint with up to `most` choices that are spelt like `name`, or else with all."""
    near = difflib.get_close_matches(name, choices, most, cutoff)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(choices)}."
