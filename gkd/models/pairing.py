"""The tokens of a student and its teacher: GKD compares next-token distributions, so ids must mean the same."""

from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from gkd.data.encoding import RowEncoder, encode_dataset, encode_kept
from gkd.io.paths import check_adapter, check_model, not_loaded
from gkd.io.pickles import check_weights
from gkd.models.cross_vocabulary import CrossVocabulary
from gkd.models.heads import base_of
from gkd.models.loading import check_architecture, context_window, keep_within_window, read_configs
from gkd.models.tokenizers import (
    VocabularyMismatch,
    apply_token_flags,
    optional_tokenizer,
    shared_vocab_size,
    stop_token_ids,
)

Rows = Dataset | IterableDataset


@dataclass(frozen=True)
class Loaded:
    """A model whose weights load in this process.

    Attributes:
        readers: the number of teachers that share it, each with an adapter of its own, or one with none.
        adapters: parameters of their LoRA adapters, which stay beside its weights.
    """

    config: PretrainedConfig
    readers: int = 1
    adapters: int = 0


@dataclass(frozen=True)
class Side:
    """Tokenizer and model of the student or the teacher.

    Attributes:
        tokenizer: None for a teacher without one.
        size: the number of ids that it has logits for.
        stops: configs with `eos_token_id`.
        models: empty for a teacher that is not a model in this process; several for several teachers.
        window: how many tokens it can read; None if that is not known.
        teachers: the names of several teachers, of which rows name theirs.
    """

    tokenizer: PreTrainedTokenizerBase | None
    size: int
    stops: tuple[Any, ...]
    models: tuple[Loaded, ...] = ()
    window: int | None = None
    teachers: tuple[str, ...] = ()

    @classmethod
    def of_config(cls, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig, generation: Any) -> "Side":
        size = config.get_text_config().vocab_size
        return cls(tokenizer, size, (config, generation), (Loaded(config),), context_window(config))

    @classmethod
    def of_model(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> "Side":
        base = base_of(model)
        return cls.of_config(tokenizer, base.config, base.generation_config)

    @classmethod
    def of_student(cls, student_args: Any, args: Any) -> "Side":
        """The student that the flags name, without reading its weights.

        Raises ValueError if the model does not exist or can't be trained, its tokenizer can't be loaded, or a flag names a
        missing token or template.
        """
        flag, name = "--model_name_or_path", student_args.model_name_or_path
        check_model(flag, name)
        check_weights(name)
        if getattr(student_args, "student_adapter", None) is not None:
            check_weights(student_args.student_adapter)
        revision, trusted = student_args.model_revision, args.trust_remote_code
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trusted)
        except Exception as error:  # the tokenizers library raises bare ones
            raise ValueError(not_loaded(flag, name, error, "its tokenizer")) from error
        apply_token_flags(tokenizer, args)
        side = cls._read(flag, name, tokenizer, revision, trusted)
        text = side.models[0].config.get_text_config()
        if getattr(args, "router_aux_loss_coef", 0) and not hasattr(text, "output_router_logits"):
            raise ValueError(
                f"--router_aux_loss_coef {args.router_aux_loss_coef}: {text.model_type} is no mixture of experts that "
                "tells its routers' choices."
            )
        return side

    @classmethod
    def of_teacher(cls, args: Any) -> "Side":
        """The teacher that the flags name, without reading its weights.

        Raises ValueError if the model or adapter does not exist or is unsupported, or its tokenizer can't be loaded.
        """
        flag, name = "--teacher_model_name_or_path", args.teacher_model_name_or_path
        check_model(flag, name)
        check_weights(name)
        if args.teacher_adapter is not None:
            check_adapter("--teacher_adapter", args.teacher_adapter)
            check_weights(args.teacher_adapter)
        revision, trusted = args.teacher_revision, args.teacher_trust_remote_code
        tokenizer = optional_tokenizer(name, revision=revision, trust_remote_code=trusted)
        return cls._read(flag, name, tokenizer, revision, trusted)

    @classmethod
    def _read(cls, flag: str, name: str, tokenizer, revision: str, trusted: bool) -> "Side":
        config, generation = read_configs(flag, name, revision=revision, trust_remote_code=trusted)
        check_architecture(config, name)
        return cls.of_config(tokenizer, config, generation)


