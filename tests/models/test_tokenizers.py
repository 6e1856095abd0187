"""The vocabularies that a student and a teacher can share."""

import pytest
from tiny import make_tokenizer

from gkd.models.tokenizers import VocabularyMismatch, shared_vocab_size


def test_padding_may_differ(tokenizer):
    assert shared_vocab_size(tokenizer, make_tokenizer(), 264, 272) == 264
    assert shared_vocab_size(tokenizer, None, 264, 264) == 264


def test_first_differing_token_is_named(tokenizer):
    with pytest.raises(VocabularyMismatch, match="id 262 is None for the student and 'extra' for the teacher"):
        shared_vocab_size(tokenizer, make_tokenizer(extra=("extra",)), 264, 264)


def test_sizes_without_a_tokenizer(tokenizer):
    with pytest.raises(VocabularyMismatch, match="teacher_processing_class"):
        shared_vocab_size(tokenizer, None, 264, 272)


def test_every_token_needs_a_logit(tokenizer):
    with pytest.raises(VocabularyMismatch, match="produces id 261"):
        shared_vocab_size(tokenizer, make_tokenizer(), 256, 264)


def test_equal_vocabulary_that_splits_otherwise(tokenizer):
    from tokenizers import normalizers

    other = make_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(VocabularyMismatch, match="split text differently"):
        shared_vocab_size(tokenizer, other, 264, 264)
