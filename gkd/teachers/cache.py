"""A teacher's output on disk: for each scored token the k likeliest and the mass of the rest (`gkd.losses.topk`), or its
last hidden states, which with its output head are its whole distribution (`gkd.losses.targets.HiddenTarget`).

    CACHE/manifest.json          settings; name, rows, scored tokens, their tails' mass and SHA-256 of each file
    CACHE/shards/00000.parquet   encoded rows (`gkd.data.encoding`) with the teacher's output, written by `datasets`
    CACHE/shards/00000-hidden.safetensors, head.safetensors   of --keep hidden

A shard's columns beside those of an encoded row, flat over the row's scored tokens in their order: `topk_ids` int32 and
`topk_log_probs` float16 (scored · k), `tail_log_mass` float32 (scored). A cache for students of any tokenizer
(--cross_tokenizer) is in the teacher's own tokens, made of the text alone. It also has `following_log_prob` float32 (scored), of
the token that follows; `row`, the row as JSON, which each student's tokenizer encodes anew; and shards/teacher.tokenizer, JSON.
With --keep hidden, instead, `hidden_shard` and
`hidden_start`: where the row's states begin in `hidden` (scored tokens of all rows, H) of that shard's second file, in the
teacher's dtype. Several processes write shards: each writes the entry of a finished file beside it (00000.json), and at
the end all entries move to the manifest. The head is written with the first shard.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from gkd.config.caching import CacheArguments
from gkd.config.recorded import usable
from gkd.config.teacher import TEACHER_FLAGS
from gkd.config.training import NO_TEACHER
from gkd.data.batch import IGNORE, Batch, padded_rows
from gkd.data.continuation import ENCODING, puts_space_first
from gkd.data.encoding import rows_fingerprint
from gkd.io.files import is_plain_name, read_json, sha256_of, write_json, written_aside
from gkd.io.secrets import public
from gkd.losses.targets import HiddenTarget, Target
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead
from gkd.models.pairing import Pairing, Side
from gkd.models.tokenizers import describe_tokenizer, described_tokenizer, tokenizer_fingerprint
from gkd.teachers.base import Teacher

VERSION = 1

# Flags of train_gkd.py that a cache decides for the runs that train from it.
SETTLED = (
    *TEACHER_FLAGS,
    *"dataset_name dataset_config dataset_train_split max_length max_new_tokens train_on chat_template_kwargs".split(),
    *"system_as_user loss_temperature".split(),
)
# Those of them that a student with another tokenizer may have otherwise: the teacher's own tokens stay as they are.
_STUDENTS_OWN = "max_length max_new_tokens chat_template_kwargs system_as_user".split()
_MANIFEST, _HEAD, _TOKENIZER = "manifest.json", "head.safetensors", "teacher.tokenizer"
_TOP_K = {"topk_ids": "int32", "topk_log_probs": "float16", "tail_log_mass": "float32"}
_FOLLOWING = {"following_log_prob": "float32"}
# The columns with the teacher's output, by --keep.
_TEACHER = {
    "topk": {name: List(Value(kind)) for name, kind in _TOP_K.items()},
    "hidden": {"hidden_shard": Value("int32"), "hidden_start": Value("int64")},
}
_ENCODED = {name: List(Value("int64")) for name in ("prompt_ids", "input_ids", "labels")}
_ENCODED |= {name: Value("bool") for name in ("prompt_cut", "answer_cut")}
_FOR_ANY = {name: List(Value(kind)) for name, kind in _FOLLOWING.items()} | {"row": Value("string")}


def _features(settings: dict[str, Any]) -> Features:
    """Of a shard of a cache with these settings."""
    return Features(_ENCODED | _TEACHER[settings["keep"]] | (_FOR_ANY if settings.get("students") else {}))


def with_teacher(row: dict[str, Any], output: TopK | torch.Tensor) -> dict[str, Any]:
    """An encoded row with the teacher's output at its scored tokens; hidden states (scored, H) go to `hidden`."""
    if isinstance(output, torch.Tensor):
        return row | {"hidden": output}
    columns = dict(zip(_TOP_K, output.tensors, strict=True))
    if output.following is not None:
        columns["following_log_prob"] = output.following
    return row | {name: tensor.flatten().numpy() for name, tensor in columns.items()}


def _hidden_file(shard: int) -> str:
    return f"{shard:05d}-hidden.safetensors"


def _is_whole(shard: Path, entry: dict[str, Any]) -> bool:
    return shard.is_file() and sha256_of(shard) == entry["sha256"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError for a manifest that this version can't read."""
    try:
        manifest = read_json(folder / _MANIFEST)
        version, settings = manifest["version"], manifest["settings"]
        kinds = {"settings": dict, "count": int, "shards": list}
        flags = settings.get("flags", {}) if isinstance(settings, dict) else None
        if not all(isinstance(manifest[name], kind) for name, kind in kinds.items()) or not isinstance(flags, dict):
            raise TypeError
        if settings.setdefault("keep", "topk") not in tuple(_TEACHER):  # caches from before this setting have none
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
        for key in dict.fromkeys([*new, *old]):
            if difference := _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key):
                return difference
        return None
    return None if old == new else f"{path.removeprefix('flags.')} is {old!r} there and {new!r} here"


