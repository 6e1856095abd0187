"""A cache of a teacher's output (`gkd.teachers.cache_files`) as a teacher."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from safetensors import safe_open

from gkd.config.recorded import usable
from gkd.config.training import NO_TEACHER
from gkd.data.batch import IGNORE, Batch, padded_rows
from gkd.data.continuation import puts_space_first
from gkd.io.files import is_plain_name, read_json
from gkd.losses.targets import HiddenTarget, Target
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead
from gkd.models.pairing import Pairing, Side
from gkd.models.tokenizers import described_tokenizer, tokenizer_fingerprint
from gkd.teachers.base import Teacher
from gkd.teachers.cache_files import (
    FOLLOWING_COLUMN,
    HEAD_FILE,
    MANIFEST,
    SETTLED,
    STUDENTS_OWN,
    TEACHER_COLUMNS,
    TOKENIZER_FILE,
    TOP_K_COLUMNS,
    features_of,
    hidden_file,
    is_whole,
    read_manifest,
)


class TeacherCache(Teacher):
    """A complete cache as a teacher: it has no model, and its rows hold the teacher's output.

    `verify` compares each shard with its SHA-256, which reads all of it; one process of a machine is enough. Raises
    ValueError if there is no cache, it is not complete, or a shard is damaged.
    """

    brings_rows = True
    _head: LogitHead | None = None  # on the device of training, from the first batch on

    def __init__(self, folder: str, verify: bool = True):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(f"--teacher_cache {folder}: no {MANIFEST} there. cache_teacher.py makes such a folder.")
        manifest = read_manifest(self.folder)
        self.settings, self._encoding = manifest["settings"], manifest.get("encoding", 1)
        again = "Run cache_teacher.py again as before, which makes what is lacking."
        if len(manifest["shards"]) < manifest["count"]:
            raise ValueError(f"--teacher_cache {folder}: the caching was not finished. {again}")
        self.keep = self.settings["keep"]
        self.coarse = self.keep == "topk"
        for entry in manifest["shards"]:
            if not is_plain_name(entry["name"]):
                raise ValueError(f"{self.folder / MANIFEST} names {entry['name']!r}, which is no file of its shards.")
        files = [self._file(entry["name"]) for entry in manifest["shards"]]
        with ThreadPoolExecutor() as pool:  # hidden states are many gigabytes, and hashing leaves other threads free
            whole = pool.map(is_whole, files, manifest["shards"]) if verify else map(Path.is_file, files)
            for path, intact in zip(files, whole, strict=True):
                if not intact:
                    pool.shutdown(cancel_futures=True)
                    raise ValueError(f"{path} is {'damaged' if path.is_file() else 'missing'}. {again}")
        self._shards = [path for path in files if path.suffix == ".parquet"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_head": None}  # a worker that collates rows needs none, and has no GPU

    @classmethod
    def named(cls, args: Any) -> "TeacherCache":
        """The cache that `--teacher_cache` names."""
        return cls(args.teacher_cache, verify=args.local_process_index == 0)

    def _file(self, name: str) -> Path:
        return self.folder / "shards" / name

    @property
    def head_size(self) -> tuple[int, int] | None:
        if self.keep == "topk":
            return None
        size = self._file(HEAD_FILE).stat().st_size
        return size, size // self.settings["vocab_size"]

    @property
    def for_any_student(self) -> bool:
        """Whether it is in the teacher's own tokens, for students of any tokenizer."""
        return self.settings.get("students") == "any"

    @property
    def eos_token_id(self) -> list[int]:
        """The tokens that ended an answer: those of the tokenizer, the student and the teacher. `side` passes them on."""
        return self.settings["stop_ids"]

    def rows(self, pairing: Pairing | None = None) -> Dataset:
        """The encoded rows with the teacher's output, memory-mapped; as a student with another tokenizer reads them, if the
        pairing is of one."""
        data = Dataset.from_parquet([*map(str, self._shards)], features=features_of(self.settings))
        told = [*TEACHER_COLUMNS[self.keep], *(FOLLOWING_COLUMN if self.for_any_student else ())]
        if pairing is not None and pairing.cross is not None:
            of_teacher = self.settings["text"]["writer"] == "teacher"
            data = concatenate_datasets([pairing.encode_kept(data, of_teacher), data.select_columns(told)], axis=1)
        elif self.for_any_student:
            data = data.remove_columns("row")
        # A row has thousands of numbers: arrays are faster than Python objects.
        return data.with_format("numpy", columns=told, output_all_columns=True)

    def settle(self, data_args: Any, args: Any, given: set[str]) -> None:
        """Sets the flags that the cache was made with: teacher, data, limits, template variables."""
        if data_args.eval_dataset_name is not None:
            raise ValueError(f"--eval_dataset_name {NO_TEACHER}")
        flags = self.settings["flags"]
        values, _ = usable(flags, self.folder / MANIFEST)
        for name in SETTLED:
            if name not in values or name == "loss_temperature":  # `side` compares the run's with the cache's
                continue
            holder = data_args if hasattr(data_args, name) else args
            if name in given and getattr(holder, name) != flags[name]:
                if self.for_any_student and name in STUDENTS_OWN:
                    continue
                raise ValueError(
                    f"--{name} {getattr(holder, name)}: {self.folder} was made with {flags[name]}. Leave the flag out, or "
                    "make another cache by cache_teacher.py."
                )
            setattr(holder, name, values[name])
        args.seq_kd = self.settings["text"]["writer"] == "teacher"  # only for the record

    def columns(self, rows: list[dict[str, Any]]) -> dict[str, TopK | torch.Tensor]:
        """`teacher_output`, in the order of the batch's scored tokens; {} for rows that are not of a cache.

        For a student with another tokenizer it is in the order of the teacher's scored tokens, which are `teacher_answers`, int64
        (B, T), -100 where a row has fewer.
        """
        if not TEACHER_COLUMNS[self.keep].keys() <= rows[0].keys():
            return {}
        if self.keep == "hidden":
            return {"teacher_output": torch.cat([*map(self._hidden, rows)])}
        kinds = TOP_K_COLUMNS | (FOLLOWING_COLUMN if "following_log_prob" in rows[0] else {})
        parts = [np.concatenate([np.asarray(row[name], kind) for row in rows]) for name, kind in kinds.items()]
        ids, log_probs, *others = map(torch.from_numpy, parts)
        k = self.settings["top_k"]
        columns = {"teacher_output": TopK(ids.view(-1, k), log_probs.view(-1, k), *others)}
        if "teacher_answer_ids" in rows[0]:
            columns["teacher_answers"] = padded_rows([row["teacher_answer_ids"] for row in rows], IGNORE)[0]
        return columns

    def _hidden(self, row: dict[str, Any]) -> torch.Tensor:
        """A row's hidden states (scored, H), mapped into memory. No file stays open: there may be thousands."""
        start = int(row["hidden_start"])
        end = start + int((np.asarray(row["labels"])[1:] != IGNORE).sum())
        with safe_open(self._file(hidden_file(int(row["hidden_shard"]))), "pt") as file:
            return file.get_slice("hidden")[start:end]

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        batch.teacher_output = collated.get("teacher_output")

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        output = batch.teacher_output
        if self.keep == "topk":
            return nullcontext(output)
        if self._head is None:
            self._head = LogitHead.load(self._file(HEAD_FILE), output.device)
        return nullcontext(HiddenTarget(output, self._head))

    def side(self, student: Side, args: Any) -> Side:
        """The student's tokenizer, or its own, and the cache's vocabulary."""
        size, where = self.settings["vocab_size"], f"--teacher_cache {self.folder}"
        if args.lmbda != 0:
            raise ValueError(f"{where} needs --lmbda 0, not {args.lmbda}: no teacher is there for the student's text.")
        temperature = self.settings["flags"].get("loss_temperature")  # hidden states are of none
        if temperature is not None and args.loss_temperature != temperature:
            raise ValueError(
                f"{where} holds probabilities at temperature {temperature}: give --loss_temperature {temperature}, or "
                f"make another cache with --loss_temperature {args.loss_temperature}."
            )
        if tokenizer_fingerprint(student.tokenizer) != self.settings["tokenizer"]:
            if args.cross_tokenizer != "off":
                return self._own_side(args.cross_tokenizer)
            more = (
                "add --cross_tokenizer shared"
                if self.for_any_student
                else "make one with this student as cache_teacher.py's --model_name_or_path, or with --cross_tokenizer"
            )
            raise ValueError(f"{where} was made for another tokenizer or chat template than the student's: {more}.")
        if self.for_any_student and puts_space_first(student.tokenizer):
            raise ValueError(
                f"{where} is for students with another tokenizer than the teacher's, which puts a space before an answer: make one "
                "for this student by cache_teacher.py without --cross_tokenizer."
            )
        if self._encoding < 2 and puts_space_first(student.tokenizer):
            raise ValueError(
                f"{where} was made by a version that put a space before each answer with this tokenizer: make it anew "
                "by cache_teacher.py, into another folder."
            )
        if student.size < size:
            raise ValueError(
                f"{where} was made for {size} ids, but the student has logits for {student.size}. Make one "
                "with this student as cache_teacher.py's --model_name_or_path."
            )
        return Side(student.tokenizer, size, (self,))

    def _own_side(self, loss: str) -> Side:
        """Its own tokenizer and vocabulary, for a student with another one."""
        where = f"--teacher_cache {self.folder}"
        if not self.for_any_student:
            raise ValueError(
                f"{where} is for students of one tokenizer, and this student has another. Make one for students of any by "
                "cache_teacher.py --cross_tokenizer shared."
            )
        if loss == "uld":
            raise ValueError(
                f"{where} has the teacher's likeliest tokens alone, and --cross_tokenizer uld compares all by rank: take "
                "shared, or the teacher itself."
            )
        path = self._file(TOKENIZER_FILE)
        try:
            tokenizer = described_tokenizer(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: no tokenizer can be read there ({error}).") from None
        if tokenizer_fingerprint(tokenizer) != self.settings["tokenizer"]:
            raise ValueError(f"{path} is another tokenizer than the one that this cache was made with: make it anew.")
        return Side(tokenizer, self.settings["vocab_size"], (self,))