@dataclass(frozen=True)
class Pairing:
    """The shared vocabulary of student and teacher, and the encoder of rows.

    Attributes:
        tokenizer: the student's, with a pad token; both models read and write by it, unless there is a `cross`.
        teacher_tokenizer: None if the teacher has none; both vocabularies then have the same size.
        vocab_size: the number of leading ids that both models have; the divergence is taken over these.
        stop_ids: all shared tokens that end an answer, sorted.
        models: the student, and the teacher's in this process.
        sizes: the numbers of ids that student and teacher have logits for.
        shared: the `vocab_size` of each student alone, if there are several.
        cross: both vocabularies, of a teacher with another tokenizer; `vocab_size` and `stop_ids` are then the student's.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    stop_ids: list[int]
    encoder: RowEncoder
    models: tuple[Loaded, ...]
    sizes: tuple[int, int]
    shared: list[int]
    cross: CrossVocabulary | None = None

    @classmethod
    def of(cls, student: Side, teacher: Side, args: Any, others: tuple[Side, ...] = ()) -> "Pairing":
        """The pairing of two sides, with the row encoder that `args` ask for.

        Args:
            others: further students, which read the rows as `student` encodes them.

        Raises:
            gkd.models.tokenizers.VocabularyMismatch: a student and the teacher do not share a vocabulary.
            ValueError: there is no stop token.
        """
        sides = (student, *others, teacher)
        if getattr(args, "cross_tokenizer", "off") != "off" and not _same_tokenizer(student, teacher):
            return cls._of_two_tokenizers(student, teacher, args, others)
        shared = [shared_vocab_size(s.tokenizer, teacher.tokenizer, s.size, teacher.size) for s in sides[:-1]]
        size = min(shared)
        stops = stop_token_ids(student.tokenizer, *(config for side in sides for config in side.stops))
        stop_ids = [i for i in stops if i < size]
        encoder = RowEncoder.of(args, student.tokenizer, stop_ids, teacher.window, teacher.teachers)
        models, sizes = student.models + teacher.models, (student.size, teacher.size)
        return cls(student.tokenizer, teacher.tokenizer, size, stop_ids, encoder, models, sizes, shared)

    @classmethod
    def _of_two_tokenizers(cls, student: Side, teacher: Side, args: Any, others: tuple[Side, ...]) -> "Pairing":
        """The pairing with a teacher that has another tokenizer than the students."""
        if teacher.tokenizer is None:
            raise VocabularyMismatch(
                "--cross_tokenizer needs the teacher's tokenizer: save it beside the teacher, or pass "
                "teacher_processing_class=."
            )
        students = [student, *others]
        sizes = [max(s.tokenizer.get_vocab().values()) + 1 for s in students]
        for side, size in zip(students, sizes, strict=True):
            if size > side.size:
                raise VocabularyMismatch(
                    f"The student's tokenizer produces id {size - 1}, but the model has logits for {side.size} ids only. Resize "
                    "its embeddings first."
                )
        for other in others:
            shared_vocab_size(student.tokenizer, other.tokenizer, student.size, other.size)
        reader = RowEncoder.of(args, teacher.tokenizer, stop_token_ids(teacher.tokenizer, *teacher.stops))
        reader.whose = "teacher"
        stops = stop_token_ids(student.tokenizer, *(config for side in students for config in side.stops))
        stop_ids = [i for i in stops if i < min(sizes)]
        encoder = RowEncoder.of(args, student.tokenizer, stop_ids, teacher.window)
        cross = CrossVocabulary.of(encoder, reader, (min(sizes), teacher.size), teacher.window)
        encoder.reader = reader
        models, logits = student.models + teacher.models, (student.size, teacher.size)
        return cls(student.tokenizer, teacher.tokenizer, min(sizes), stop_ids, encoder, models, logits, sizes, cross)

    @classmethod
    def read(cls, student_args: Any, teacher: Any, args: Any) -> "Pairing":
        """The pairing of models by name, before their weights load. Lowers `--max_length` to their context window.

        `teacher` is a `gkd.teachers.base.Teacher`, or another object with `side(student, args)`. Raises ValueError as `of`,
        `Side.of_student` and `Side.of_teacher` do.
        """
        student = Side.of_student(student_args, args)
        teacher_side = teacher.side(student, args)
        keep_within_window(args, [student.window, teacher_side.window])
        return cls.of(student, teacher_side, args)

    @classmethod
    def of_teacher(cls, teacher: Any, args: Any) -> "Pairing":
        """The pairing of a teacher with itself, over its tokenizer's ids: of a cache for students of any tokenizer.

        `args.model_name_or_path` may name it too, where its tokenizer can't be had otherwise. `teacher` is as in `read`, and so are
        the errors; those of a teacher without a tokenizer, or with another than the model of that name, are VocabularyMismatch.
        """
        named = None if args.model_name_or_path is None else Side.of_student(args, args)
        side = teacher.side(named, args)
        if side.tokenizer is None:
            raise VocabularyMismatch("--cross_tokenizer needs the teacher's tokenizer: save it beside the teacher.")
        own = named or side
        try:
            shared_vocab_size(own.tokenizer, side.tokenizer, own.size, side.size)
        except VocabularyMismatch as error:
            raise VocabularyMismatch(
                f"{error} With --cross_tokenizer a cache is in the teacher's own tokens, for students of any tokenizer: leave "
                "out --model_name_or_path."
            ) from None
        apply_token_flags(own.tokenizer, args)
        keep_within_window(args, [side.window])
        size = min(own.size, max(own.tokenizer.get_vocab().values()) + 1)  # without a model's padding
        pairing = cls.of(replace(own, size=size, models=()), side, args)
        pairing.encoder.apart = True
        return pairing

    @classmethod
    def of_models(
        cls,
        model: nn.Module,
        teacher: Any,
        args: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> "Pairing":
        """The pairing of a loaded model and a teacher, which is one too or as in `read`.

        `tokenizer` is the student's; None loads the one beside its weights.
        """
        if tokenizer is None:
            name = base_of(model).config._name_or_path
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        apply_token_flags(tokenizer, args)
        student = Side.of_model(model, tokenizer)
        is_model = isinstance(teacher, nn.Module)
        teacher_side = Side.of_model(teacher, teacher_tokenizer) if is_model else teacher.side(student, args)
        return cls.of(student, teacher_side, args)

    def encode(
        self, rows: Rows, source: str | None = None, processes: int | None = None, keep_rows: bool = False
    ) -> Rows:
        """See `gkd.data.encoding.encode_dataset`."""
        return encode_dataset(rows, self.encoder, processes, keep_rows, source)

    def encode_kept(self, rows: Dataset, of_teacher: bool) -> Dataset:
        """See `gkd.data.encoding.encode_kept`; `of_teacher`: it wrote the answers. There is a `cross`."""
        return encode_kept(rows, self.encoder, self.cross.to_student if of_teacher else None)


def _same_tokenizer(student: Side, teacher: Side) -> bool:
    try:
        shared_vocab_size(student.tokenizer, teacher.tokenizer, student.size, teacher.size)
    except VocabularyMismatch:
        return False
    return True
