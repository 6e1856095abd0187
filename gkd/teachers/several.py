"""Several teachers, of which each row names one, or several with their shares.

LoRA adapters of one base share its weights: they are in one process, and each is switched on where its rows are. The other
teachers are models of their own, each placed as the flags say.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import GenerationConfig

from gkd import teachers
from gkd.config.teacher import TeacherArguments, named_teachers
from gkd.config.values import is_address
from gkd.data.batch import Batch
from gkd.generation.generator import Generator
from gkd.losses.targets import SeveralTarget, Target
from gkd.models.heads import LogitHead
from gkd.models.loading import freeze
from gkd.models.pairing import Side
from gkd.models.tokenizers import shared_vocab_size
from gkd.models.weights import adapter_parameters
from gkd.runs.resume import fingerprint
from gkd.teachers.base import Teacher
from gkd.teachers.forward import TeacherForward
from gkd.teachers.placed import LocalTeacher, NamedTeacher


class AdapterTeacher(Teacher):
    """One LoRA adapter on a base that others share; `adapter` None is the base alone."""

    writes = True

    def __init__(self, base: LocalTeacher, adapter: str | None, cuda_graph: bool):
        self._base, self._adapter = base, adapter
        # Of its own, since a CUDA graph replays the adapter that was on when it was captured.
        whole = base.on_one_device
        self._forward = TeacherForward(base.inner, base.forward.pad, cuda_graph and whole, whole=whole)
        self.packs = base.packs

    @property
    def capture_seconds(self) -> float:
        return self._forward.seconds

    @contextmanager
    def _active(self) -> Iterator[LocalTeacher]:
        """The base with this adapter on."""
        base = self._base
        if self._adapter is not None and base.inner.active_adapters != [self._adapter]:
            base.inner.base_model.set_adapter(self._adapter, inference_mode=True)
        base.forward = base._states = self._forward
        with nullcontext() if self._adapter is not None else base.inner.disable_adapter():
            yield base

    @contextmanager
    def target(self, batch: Batch) -> Iterator[Target]:
        with ExitStack() as stack:
            with self._active() as base:
                known = stack.enter_context(base.target(batch))
            yield known  # its hidden states are computed, and no adapter is on the head

    def write(self, prompts, mask, config, seed) -> tuple[torch.Tensor, torch.Tensor]:
        with self._active() as base:
            return base.write(prompts, mask, config, seed)

    def identity(self, config: GenerationConfig) -> bytes | None:
        return hashlib.sha256(f"{self._adapter}".encode() + self._base.identity(config)).digest()


class SeveralTeachers(Teacher):
    """The teachers of `--teachers`, in its order."""

    writes = True

    def __init__(self, args: TeacherArguments):
        self.named, self.name = named_teachers(args.teachers), " ".join(args.teachers)
        self.names = tuple(self.named)
        self._cuda_graph = getattr(args, "teacher_cuda_graph", False)
        self._described = {}
        for name, (model, adapter) in self.named.items():
            own = copy(args)
            own.teachers, own.teacher_adapter = None, adapter
            own.teacher_url, own.teacher_model_name_or_path = (model, None) if is_address(model) else (None, model)
            self._described[name] = teachers.describe(own)  # a server's needs packages that others do not
        self._teachers: list[Teacher] = []

    def side(self, student: Side, args: Any) -> Side:
        """That of the first, with the stop tokens of all. Raises ValueError if one has another vocabulary."""
        sides = {name: teacher.side(student, args) for name, teacher in self._described.items()}
        first = next(iter(sides.values()))
        for name, side in sides.items():
            shared_vocab_size(student.tokenizer, side.tokenizer, student.size, side.size)
            if side.size != first.size:
                raise ValueError(
                    f"--teachers: {name} has logits for {side.size} ids and {self.names[0]} for {first.size}: they must be as many."
                )
        stops = tuple(config for side in sides.values() for config in side.stops)
        window = min(filter(None, (side.window for side in sides.values())), default=None)
        loaded = tuple(
            replace(
                model,
                readers=len(names),
                adapters=sum(adapter_parameters(a) for name in names if len(names) > 1 and (a := self.named[name][1])),
            )
            for names in self._groups()
            for model in sides[names[0]].models
        )
        return Side(first.tokenizer, first.size, stops, loaded, window, self.names)

    def _groups(self) -> list[list[str]]:
        """The names of teachers that share weights."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, (model, _) in self.named.items():
            groups[name if is_address(model) else model].append(name)
        return list(groups.values())

    @property
    def head_size(self) -> tuple[int, int] | None:
        """Of the servers' heads together; no position's states are kept."""
        sizes = [teacher.head_size for teacher in self._described.values() if teacher.head_size is not None]
        return (sum(head for head, _ in sizes), 0) if sizes else None

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        prints = {}
        for name, (model, adapter) in self.named.items():
            own = self._described[name]
            weights = own.fingerprints.get("teacher_url") or fingerprint(model, own.args.teacher_revision)
            prints[name] = [weights, adapter and fingerprint(adapter, None)]
        return {"teachers": f"several {hashlib.sha256(json.dumps(prints).encode()).hexdigest()[:16]}"}

    def rehearse(self) -> None:
        for teacher in self._described.values():
            teacher.rehearse()

    def _adapter(self, name: str) -> str:
        """The adapter's name in peft, which takes no dot and none of a module's attributes."""
        return f"teacher{self.names.index(name)}"

    def load(self) -> Teacher:
        """Loads each model once; adapters of one stay beside its weights."""
        self._models: list[tuple[nn.Module | Teacher, list[str]]] = []
        for names in self._groups():
            if len(names) == 1:
                self._models.append((self._described[names[0]].load(), names))
                continue
            bare = copy(self._described[names[0]].args)
            bare.teacher_adapter = None
            model = NamedTeacher(bare).load()
            for name in names:
                if (adapter := self.named[name][1]) is None:
                    continue
                if isinstance(model, PeftModel):
                    model.load_adapter(adapter, self._adapter(name))
                else:
                    model = PeftModel.from_pretrained(model, adapter, self._adapter(name))
            freeze(model)
            head = LogitHead.of(model).head
            if isinstance(head, BaseTunerLayer | ModulesToSaveWrapper):
                raise ValueError(
                    f"--teachers {' '.join(names)}: an adapter is on the output head, which teachers of one model share: "
                    "merge it into a model of its own (gkd export)."
                )
            self._models.append((model, names))
        return self

    def place(self, put: Callable[[nn.Module], Teacher]) -> None:
        placed: dict[str, Teacher] = {}
        self._bases: list[Teacher] = []
        for model, names in self._models:
            base = put(model)
            self._bases.append(base)
            for name in names:
                adapter = None if self.named[name][1] is None else self._adapter(name)
                placed[name] = base if len(names) == 1 else AdapterTeacher(base, adapter, self._cuda_graph)
        self._teachers = [placed[name] for name in self.names]
        sizes = [base.size for base in self._bases]
        self.size = tuple(map(sum, zip(*sizes, strict=True)))

    @property
    def packs(self) -> bool:
        return all(base.packs for base in self._bases)

    @property
    def capture_seconds(self) -> float:
        return sum(teacher.capture_seconds for teacher in self._teachers)

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        super().read(batch, collated)
        batch.teacher_shares = collated["teacher_shares"].to(batch.labels.device)

    @contextmanager
    def target(self, batch: Batch) -> Iterator[Target]:
        row_of_token = batch.scored // batch.input_ids.shape[1]
        with ExitStack() as stack:
            parts = []
            for share, teacher in zip(batch.teacher_shares.T, self._teachers, strict=True):
                rows = share.nonzero()[:, 0]
                if not len(rows):
                    continue
                whole = len(rows) == batch.rows
                own, tokens = (
                    (batch, torch.arange(len(batch.scored), device=rows.device)) if whole else batch.only(rows)
                )
                parts.append((tokens, share[row_of_token[tokens]], stack.enter_context(teacher.target(own))))
            if len(parts) == 1 and bool((parts[0][1] == 1).all()):
                yield parts[0][2]
            else:
                yield SeveralTarget(parts, len(batch.scored))

    def decode_by(self, generator: Generator) -> None:
        for base in self._bases:
            base.decode_by(generator)

    def write(self, prompts, mask, config, seed, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row by the teacher with the largest of its shares (B, K), the first of those that are equal."""
        writers, texts, rows_of = shares.argmax(1).to(prompts.device), [], []
        for i, teacher in enumerate(self._teachers):
            rows = (writers == i).nonzero()[:, 0]
            if len(rows):
                texts.append(teacher.write(prompts[rows], mask[rows], config, seed))
                rows_of.append(rows)
        width = max(ids.shape[1] for ids, _ in texts)
        ids = prompts.new_full((len(prompts), width), config.pad_token_id)
        kept = torch.zeros_like(ids)
        for rows, (text, text_mask) in zip(rows_of, texts, strict=True):
            ids[rows, : text.shape[1]], kept[rows, : text.shape[1]] = text, text_mask
        return ids, kept

    def identity(self, config: GenerationConfig) -> bytes | None:
        return hashlib.sha256(b"".join(teacher.identity(config) for teacher in self._teachers)).digest()
