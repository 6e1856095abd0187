"""The flags of `gkd cache`. Those that `gkd train` has too mean the same."""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from gkd.config.generation import GenerationArguments
from gkd.config.parser import FlagParser
from gkd.config.teacher import TeacherArguments, teacher_flag
from gkd.config.values import check_positive, check_room, check_seed, flag, parse_objects


@dataclass(kw_only=True)
class CacheArguments(GenerationArguments, TeacherArguments):
    output_dir: str = field(metadata={"help": "Where the cache goes; a caching that was cut off goes on there."})
    model_name_or_path: str = field(metadata={"help": "The student: its tokenizer and vocabulary, no weights."})
    dataset_name: str = field(
        metadata={"help": "A JSON, JSONL, CSV, TSV or Parquet file, a folder, or a hub id, as of train_gkd.py."}
    )
    keep: str = flag(
        "topk",
        "What is kept of the teacher at each scored token: its --top_k likeliest tokens, or its last hidden states, "
        "which with its output head are all that it says: exact for each divergence, but 8 KB a token at width 4096 in "
        "bf16.",
        choices=["topk", "hidden"],
    )
    top_k: int = flag(64, "How many of the teacher's likeliest tokens are kept.")
    dataset_config: str | None = flag(None, "Of a dataset on the hub.")
    dataset_train_split: str = flag("train", "The split to take.")
    train_on: str = flag("last_turn", "Which assistant turns are scored.", choices=["last_turn", "all_turns"])
    chat_template_kwargs: dict[str, Any] | str | None = flag(None, "JSON with variables for the chat template.")
    system_as_user: bool = flag(False, "As of train_gkd.py.")
    chat_template_path: str | None = flag(None, "As of train_gkd.py.")
    eos_token: str | None = flag(None, "As of train_gkd.py.")
    pad_token: str | None = flag(None, "As of train_gkd.py.")
    max_length: int | None = flag(1024, "Of prompt and completion together.")
    max_new_tokens: int = flag(128, "Of a completion.")
    seq_kd: bool = flag(False, "The teacher writes the text, not the dataset.")
    temperature: float = flag(0.9, "Of that writing.")
    seed: int = flag(42, "Of that writing.")
    loss_temperature: float = flag(1.0, "Of the probabilities that are kept.")
    model_revision: str = flag("main", "Branch, tag or commit of the student.")
    trust_remote_code: bool = flag(False, "Run code that comes with the student.")
    batch_size: int | None = flag(
        None, "Rows that the teacher reads, and writes, together (16; of --teacher_logprobs_url 128)."
    )
    rows_per_shard: int = flag(512, "What is written, and goes on, at a time.")

    def __post_init__(self):
        parse_objects(self, ("chat_template_kwargs", "teacher_model_init_kwargs"))
        check_positive(self, "top_k max_new_tokens temperature loss_temperature batch_size rows_per_shard".split())
        check_seed(self, "seed")
        defaults = {f.name: f.default for f in fields(self)}
        self._settle_served(defaults)
        self.batch_size = self.batch_size or (16 if self.teacher_logprobs_url is None else 128)
        for name in ("top_k", "loss_temperature"):
            if self.keep == "hidden" and getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name} has no effect on --keep hidden, which keeps the whole: leave it out.")
        if self.generates:
            check_room(self)
        if getattr(self, name := teacher_flag(self)) is None:
            raise ValueError(f"--{name} is required, or --teacher_url, --teacher_logprobs_url or --teachers.")
        self.check_teacher()
        self.check_generation()
        if self.keep == "hidden" and self.teachers is not None:
            raise ValueError("--keep hidden keeps one output head: cache the rows of each of --teachers apart.")

    def _settle_served(self, defaults: dict[str, Any]) -> None:
        """What a server of log-probabilities tells is what is kept. Raises ValueError where that can't be."""
        if self.teacher_logprobs_url is None:
            return
        if self.keep == "hidden":
            raise ValueError(
                "--keep hidden needs hidden states, and --teacher_logprobs_url tells none: use --teacher_url."
            )
        if self.top_k not in (defaults["top_k"], self.teacher_top_k):
            raise ValueError(
                f"--top_k {self.top_k}: with --teacher_logprobs_url as many are kept as --teacher_top_k asks for "
                f"({self.teacher_top_k}): give that alone."
            )
        self.top_k = self.teacher_top_k

    @property
    def generates(self) -> bool:
        """Whether the teacher writes text."""
        return self.seq_kd


make_parser = partial(FlagParser, CacheArguments)
