"""Which token ids student and teacher share: GKD compares next-token distributions, so ids must mean the same."""

from transformers import PreTrainedTokenizerBase

# Equal vocabularies can still split text differently (other merges or normalisation), so compare a few encodings.
_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "def f(x):\n    return x ** 2  # squared\n",
    "帮我把下面中文翻译成英文: 很好,那是一幅很酷的画作。",
    "Größe, naïve café, 🙂 — “quoted”…\tTab",
)


class VocabularyMismatch(ValueError):
    """Student and teacher do not share a vocabulary."""


def shared_vocab_size(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    student_size: int,
    teacher_size: int,
) -> int:
    """How many leading ids of the two models' logits mean the same token.

    Models pad their vocabulary to a round size, and sizes of one family may differ in padding alone (Qwen2.5: 151936
    and 152064). Then the smaller size is shared: every id that a tokenizer can produce lies below it.

    Args:
        student_tokenizer, teacher_tokenizer: `teacher_tokenizer` may be None when the sizes are equal.
        student_size, teacher_size: the `vocab_size` of the models' configs.

    Raises:
        VocabularyMismatch: naming the first differing token, or the id that a model has no logit for.
    """
    shared = min(student_size, teacher_size)
    if teacher_tokenizer is None:
        if student_size != teacher_size:
            raise VocabularyMismatch(
                f"Student and teacher have vocabularies of {student_size} and {teacher_size} ids, and the teacher's "
                "tokenizer is not known, so it can't be told whether they differ in padding alone. Pass "
                "teacher_processing_class=, or save the tokenizer beside the teacher."
            )
        return shared
    student = {index: token for token, index in student_tokenizer.get_vocab().items()}
    teacher = {index: token for token, index in teacher_tokenizer.get_vocab().items()}
    for index in sorted(student.keys() | teacher.keys()):
        if student.get(index) != teacher.get(index):
            raise VocabularyMismatch(
                f"The tokenizers differ: id {index} is {student.get(index)!r} for the student and "
                f"{teacher.get(index)!r} for the teacher. GKD needs one vocabulary: take a student of the teacher's "
                "family, or TRL's GOLD trainer, which works across tokenizers."
            )
    if max(student) >= shared:
        raise VocabularyMismatch(
            f"The tokenizer produces id {max(student)} ({student[max(student)]!r}), but the smaller model has logits "
            f"for {shared} ids only. Resize its embeddings first."
        )
    for text in _PROBES:
        mine, theirs = (t(text, add_special_tokens=False)["input_ids"] for t in (student_tokenizer, teacher_tokenizer))
        if mine != theirs:
            raise VocabularyMismatch(
                f"The tokenizers have the same vocabulary but split text differently: {text!r} becomes "
                f"{mine[:8]}... for the student and {theirs[:8]}... for the teacher. GKD needs the same tokenizer."
            )
    return shared
