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
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from gkd.config.caching import CacheArguments
from gkd.config.teacher import TEACHER_FLAGS
from gkd.data.continuation import ENCODING
from gkd.data.encoding import rows_fingerprint
from gkd.io.files import read_json, sha256_of, write_json, written_aside
from gkd.io.secrets import public
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead
from gkd.models.pairing import Pairing
from gkd.models.tokenizers import describe_tokenizer, tokenizer_fingerprint

VERSION = 1

# Flags of train_gkd.py that a cache decides for the runs that train from it.
SETTLED = (
    *TEACHER_FLAGS,
    *"dataset_name dataset_config dataset_train_split max_length max_new_tokens train_on chat_template_kwargs".split(),
    *"system_as_user loss_temperature".split(),
)
# Those of them that a student with another tokenizer may have otherwise: the teacher's own tokens stay as they are.
STUDENTS_OWN = "max_length max_new_tokens chat_template_kwargs system_as_user".split()
MANIFEST, HEAD_FILE, TOKENIZER_FILE = "manifest.json", "head.safetensors", "teacher.tokenizer"
TOP_K_COLUMNS = {"topk_ids": "int32", "topk_log_probs": "float16", "tail_log_mass": "float32"}
FOLLOWING_COLUMN = {"following_log_prob": "float32"}
# The columns with the teacher's output, by --keep.
TEACHER_COLUMNS = {
    "topk": {name: List(Value(kind)) for name, kind in TOP_K_COLUMNS.items()},
    "hidden": {"hidden_shard": Value("int32"), "hidden_start": Value("int64")},
}
_ENCODED = {name: List(Value("int64")) for name in ("prompt_ids", "input_ids", "labels")}
_ENCODED |= {name: Value("bool") for name in ("prompt_cut", "answer_cut")}
_FOR_ANY = {name: List(Value(kind)) for name, kind in FOLLOWING_COLUMN.items()} | {"row": Value("string")}


def features_of(settings: dict[str, Any]) -> Features:
    """Of a shard of a cache with these settings."""
    return Features(_ENCODED | TEACHER_COLUMNS[settings["keep"]] | (_FOR_ANY if settings.get("students") else {}))


def with_teacher(row: dict[str, Any], output: TopK | torch.Tensor) -> dict[str, Any]:
    """An encoded row with the teacher's output at its scored tokens; hidden states (scored, H) go to `hidden`."""
    if isinstance(output, torch.Tensor):
        return row | {"hidden": output}
    columns = dict(zip(TOP_K_COLUMNS, output.tensors, strict=True))
    if output.following is not None:
        columns["following_log_prob"] = output.following
    return row | {name: tensor.flatten().numpy() for name, tensor in columns.items()}


def hidden_file(shard: int) -> str:
    return f"{shard:05d}-hidden.safetensors"


def is_whole(shard: Path, entry: dict[str, Any]) -> bool:
    return shard.is_file() and sha256_of(shard) == entry["sha256"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError for a manifest that this version can't read."""
    try:
        manifest = read_json(folder / MANIFEST)
        version, settings = manifest["version"], manifest["settings"]
        kinds = {"settings": dict, "count": int, "shards": list}
        flags = settings.get("flags", {}) if isinstance(settings, dict) else None
        if not all(isinstance(manifest[name], kind) for name, kind in kinds.items()) or not isinstance(flags, dict):
            raise TypeError
        # Caches from before this setting have none; a tuple, since what stands there may have no hash.
        if settings.setdefault("keep", "topk") not in tuple(TEACHER_COLUMNS):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / MANIFEST} can't be read: delete {folder} and make the cache anew.") from None
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
        if (self.folder / MANIFEST).is_file():
            manifest = read_manifest(self.folder)
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
        write_json(self.folder / MANIFEST, made | {"count": count, "shards": entries})

    def _files(self, shard: int) -> list[str]:
        files = [f"{shard:05d}.parquet"]
        if shard == 0 and self.settings.get("students"):
            files.append(TOKENIZER_FILE)
        return files if self.keep == "topk" else [*files, hidden_file(shard), *([HEAD_FILE] if shard == 0 else [])]

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

        def is_there(name: str) -> bool:
            entry = self._entry(name)
            return entry is not None and is_whole(self.shards / name, entry)

        return [shard for shard in range(rank, len(self.parts), ranks) if not all(map(is_there, self._files(shard)))]

    def write(self, shard: int, rows: list[dict[str, Any]], head: LogitHead | None = None) -> None:
        """Writes a shard of rows from `with_teacher`, each file completely or not at all, and then its entry.

        `head`: of the teacher whose hidden states the rows have.
        """
        about: dict[str, Any] = {"rows": len(rows)}
        if TOKENIZER_FILE in self._files(shard):
            described = json.dumps(describe_tokenizer(self._tokenizer))
            self._save(TOKENIZER_FILE, lambda path: path.write_text(described, encoding="utf-8"))
        if self.keep == "hidden":
            if shard == 0:
                self._save(HEAD_FILE, lambda path: head.save(path, self.settings["vocab_size"]))
            hidden = [row["hidden"] for row in rows]
            self._save(hidden_file(shard), lambda path: save_file({"hidden": torch.cat(hidden)}, path))
            *starts, about["tokens"] = np.cumsum([0, *map(len, hidden)]).tolist()
            rows = [row | {"hidden_shard": shard, "hidden_start": at} for row, at in zip(rows, starts, strict=True)]
        else:
            tails = np.exp(np.concatenate([row["tail_log_mass"] for row in rows]).astype(np.float64))
            about |= {"tokens": len(tails), "tail_mass": float(tails.sum())}
        features = features_of(self.settings)
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
        files = (self.shards / entry["name"] for entry in entries if entry["name"] != HEAD_FILE)
        return sums | {"bytes": sum(path.stat().st_size for path in files)}
