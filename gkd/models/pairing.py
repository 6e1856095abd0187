"""A student and its teacher as far as tokens go: GKD compares next-token distributions, so ids must mean the same."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from gkd.data.encoding import RowEncoder, encode_dataset
from gkd.io.paths import check_adapter, check_model
from gkd.io.pickles import check_weights
from gkd.models.heads import base_of
from gkd.models.loading import check_architecture, keep_within_window, read_config, read_generation_config
from gkd.models.tokenizers import (
    apply_token_flags,
    load_tokenizer,
    optional_tokenizer,
    shared_vocab_size,
    stop_token_ids,
)


@dataclass(frozen=True)
class Side:
    """What the student or the teacher says about tokens.

    Attributes:
        tokenizer: None of a teacher that comes without one.
        size: how many ids it has logits for.
        stops: what names stop tokens beside the tokenizer: configs, generation configs.
        config: None of a teacher that is no model here.
    """

    tokenizer: PreTrainedTokenizerBase | None
    size: int
    stops: tuple[Any, ...]
    config: PretrainedConfig | None = None

    @classmethod
    def of_config(cls, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig, generation: Any) -> "Side":
        return cls(tokenizer, config.get_text_config().vocab_size, (config, generation), config)

    @classmethod
    def of_model(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> "Side":
        base = base_of(model)
        return cls.of_config(tokenizer, base.config, base.generation_config)

    @classmethod
    def of_student(cls, student_args: Any, args: Any) -> "Side":
        """The student that the flags name; its weights are not read.

        Raises:
            ValueError: no such model; one that can't be trained; a tokenizer that can't be loaded.
        """
        flag, name = "--model_name_or_path", student_args.model_name_or_path
        check_model(flag, name)
        check_weights(name)
        if getattr(student_args, "student_adapter", None) is not None:
            check_weights(student_args.student_adapter)
        tokenizer = load_tokenizer(student_args, args)
        side = cls._read(flag, name, tokenizer, student_args.model_revision, args.trust_remote_code)
        text = side.config.get_text_config()
        if getattr(args, "router_aux_loss_coef", 0) and not hasattr(text, "output_router_logits"):
            raise ValueError(
                f"--router_aux_loss_coef {args.router_aux_loss_coef}: {text.model_type} is no mixture of experts that "
                "tells its routers' choices."
            )
        return side

    @classmethod
    def of_teacher(cls, args: Any) -> "Side":
        """The teacher that the flags name; its weights are not read.

        Raises:
            ValueError: no such model or adapter; one that can't be asked; a tokenizer that can't be loaded.
        """
        flag, name = "--teacher_model_name_or_path", args.teacher_model_name_or_path
        check_model(flag, name)
        check_weights(name)
        if args.teacher_adapter is not None:
            check_adapter("--teacher_adapter", args.teacher_adapter)
            check_weights(args.teacher_adapter)
        place = args.teacher_revision, args.teacher_trust_remote_code
        tokenizer = optional_tokenizer(name, revision=place[0], trust_remote_code=place[1])
        return cls._read(flag, name, tokenizer, *place)

    @classmethod
    def _read(cls, flag: str, name: str, tokenizer, revision: str, trusted: bool) -> "Side":
        config = read_config(flag, name, revision=revision, trust_remote_code=trusted)
        check_architecture(config, name)
        return cls.of_config(tokenizer, config, read_generation_config(flag, name, revision=revision))


@dataclass(frozen=True)
class Pairing:
    """Student and teacher side by side.

    Attributes:
        tokenizer: the student's, by which both read and write; it has a pad token.
        teacher_tokenizer: None where the teacher has none, and the sizes of the vocabularies say that they are the same.
        vocab_size: how many leading ids both have; the divergence is taken over these.
        stop_ids: all tokens below that which end an answer, sorted.
        encoder: from rows to tokens.
        configs: the student's, and the teacher's if it is a model here.
        sizes: how many ids student and teacher have logits for.
        shared: `vocab_size` with each student alone, where there are several.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    stop_ids: list[int]
    encoder: RowEncoder
    configs: list[PretrainedConfig]
    sizes: tuple[int, int]
    shared: list[int]

    @classmethod
    def of(cls, student: Side, teacher: Side, args: Any, others: tuple[Side, ...] = ()) -> "Pairing":
        """The one place where a pairing is built.

        Args:
            args: the flags of the row encoder.
            others: further students, which read what `student` reads.

        Raises:
            gkd.models.tokenizers.VocabularyMismatch: a student and the teacher do not share a vocabulary.
            ValueError: nothing names a stop token.
        """
        students = (student, *others)
        shared = [shared_vocab_size(s.tokenizer, teacher.tokenizer, s.size, teacher.size) for s in students]
        size = min(shared)
        holders = [holder for side in (*students, teacher) for holder in side.stops]
        stop_ids = [i for i in stop_token_ids(student.tokenizer, *holders) if i < size]
        encoder = RowEncoder.of(args, student.tokenizer, stop_ids)
        configs = [side.config for side in (student, teacher) if side.config is not None]
        sizes = student.size, teacher.size
        return cls(student.tokenizer, teacher.tokenizer, size, stop_ids, encoder, configs, sizes, shared)

    @classmethod
    def read(cls, student_args: Any, teacher: Any, args: Any) -> "Pairing":
        """Of models by name, before their weights load. Lowers `--max_length` to what both can read.

        Args:
            teacher: a `gkd.teachers.base.Teacher`, or its description: what has `side(student, args)`.

        Raises:
            ValueError: as `of`; a model that is not there, or can't be trained or asked.
        """
        student = Side.of_student(student_args, args)
        theirs = teacher.side(student, args)
        keep_within_window(args, [side.config for side in (student, theirs) if side.config is not None])
        return cls.of(student, theirs, args)

    @classmethod
    def of_models(
        cls,
        model: nn.Module,
        teacher: Any,
        args: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> "Pairing":
        """Of loaded models.

        Args:
            teacher: a model, or what has `side(student, args)`, see `read`.
            tokenizer: the student's; None loads the one beside its weights.
        """
        if tokenizer is None:
            name = base_of(model).config._name_or_path
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        apply_token_flags(tokenizer, args)
        student = Side.of_model(model, tokenizer)
        is_model = isinstance(teacher, nn.Module)
        return cls.of(
            student, Side.of_model(teacher, teacher_tokenizer) if is_model else teacher.side(student, args), args
        )

    def encode(
        self,
        rows: Dataset | IterableDataset,
        source: str | None = None,
        processes: int | None = None,
        keep_rows: bool = False,
    ) -> Dataset | IterableDataset:
        """See `gkd.data.encoding.encode_dataset`."""
        return encode_dataset(rows, self.encoder, processes, keep_rows, source)
