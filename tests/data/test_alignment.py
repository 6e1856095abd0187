"""Texts in the ids of two tokenizers: boundaries that both have, and the tokens that both have, over pairs of all kinds."""

import json
import random

import pytest
from crossed import CORPUS, WORDS, byte_level, permuted, sentencepiece, with_template, word_piece
from tiny import SPECIALS, make_tokenizer
from tokenizers import AddedToken, Tokenizer

from gkd.data.alignment import align, first_tokens, shared_classes, token_bytes
from gkd.data.encoding import RowEncoder
from gkd.models.cross_vocabulary import CrossVocabulary
from gkd.models.tokenizers import VocabularyMismatch

PIECES = (
    *WORDS, " ", "  ", "\n", "\n\n", "\t", "e\u0301", "\u0938\u094d\u0924", "👩‍👩‍👧", "🇩🇪", "你好", "ß", "x = 1", "()", ".", ",", "\u00a0", "'s", "<", "▁", "##", "Ġ", "0x0A",
)  # fmt: skip


def random_text(rng, pieces=PIECES, most=14):
    return "".join(rng.choice(pieces) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, most)))


@pytest.fixture(scope="module")
def tokenizers():
    half = CORPUS[: len(CORPUS) // 2]
    return {
        "bytes": make_tokenizer(),
        "bpe": byte_level(400),
        "other bpe": byte_level(330, half),
        "permuted": permuted(byte_level(400)),
        "sp": sentencepiece("bpe", 620),
        "sp without first": sentencepiece("bpe", 560, half, first=False),
        "unigram": sentencepiece("unigram", 420),
        "word piece": word_piece(),
    }


PAIRS = [
    ("bytes", "bpe"),
    ("bpe", "other bpe"),
    ("bpe", "permuted"),
    ("bpe", "sp"),
    ("sp", "other bpe"),
    ("sp without first", "unigram"),
    ("unigram", "bpe"),
    ("bytes", "sp"),
    ("bpe", "word piece"),
]


def encoder(tokenizer, **options):
    stops = [tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.convert_tokens_to_ids("<|eos|>")]
    return RowEncoder(tokenizer, None, 8, "last_turn", sorted(stops), **options)


def crossing(student, teacher, window=None):
    sides = encoder(student), encoder(teacher)
    return CrossVocabulary.of(*sides, (len(student), len(teacher)), window)


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_texts_come_through_and_their_spans_write_the_same(tokenizers, pair):
    cross = crossing(*map(tokenizers.get, pair))
    rng = random.Random(0)
    spaceless = "word piece" in pair
    whole = several = 0
    for _ in range(150):
        text = random_text(rng, [word for word in WORDS if word.isalpha()] if spaceless else PIECES)
        ids = tokenizers[pair[0]](text, add_special_tokens=False)["input_ids"] + [cross.student.ending]
        other = cross.to_teacher(ids)
        alignment = cross.align(ids, other)
        at, aligned, _ = alignment.positions(len(ids))
        assert alignment.boundaries[0] == (0, 0)
        assert len(at) == len(aligned) == len(ids)
        assert aligned[0]
        for (i, j), (k, m) in zip(alignment.boundaries, alignment.boundaries[1:], strict=False):
            assert i < k
            assert j <= m
            first, second = cross.student.text(ids[i:k]), cross.teacher.text(other[j:m])
            if spaceless:
                first, second = ("".join(part.decode().split()) for part in (first, second))
            assert first == second
            several += k - i > 1 or m - j > 1
        # Nothing is lost but what is counted: behind the last token that both write.
        assert alignment.whole == (alignment.boundaries[-1] == (len(ids), len(other)))
        assert alignment.whole == (alignment.agreed == len(ids))
        if alignment.whole and not spaceless:
            assert cross.teacher.text(other) == cross.student.text(ids)
            assert other[-1] == cross.teacher.ending
        if not alignment.whole:  # ▁ is SentencePiece's own space; WordPiece has no token for what it does not know
            unknown = spaceless and cross.teacher.tokenizer.unk_token_id in cross.teacher.tokenizer(text)["input_ids"]
            assert unknown or ("▁" in text and "sp" in pair)
        whole += alignment.whole
    assert whole > 75
    assert several > (20 if pair != ("bpe", "permuted") else -1)


def test_two_orders_of_one_vocabulary_share_all(tokenizers):
    cross = crossing(tokenizers["bpe"], tokenizers["permuted"])
    assert cross.shares == (1.0, 1.0)
    student, teacher, count, _ = cross.classes
    assert count == len(tokenizers["bpe"])
    for token, index in tokenizers["bpe"].get_vocab().items():
        assert student[index] == teacher[tokenizers["permuted"].get_vocab()[token]]


def test_bytes_that_are_no_text_come_through(tokenizers):
    cross = crossing(tokenizers["bytes"], tokenizers["sp"])
    byte_of = {writes: index for index, writes in enumerate(cross.student.writes)}
    data = "naïve".encode() + b"\xff\xc3" + "好".encode()[:2]
    ids = [byte_of[bytes([byte])] for byte in data]
    other = cross.to_teacher(ids)
    assert cross.teacher.text(other) == data
    assert cross.align(ids, other).whole
    assert cross.to_student(other) == ids


def test_a_special_token_that_the_other_lacks_ends_what_is_compared():
    student, teacher = make_tokenizer(extra=()), byte_level(300)
    student.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    cross = crossing(student, teacher)
    text = student("ab", add_special_tokens=False)["input_ids"]
    ids = [*text, student.convert_tokens_to_ids("<|tool|>"), *text]
    alignment = cross.align(ids, cross.to_teacher(ids))
    assert (alignment.whole, alignment.agreed, alignment.boundaries[-1][0]) == (False, 2, 2)
    assert alignment.positions(len(ids))[1:] == ([True, True, True, False, False], [1, 1, 0, 0, 0])


def test_stop_tokens_are_mapped_by_role():
    specials = ["</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    teacher = sentencepiece("bpe", 620, specials=specials, template=template, end="</s>", pad="<pad>")
    student = make_tokenizer()  # ends with <|end|>, and <|eos|> ends a text too
    sides = encoder(student), RowEncoder(teacher, None, 8, "last_turn", [teacher.eos_token_id])
    cross = CrossVocabulary.of(*sides, (len(student), len(teacher)), None)
    end, eos = (student.convert_tokens_to_ids(token) for token in ("<|end|>", "<|eos|>"))
    assert cross.to_teacher([end]) == cross.to_teacher([eos]) == [teacher.eos_token_id]
    assert cross.to_student([teacher.eos_token_id]) == [end]
    ours, theirs, *_ = cross.classes
    assert ours[end] == ours[eos] == theirs[teacher.eos_token_id]


def test_text_ends_before_an_id_that_the_teachers_model_lacks():
    """Its tokenizer has more ids than it has logits for, and a text spells such a token."""
    student, teacher = byte_level(330), byte_level(330)
    teacher.add_special_tokens({"additional_special_tokens": ["<image>"]})
    cross = CrossVocabulary.of(encoder(student), encoder(teacher), (len(student), len(teacher) - 1), None)
    ids = student("one <image> two")["input_ids"]
    written = cross.to_teacher(ids)
    assert cross.teacher.text(written) == b"one "
    alignment = cross.align(ids, written)
    assert not alignment.whole
    assert alignment.boundaries[-1] == (len(written), len(written))


def test_spaces_that_are_an_added_token_are_spaces():
    """Gemma lists its tokens of several ▁ as added ones; text never has them by that name."""
    spec = json.loads(sentencepiece("bpe", 620, first=False).backend_tokenizer.to_str())
    spec["pre_tokenizer"]["split"] = False
    spec["model"]["vocab"]["▁▁"] = len(spec["model"]["vocab"])
    spec["model"]["merges"].insert(0, ["▁", "▁"])
    core = Tokenizer.from_str(json.dumps(spec))
    core.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer = with_template(core)
    cross = crossing(byte_level(330), tokenizer)
    index = tokenizer.convert_tokens_to_ids("▁▁")
    assert index in tokenizer.added_tokens_decoder
    assert index in tokenizer("x  x", add_special_tokens=False)["input_ids"]
    assert cross.teacher.writes[index] == b"  "
    ids = cross.student.tokenizer("one  two")["input_ids"]
    assert cross.align(ids, cross.to_teacher(ids)).whole


def test_a_token_that_ends_answers_of_one_side_alone_is_no_namesake():
    """The teacher ends with a token that the student has too, but does not end with."""
    specials = [*SPECIALS, "<|eot|>"]
    student, teacher = byte_level(345, specials=specials), byte_level(330, specials=specials)
    end, eos, eot = (student.convert_tokens_to_ids(token) for token in ("<|end|>", "<|eos|>", "<|eot|>"))
    ends = encoder(student), RowEncoder(teacher, None, 8, "last_turn", [end, eos, eot])
    cross = CrossVocabulary.of(*ends, (len(student), len(teacher)), None)
    assert cross.to_student([eos, eot]) == [eos, end]
    assert cross.to_teacher([eos, eot]) == [eos]  # where the student goes on, the teacher has nothing to say
    ours, theirs, *_ = cross.classes
    assert ours[end] == theirs[eot] != ours[eot]


def test_a_token_that_the_other_lacks_goes_with_its_first_part():
    first, second = byte_level(400), byte_level(300)
    sides = [token_bytes(tokenizer) for tokenizer in (first, second)]
    (ours, theirs), shared, count = shared_classes(sides, (first, second))
    both = set(sides[0]) & set(sides[1]) - {None}
    assert shared == len(both)
    assert count == shared + 1  # special tokens on both sides
    class_of = {writes: number for writes, number in zip(sides[1], theirs, strict=True) if writes in both}
    moved = 0
    for writes, number in zip(sides[0], ours, strict=True):
        if writes is not None and writes not in both:
            (start,) = first_tokens(second, [writes], sides[1], both)
            assert writes.startswith(start)
            assert number == class_of[start]
            moved += 1
    assert moved > 50


def test_vocabularies_without_a_common_word_are_refused():
    # Words of other letters.
    other = byte_level(330, ["щука рыба вода " * 5] * 40)
    with pytest.raises(VocabularyMismatch, match="share no token of more than one byte"):
        crossing(byte_level(330, ["abc abd " * 9] * 40), other)


@pytest.mark.parametrize("seed", range(3))
def test_alignment_of_random_cuts(seed):
    """Against the definition, for cuts of one text at random places."""
    rng = random.Random(seed)
    for _ in range(200):
        data = bytes(rng.choices(b"ab c", k=rng.randint(1, 20)))
        cuts = [sorted(rng.sample(range(1, len(data)), rng.randint(0, len(data) - 1))) for _ in range(2)]
        first, second = ([data[a:b] for a, b in zip([0, *cut], [*cut, len(data)], strict=True)] for cut in cuts)
        alignment = align(first, second)
        common = sorted({0, len(data), *(set(cuts[0]) & set(cuts[1]))})
        places = [[0, *cut, len(data)] for cut in cuts]
        assert alignment.boundaries == [tuple(place.index(at) for place in places) for at in common]
        assert alignment.whole
        before, begins, lengths = alignment.positions(len(first))
        for (i, j), (k, m) in zip(alignment.boundaries, alignment.boundaries[1:], strict=False):
            assert before[i:k] == [j] * (k - i)
            assert begins[i:k] == [True] + [False] * (k - i - 1)
            assert lengths[i:k] == [m - j] * (k - i)
