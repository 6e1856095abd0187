"""The models that eval_gkd.py compares: lists them, checks that they fit together, and loads them."""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig
from trl import get_quantization_config

from gkd.config.evaluation import EvalArguments
from gkd.data.batch import Batch
from gkd.evaluation.evaluator import Candidate, Write
from gkd.generation.generator import complete, new_generator
from gkd.generation.sampling import sampling_config, writer_fingerprint
from gkd.io.paths import check_model, checkpoints_in
from gkd.io.pickles import check_weights
from gkd.losses.objective import Objective, divergence_of
from gkd.models.heads import LogitHead, hidden_at_scored, last_hidden_states
from gkd.models.loading import load_trained, move, read_configs, size_of
from gkd.models.pairing import Pairing, Side
from gkd.models.tokenizers import optional_tokenizer
from gkd.models.weights import adapter_config, rehearse_trained
from gkd.runs.checkpoints import STATE, state_of
from gkd.runs.folder import has_model
from gkd.teachers import describe
from gkd.teachers.base import Teacher
from gkd.teachers.crossed import place_paired


@dataclass
class Entry:
    """A model to evaluate: where it is, and what tables call it."""

    label: str
    path: str
    step: int | None = None
    of_run: bool = False  # loaded as the run trained it
    revision: str | None = None


def entries(args: EvalArguments) -> list[Entry]:
    """The run's student before and after, its checkpoints if asked for, and further models.

    Raises:
        ValueError: the run holds no checkpoint, or no model at all; two models would have one name.
    """
    listed = []
    if args.run is not None:
        folder, trained = Path(args.run), args.trained
        steps = [int(path.rpartition("-")[2]) for path in reversed(checkpoints_in(folder)) if has_model(path)]
        if args.checkpoints and not steps:
            raise ValueError(f"{args.run} holds no checkpoints (--save_strategy no?). Leave --checkpoints out.")
        if not has_model(folder) and not steps:
            raise ValueError(f"{args.run} holds neither a trained model nor a checkpoint: nothing was saved yet.")
        before = trained.get("student_adapter") or trained["model_name_or_path"]
        revision = None if trained.get("student_adapter") else trained["model_revision"]
        listed.append(Entry("before", before, 0, True, revision))
        if args.checkpoints or not has_model(folder):
            steps = steps if args.checkpoints else steps[-1:]
            listed += [Entry(f"step {step}", str(folder / f"checkpoint-{step}"), step, True) for step in steps]
        if has_model(folder):
            state = state_of(folder) if (folder / STATE).is_file() else {}
            best = state.get("best_global_step") if trained.get("load_best_model_at_end") else None
            listed.append(Entry("after", args.run, best or state.get("global_step"), True))
    reserved = {"teacher", "before", "after"}
    names = [Path(model).name if Path(model).is_dir() else model for model in args.models]
    labels = [n if names.count(n) == 1 and n not in reserved else m for n, m in zip(names, args.models, strict=True)]
    listed += [Entry(label, model) for label, model in zip(labels, args.models, strict=True)]
    if len({entry.label for entry in listed} - {"teacher"}) < len(listed):
        models = " ".join(args.models)
        raise ValueError(f"--models {models}: a model twice, or one that is named like a part of a run.")
    return listed


