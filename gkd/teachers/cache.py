"""A teacher's output on disk: for each scored token the k likeliest and the mass of the rest (`gkd.losses.topk`).

    CACHE/manifest.json          settings; name, rows, scored tokens, their tails' mass and SHA-256 of each shard
    CACHE/shards/00000.parquet   encoded rows (`gkd.data.encoding`) with the teacher's output, written by `datasets`

A shard's columns beside those of an encoded row, flat over the row's scored tokens in their order: `topk_ids` int32 and
`topk_log_probs` float16 (scored · k), `tail_log_mass` float32 (scored). Several processes write shards: each writes the
entry of a finished shard beside it (00000.json), and at the end all entries move to the manifest.
"""

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value

from gkd.config.caching import CacheArguments
from gkd.config.recorded import usable
from gkd.config.teacher import TEACHER_FLAGS
from gkd.config.training import NO_TEACHER
from gkd.data.batch import Batch
from gkd.data.continuation import ENCODING, puts_space_first
from gkd.data.encoding import rows_fingerprint
from gkd.io.files import is_plain_name, read_json, write_json, written_aside
from gkd.io.secrets import public
from gkd.losses.topk import TopK
from gkd.models.pairing import Pairing, Side
from gkd.models.tokenizers import tokenizer_fingerprint
from gkd.teachers.base import Teacher

VERSION = 1

# Flags of train_gkd.py that a cache decides for the runs that train from it.
SETTLED = (
    *TEACHER_FLAGS,
    *"dataset_name dataset_config dataset_train_split max_length max_new_tokens train_on chat_template_kwargs".split(),
    *"system_as_user loss_temperature".split(),
)
_MANIFEST = "manifest.json"
_TEACHER = {"topk_ids": "int32", "topk_log_probs": "float16", "tail_log_mass": "float32"}
_FEATURES = Features(
    {name: List(Value("int64")) for name in ("prompt_ids", "input_ids", "labels")}
    | {name: Value("bool") for name in ("prompt_cut", "answer_cut")}
    | {name: List(Value(kind)) for name, kind in _TEACHER.items()}
)