def cache_settings(
    args: CacheArguments, pairing: Pairing, encoded: Dataset, fingerprints: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """All that a cache's content depends on; `fingerprints` are the teacher's. Raises ValueError for fewer ids than `top_k`."""
    top_k = args.keep == "topk"
    any_student = args.cross_tokenizer != "off"
    if top_k and args.top_k > pairing.vocab_size:
        whose = "the teacher has" if any_student else "student and teacher share"
        raise ValueError(f"--top_k {args.top_k}: {whose} {pairing.vocab_size} ids.")
    if any_student and describe_tokenizer(pairing.tokenizer) is None:
        raise ValueError(
            "--cross_tokenizer keeps the teacher's tokenizer, and this is none of the library `tokenizers`."
        )
    by_teacher = {"writer": "teacher", "temperature": args.temperature, "seed": args.seed}
    return {
        "keep": args.keep,  # first: the settings of the two kinds differ in others too
        **({"students": "any"} if any_student else {}),
        "flags": {name: public(getattr(args, name)) for name in SETTLED if top_k or name != "loss_temperature"},
        **({"top_k": args.top_k} if top_k else {}),
        **({"teacher": dict(fingerprints)} if fingerprints else {}),
        "text": by_teacher if args.seq_kd else {"writer": "dataset"},
        "vocab_size": pairing.vocab_size,
        "tokenizer": tokenizer_fingerprint(pairing.tokenizer),
        "stop_ids": pairing.stop_ids,
        "rows": {"number": len(encoded), "tokens": rows_fingerprint(encoded)},
        "batch_size": args.batch_size,
        "rows_per_shard": args.rows_per_shard,
    }


class CacheWriter:
    """Writes a cache of `rows` rows, or continues one. Raises ValueError for a folder with other settings or files.

    `tokenizer`: the teacher's, which a cache for students of any tokenizer keeps.
    """

    def __init__(
        self,
        folder: str,
        settings: dict[str, Any],
        rows: int,
        rows_per_shard: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.folder, self.shards = Path(folder), Path(folder, "shards")
        self.settings, self._tokenizer = json.loads(json.dumps(settings)), tokenizer
        self.keep = self.settings.setdefault("keep", "topk")
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
        count = sum(len(self._files(shard)) for shard in range(len(self.parts)))
        write_json(self.folder / _MANIFEST, made | {"count": count, "shards": entries})

    def _files(self, shard: int) -> list[str]:
        files = [f"{shard:05d}.parquet"]
        if shard == 0 and self.settings.get("students"):
            files.append(_TOKENIZER)
        return files if self.keep == "topk" else [*files, _hidden_file(shard), *([_HEAD] if shard == 0 else [])]

    def _entry(self, name: str) -> dict[str, Any] | None:
        """The entry of a written file; the one beside it is newer than the manifest's."""
        path = (self.shards / name).with_suffix(".json")
        if not path.is_file():
            return self._entries.get(name)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            return entry if entry["name"] == name else None
        except (ValueError, KeyError, TypeError):  # the shard is written again
            return None

    def missing(self, rank: int = 0, ranks: int = 1) -> list[int]:
        """The shards that are not written yet, or whose bytes have changed since; one of `ranks` reads its part of them."""

        def is_whole(name: str) -> bool:
            entry = self._entry(name)
            return entry is not None and _is_whole(self.shards / name, entry)

        return [shard for shard in range(rank, len(self.parts), ranks) if not all(map(is_whole, self._files(shard)))]

    def write(self, shard: int, rows: list[dict[str, Any]], head: LogitHead | None = None) -> None:
        """Writes a shard of rows from `with_teacher`, each file completely or not at all, and then its entry.

        `head`: of the teacher whose hidden states the rows have.
        """
        about: dict[str, Any] = {"rows": len(rows)}
        if _TOKENIZER in self._files(shard):
            described = json.dumps(describe_tokenizer(self._tokenizer))
            self._save(_TOKENIZER, lambda path: path.write_text(described, encoding="utf-8"))
        if self.keep == "hidden":
            if shard == 0:
                self._save(_HEAD, lambda path: head.save(path, self.settings["vocab_size"]))
            hidden = [row["hidden"] for row in rows]
            self._save(_hidden_file(shard), lambda path: save_file({"hidden": torch.cat(hidden)}, path))
            *starts, about["tokens"] = np.cumsum([0, *map(len, hidden)]).tolist()
            rows = [row | {"hidden_shard": shard, "hidden_start": at} for row, at in zip(rows, starts, strict=True)]
        else:
            tails = np.exp(np.concatenate([row["tail_log_mass"] for row in rows]).astype(np.float64))
            about |= {"tokens": len(tails), "tail_mass": float(tails.sum())}
        features = _features(self.settings)
        columns = {name: [row[name] for row in rows] for name in features}
        self._save(f"{shard:05d}.parquet", Dataset.from_dict(columns, features=features).to_parquet, **about)

    def _save(self, name: str, save: Callable[[Path], Any], **about: Any) -> None:
        with written_aside(self.shards / name) as temporary:
            save(temporary)
            entry = {"name": name, **about, "sha256": sha256_of(temporary)}
        write_json((self.shards / name).with_suffix(".json"), entry)

    def finish(self) -> dict[str, float]:
        """Moves all entries to the manifest. Returns the sums of their rows, scored tokens and tail mass, and the bytes
        but those of the head."""
        entries = [self._entry(name) for shard in range(len(self.parts)) for name in self._files(shard)]
        self._write_manifest(entries)
        for leftover in (*self.shards.glob("*.json"), *self.shards.glob("*.partial")):
            leftover.unlink()
        sums = {name: sum(entry.get(name, 0) for entry in entries) for name in ("rows", "tokens", "tail_mass")}
        files = (self.shards / entry["name"] for entry in entries if entry["name"] != _HEAD)
        return sums | {"bytes": sum(path.stat().st_size for path in files)}


class TeacherCache(Teacher):
    """A complete cache as a teacher: it has no model, and its rows hold the teacher's output.

    `verify` compares each shard with its SHA-256, which reads all of it; one process of a machine is enough. Raises
    ValueError if there is no cache, it is not complete, or a shard is damaged.
    """

    brings_rows = True
    _head: LogitHead | None = None  # on the device of training, from the first batch on

    def __init__(self, folder: str, verify: bool = True):
        self.folder = Path(folder)
        if not (self.folder / _MANIFEST).is_file():
            raise ValueError(f"--teacher_cache {folder}: no {_MANIFEST} there. cache_teacher.py makes such a folder.")
        manifest = _read_manifest(self.folder)
        self.settings, self._encoding = manifest["settings"], manifest.get("encoding", 1)
        again = "Run cache_teacher.py again as before, which makes what is lacking."
        if len(manifest["shards"]) < manifest["count"]:
            raise ValueError(f"--teacher_cache {folder}: the caching was not finished. {again}")
        self.keep = self.settings["keep"]
        self.coarse = self.keep == "topk"
        for entry in manifest["shards"]:
            if not is_plain_name(entry["name"]):
                raise ValueError(f"{self.folder / _MANIFEST} names {entry['name']!r}, which is no file of its shards.")
        files = [self._file(entry["name"]) for entry in manifest["shards"]]
        with ThreadPoolExecutor() as pool:  # hidden states are many gigabytes, and hashing leaves other threads free
            whole = pool.map(_is_whole, files, manifest["shards"]) if verify else map(Path.is_file, files)
            for path, is_whole in zip(files, whole, strict=True):
                if not is_whole:
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
        size = self._file(_HEAD).stat().st_size
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
        data = Dataset.from_parquet([*map(str, self._shards)], features=_features(self.settings))
        told = [*_TEACHER[self.keep], *(_FOLLOWING if self.for_any_student else ())]
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
        values, _ = usable(flags, self.folder / _MANIFEST)
        for name in SETTLED:
            if name not in values or name == "loss_temperature":  # `side` compares the run's with the cache's
                continue
            holder = data_args if hasattr(data_args, name) else args
            if name in given and getattr(holder, name) != flags[name]:
                if self.for_any_student and name in _STUDENTS_OWN:
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
        if not _TEACHER[self.keep].keys() <= rows[0].keys():
            return {}
        if self.keep == "hidden":
            return {"teacher_output": torch.cat([*map(self._hidden, rows)])}
        kinds = _TOP_K | (_FOLLOWING if "following_log_prob" in rows[0] else {})
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
        with safe_open(self._file(_hidden_file(int(row["hidden_shard"]))), "pt") as file:
            return file.get_slice("hidden")[start:end]

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        batch.teacher_output = collated.get("teacher_output")

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        output = batch.teacher_output
        if self.keep == "topk":
            return nullcontext(output)
        if self._head is None:
            self._head = LogitHead.load(self._file(_HEAD), output.device)
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
        path = self._file(_TOKENIZER)
        try:
            tokenizer = described_tokenizer(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: no tokenizer can be read there ({error}).") from None
        if tokenizer_fingerprint(tokenizer) != self.settings["tokenizer"]:
            raise ValueError(f"{path} is another tokenizer than the one that this cache was made with: make it anew.")
        return Side(tokenizer, self.settings["vocab_size"], (self,))