class Models:
    """Checks tokenizers and configs of teacher and students at once, before weights load; then loads them one by one.

    Raises:
        ValueError: a model does not exist, or a student's tokenizer is not the teacher's.
    """

    def __init__(self, args: EvalArguments, students: list[Entry]):
        self.args, self.students, self._described = args, students, describe(args)
        sides: dict[str, Side] = {}
        for entry in students:
            flag = f"the run's {entry.label!r} model" if entry.of_run else "--models"
            sides[entry.label] = _open(flag, entry.path, self._source(entry))
        teacher = self._described.side(sides[students[0].label], args)
        for entry in students:
            if sides[entry.label].tokenizer is None:
                if teacher.tokenizer is None:
                    raise ValueError(f"{entry.path}: neither it nor its teacher has a tokenizer.")
                sides[entry.label] = replace(sides[entry.label], tokenizer=teacher.tokenizer)
        # All models use one chat template: that of the run's trained student, or that of the first model.
        reader = ([entry.label for entry in students if entry.of_run] or [students[0].label])[-1]
        tokenizer = sides[reader].tokenizer
        others = [label for label, s in sides.items() if s.tokenizer.chat_template != tokenizer.chat_template]
        if others := ", ".join(label for label in others if label != "before"):
            print(f"warning: {others}: reads the chat template of {reader} here, not its own.", file=sys.stderr)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        first = sides.pop(reader)
        self.pairing = Pairing.of(first, teacher, args, tuple(sides.values()))
        # How many ids each student shares with the teacher.
        self._shared = dict(zip([reader, *sides], self.pairing.shared, strict=True))
        self.generator = new_generator(args)

    def rehearse(self) -> None:
        """Raises ValueError for weights or an adapter that can't be loaded completely, before any are read."""
        self._described.rehearse()
        for entry in self.students:
            rehearse_trained(entry.path, {"dtype": self.args.dtype or "auto", **self._source(entry)})

    def teacher(self, accelerator: Accelerator) -> tuple[Teacher, Candidate]:
        """The teacher on its device, and as a model to evaluate."""
        self._teacher = place_paired(self._described.load(), accelerator, self.args, self.pairing)
        self._teacher.decode_by(self.generator)
        config = self._config(self.pairing.sizes[1])
        identity, write = _identity(self._teacher.identity(config)), partial(self._teacher.write, config=config)
        return self._teacher, Candidate("teacher", self._teacher.size, identity, write)

    def student(self, entry: Entry, accelerator: Accelerator) -> Candidate:
        """A student in its own quantization and dtype, with its adapter beside the base."""
        quantization, dtype = None, self.args.dtype or "auto"
        if entry.of_run:
            quantization = get_quantization_config(SimpleNamespace(**self.args.trained))
            dtype = self.args.dtype or self.args.trained["dtype"]
        model = move(load_trained(entry.path, dtype, quantization, **self._source(entry)), accelerator.device)
        shared, teacher = self._shared[entry.label], self._teacher
        config = self._config(model.config.get_text_config().vocab_size, shared)
        objective = Objective(divergence_of(self.args), shared)

        @torch.no_grad()
        def score(batch: Batch) -> torch.Tensor:
            body = partial(last_hidden_states, model)
            hidden = hidden_at_scored(body, batch.input_ids, batch.attention_mask, batch.scored)
            labels = batch.next_ids
            with teacher.target(batch) as target:
                return objective.measure(hidden, target, labels, LogitHead.of(model))

        identity = _identity(writer_fingerprint(model, config))
        write = partial(complete, model, accelerator, self.generator, config=config)
        return Candidate(entry.label, size_of(model), identity, write, score, entry.step, entry.path)

    def teacher_writer(self, max_new_tokens: int) -> Write:
        """The teacher's `write`, once it is loaded, for answers of other lengths."""
        config = self._config(self.pairing.sizes[1], max_new_tokens=max_new_tokens)
        return partial(self._teacher.write, config=config)

    def _config(self, size: int, shared: int | None = None, max_new_tokens: int | None = None) -> GenerationConfig:
        room = max_new_tokens or self.args.max_new_tokens
        return sampling_config(self.pairing, size, room, self.args.eval_temperature, shared)

    def _source(self, entry: Entry) -> dict[str, Any]:
        """The options of from_pretrained that say where a student's weights come from."""
        options = {"trust_remote_code": self.args.trust_remote_code}
        return options if entry.revision is None else options | {"revision": entry.revision}


def _identity(fingerprint: bytes | None) -> str:
    """In the trainer's format for a run without autocast, so that both reuse each other's rows."""
    return token_hex(16) if fingerprint is None else f"{fingerprint.hex()} no"


def _open(flag: str, name: str, options: dict[str, Any]) -> Side:
    """The side of a model, or of an adapter and its base, which lends its tokenizer if the adapter has none."""
    check_model(flag, name, adapter=True)
    check_weights(name)
    places = [(name, options)]
    if (Path(name) / "adapter_config.json").is_file():
        adapter = adapter_config(name)
        name, flag = adapter.base_model_name_or_path, f"{flag} {name}: its base model"
        check_model(flag, name)
        check_weights(name)
        revision = {} if adapter.revision is None else {"revision": adapter.revision}
        options = {"trust_remote_code": options["trust_remote_code"], **revision}
        places.append((name, options))
    config, generation = read_configs(flag, name, **options)
    tokenizers = (optional_tokenizer(place, **more) for place, more in places)
    return Side.of_config(next((t for t in tokenizers if t is not None), None), config, generation)