def with_teacher(row: dict[str, Any], topk: TopK) -> dict[str, Any]:
    """An encoded row with the teacher's output at its scored tokens."""
    return row | {name: tensor.flatten().numpy() for name, tensor in zip(_TEACHER, topk.tensors, strict=True)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _is_whole(shard: Path, entry: dict[str, Any]) -> bool:
    return shard.is_file() and _digest(shard) == entry["sha256"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError for a manifest that this version can't read."""
    try:
        manifest = read_json(folder / _MANIFEST)
        version, settings = manifest["version"], manifest["settings"]
        kinds = {"settings": dict, "count": int, "shards": list}
        flags = settings.get("flags", {}) if isinstance(settings, dict) else None
        if not all(isinstance(manifest[name], kind) for name, kind in kinds.items()) or not isinstance(flags, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / _MANIFEST} can't be read: delete {folder} and make the cache anew.") from None
    if version != VERSION:
        raise ValueError(f"{folder} is a teacher cache of version {version}, this is {VERSION}: make it anew.")
    flags.setdefault("system_as_user", False)  # caches from before this flag have none
    return manifest


def _difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first entry in which two settings differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if difference := _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key):
                return difference
        return None
    return None if old == new else f"{path.removeprefix('flags.')} is {old!r} there and {new!r} here"


def cache_settings(args: CacheArguments, pairing: Pairing, encoded: Dataset) -> dict[str, Any]:
    """All that a cache's content depends on. Raises ValueError for fewer ids than `top_k`."""
    if args.top_k > pairing.vocab_size:
        raise ValueError(f"--top_k {args.top_k}: student and teacher share {pairing.vocab_size} ids.")
    by_teacher = {"writer": "teacher", "temperature": args.temperature, "seed": args.seed}
    return {
        "flags": {name: public(getattr(args, name)) for name in SETTLED},
        "top_k": args.top_k,
        "text": by_teacher if args.seq_kd else {"writer": "dataset"},
        "vocab_size": pairing.vocab_size,
        "tokenizer": tokenizer_fingerprint(pairing.tokenizer),
        "stop_ids": pairing.stop_ids,
        "rows": {"number": len(encoded), "tokens": rows_fingerprint(encoded)},
        "batch_size": args.batch_size,
        "rows_per_shard": args.rows_per_shard,
    }


class CacheWriter:
    """Writes a cache of `rows` rows, or continues one. Raises ValueError for a folder with other settings or files."""

    def __init__(self, folder: str, settings: dict[str, Any], rows: int, rows_per_shard: int):
        self.folder, self.shards = Path(folder), Path(folder, "shards")
        self.settings = json.loads(json.dumps(settings))
        self.parts = [range(i, min(i + rows_per_shard, rows)) for i in range(0, rows, rows_per_shard)]
        self._entries: dict[str, dict[str, Any]] = {}
        if (self.folder / _MANIFEST).is_file():
            manifest = _read_manifest(self.folder)
            if difference := _difference(manifest["settings"], self.settings):
                if difference.startswith("rows.tokens"):
                    why = "other data, or made by a version that encoded rows otherwise"
                    difference = f"its rows have other tokens: {why}"
                raise ValueError(
                    f"{folder} holds a teacher cache of other settings: {difference}. Choose another --output_dir, or "
                    "delete this one."
                )
            self._entries = {entry["name"]: entry for entry in manifest["shards"]}
        elif self.folder.exists() and any(path.suffix != ".partial" for path in self.folder.iterdir()):
            raise ValueError(f"{folder} holds other files: choose another --output_dir.")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest([])
        if self.shards.is_symlink():
            raise ValueError(
                f"{self.shards} is a link: finishing a cache deletes files there. Choose another --output_dir."
            )
        self.shards.mkdir(exist_ok=True)

    def _write_manifest(self, entries: list[dict[str, Any]]) -> None:
        made = {"version": VERSION, "encoding": ENCODING, "settings": self.settings}
        write_json(self.folder / _MANIFEST, made | {"count": len(self.parts), "shards": entries})

    def _path(self, shard: int) -> Path:
        return self.shards / f"{shard:05d}.parquet"

    def _entry(self, shard: int) -> dict[str, Any] | None:
        """The entry of a written shard; a file beside the shard is newer than the manifest."""
        name, path = self._path(shard).name, self._path(shard).with_suffix(".json")
        if not path.is_file():
            return self._entries.get(name)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            return entry if entry["name"] == name else None
        except (ValueError, KeyError, TypeError):  # the shard is written again
            return None

    def missing(self) -> list[int]:
        """The shards that are not written yet, or whose bytes have changed since."""
        entries = {shard: self._entry(shard) for shard in range(len(self.parts))}
        return [shard for shard, entry in entries.items() if not (entry and _is_whole(self._path(shard), entry))]

    def write(self, shard: int, rows: list[dict[str, Any]]) -> None:
        """Writes a shard of rows from `with_teacher`, completely or not at all, and then its entry."""
        path = self._path(shard)
        columns = {name: [row[name] for row in rows] for name in _FEATURES}
        tails = np.exp(np.concatenate([row["tail_log_mass"] for row in rows]).astype(np.float64))
        entry = {"name": path.name, "rows": len(rows), "tokens": len(tails), "tail_mass": float(tails.sum())}
        with written_aside(path) as temporary:
            Dataset.from_dict(columns, features=_FEATURES).to_parquet(temporary)
            entry["sha256"] = _digest(temporary)
        write_json(path.with_suffix(".json"), entry)

    def finish(self) -> dict[str, float]:
        """Moves all entries to the manifest. Returns the sums of their rows, scored tokens and tail mass, and the bytes."""
        entries = [self._entry(shard) for shard in range(len(self.parts))]
        self._write_manifest(entries)
        for leftover in (*self.shards.glob("*.json"), *self.shards.glob("*.partial")):
            leftover.unlink()
        sums = {name: sum(entry[name] for entry in entries) for name in ("rows", "tokens", "tail_mass")}
        return sums | {"bytes": sum((self.shards / entry["name"]).stat().st_size for entry in entries)}


class TeacherCache(Teacher):
    """A complete cache as a teacher: it has no model, and its rows hold the teacher's output.

    `verify` compares each shard with its SHA-256, which reads all of it; one process of a machine is enough. Raises
    ValueError if there is no cache, it is not complete, or a shard is damaged.
    """

    brings_rows = True

    def __init__(self, folder: str, verify: bool = True):
        self.folder = Path(folder)
        if not (self.folder / _MANIFEST).is_file():
            raise ValueError(f"--teacher_cache {folder}: no {_MANIFEST} there. cache_teacher.py makes such a folder.")
        manifest = _read_manifest(self.folder)
        self.settings, self._encoding = manifest["settings"], manifest.get("encoding", 1)
        again = "Run cache_teacher.py again as before, which makes what is lacking."
        if len(manifest["shards"]) < manifest["count"]:
            raise ValueError(f"--teacher_cache {folder}: the caching was not finished. {again}")
        self._shards: list[Path] = []
        for entry in manifest["shards"]:
            if not is_plain_name(entry["name"]):
                raise ValueError(f"{self.folder / _MANIFEST} names {entry['name']!r}, which is no file of its shards.")
            path = self.folder / "shards" / entry["name"]
            if not (_is_whole(path, entry) if verify else path.is_file()):
                raise ValueError(f"{path} is {'damaged' if path.is_file() else 'missing'}. {again}")
            self._shards.append(path)

    @classmethod
    def named(cls, args: Any) -> "TeacherCache":
        """The cache that `--teacher_cache` names."""
        return cls(args.teacher_cache, verify=args.local_process_index == 0)

    @property
    def eos_token_id(self) -> list[int]:
        """The tokens that ended an answer: those of the tokenizer, the student and the teacher. `side` passes them on."""
        return self.settings["stop_ids"]

    def rows(self) -> Dataset:
        """The encoded rows with the teacher's output, memory-mapped."""
        data = Dataset.from_parquet([*map(str, self._shards)], features=_FEATURES)
        # A row has thousands of numbers: arrays are faster than Python objects.
        return data.with_format("numpy", columns=list(_TEACHER), output_all_columns=True)

    def settle(self, data_args: Any, args: Any, given: set[str]) -> None:
        """Sets the flags that the cache was made with: teacher, data, limits, template variables."""
        if data_args.eval_dataset_name is not None:
            raise ValueError(f"--eval_dataset_name {NO_TEACHER}")
        flags = self.settings["flags"]
        values, _ = usable(flags, self.folder / _MANIFEST)
        for name in SETTLED:
            if name not in values or name == "loss_temperature":  # `side` compares the run's with the cache's
                continue
            holder = data_args if hasattr(data_args, name) else args
            if name in given and getattr(holder, name) != flags[name]:
                raise ValueError(
                    f"--{name} {getattr(holder, name)}: {self.folder} was made with {flags[name]}. Leave the flag out, or "
                    "make another cache by cache_teacher.py."
                )
            setattr(holder, name, values[name])
        args.seq_kd = self.settings["text"]["writer"] == "teacher"  # only for the record

    def columns(self, rows: list[dict[str, Any]]) -> dict[str, TopK]:
        """`topk`: the teacher's output in the order of the batch's scored tokens; {} for rows that are not of a cache."""
        if "topk_ids" not in rows[0]:
            return {}
        parts = [np.concatenate([np.asarray(row[name], kind) for row in rows]) for name, kind in _TEACHER.items()]
        ids, log_probs, tail = map(torch.from_numpy, parts)
        k = max(len(ids) // max(len(tail), 1), 1)
        return {"topk": TopK(ids.view(-1, k), log_probs.view(-1, k), tail)}

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        batch.teacher_output = collated.get("topk")

    def target(self, batch: Batch) -> AbstractContextManager[TopK]:
        return nullcontext(batch.teacher_output)

    def side(self, student: Side, args: Any) -> Side:
        """The student's tokenizer, and the cache's vocabulary."""
        size, where = self.settings["vocab_size"], f"--teacher_cache {self.folder}"
        if args.lmbda != 0:
            raise ValueError(f"{where} needs --lmbda 0, not {args.lmbda}: no teacher is there for the student's text.")
        temperature = self.settings["flags"]["loss_temperature"]
        if args.loss_temperature != temperature:
            raise ValueError(
                f"{where} holds probabilities at temperature {temperature}: give --loss_temperature {temperature}, or "
                f"make another cache with --loss_temperature {args.loss_temperature}."
            )
        if tokenizer_fingerprint(student.tokenizer) != self.settings["tokenizer"]:
            raise ValueError(
                f"{where} was made for another tokenizer or chat template than the student's. Make one with this "
                "student as cache_teacher.py's --model_name_or_path."
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
