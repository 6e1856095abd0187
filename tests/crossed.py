"""Tokenizers that differ, and trainings with them, for tests of teachers with another one."""

import json

import torch
from tiny import ROWS, SPECIALS, TEMPLATE, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from trainers import tiny_trainer
from transformers import PreTrainedTokenizerFast

WORDS = (
    "one two three four five six seven eight nine ten hello world think thinking walk walking walked talk talking well "
    "say said question answer answers the this that these there number numbers Größe 你好 🙂 naïve code def return"
).split()
CORPUS = [" ".join(WORDS[i % len(WORDS)] for i in range(start, start + 9)) for start in range(200)]


def with_template(core: Tokenizer, specials=SPECIALS, template=TEMPLATE, end="<|end|>", pad="<|pad|>"):
    core.add_special_tokens(list(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(size: int = 400, corpus=CORPUS, **options):
    """Byte-level BPE of so many ids."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = options.get("specials", SPECIALS)
    core.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return with_template(core, **options)


def sentencepiece(kind: str = "bpe", size: int = 400, corpus=CORPUS, first: bool = True, **options):
    """Like SentencePiece, with bytes for what the vocabulary lacks; `first`: with a space before a text."""
    specials, pieces = list(options.get("specials", SPECIALS)), [f"<0x{byte:02X}>" for byte in range(256)]
    before = pre_tokenizers.Metaspace(prepend_scheme="always" if first else "never")
    if kind == "bpe":
        trained = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=size - 256, special_tokens=[*specials, "<unk>"], show_progress=False)
        trained.pre_tokenizer = before
        trained.train_from_iterator(corpus, trainer)
        spec = json.loads(trained.to_str())["model"]
        vocab = spec["vocab"]
        for piece in pieces:
            vocab.setdefault(piece, len(vocab))
        merges = [tuple(pair) for pair in spec["merges"]]
        core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    else:
        trained = Tokenizer(models.Unigram())
        trained.pre_tokenizer = before
        trainer = trainers.UnigramTrainer(
            vocab_size=size - 256, special_tokens=[*specials, "<unk>"], unk_token="<unk>", show_progress=False
        )
        trained.train_from_iterator(corpus, trainer)
        vocab = [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]
        vocab += [(piece, -20.0) for piece in pieces]
        core = Tokenizer(models.Unigram(vocab, unk_id=len(specials), byte_fallback=True))
    core.pre_tokenizer = before
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if first else []),
        ]
    )
    return with_template(core, **options)


def word_piece(size: int = 300, corpus=CORPUS):
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    core.train_from_iterator(
        corpus, trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIALS, "[UNK]"], show_progress=False)
    )
    tokenizer = with_template(core)
    tokenizer.unk_token = "[UNK]"
    return tokenizer


def permuted(tokenizer, seed: int = 0, model=None):
    """The tokenizer with its ids in another order, and a copy of the model that goes with it: both write the same."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    order = torch.randperm(
        len(tokenizer), generator=torch.Generator().manual_seed(seed)
    ).tolist()  # new id of each old one
    spec["model"]["vocab"] = dict(
        sorted(((token, order[index]) for token, index in vocab.items()), key=lambda e: e[1])
    )
    for added in spec["added_tokens"]:
        added["id"] = order[added["id"]]
    core = Tokenizer.from_str(json.dumps(spec))
    other = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token
    )
    other.chat_template = tokenizer.chat_template
    if model is None:
        return other
    config = {"eos_token_id": order[model.config.eos_token_id], "pad_token_id": order[model.config.pad_token_id]}
    size = model.config.vocab_size
    copy = make_model(0, hidden_size=model.config.hidden_size, vocab_size=size, dtype=model.dtype, **config)
    rows = torch.tensor(order)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name][rows] = model.state_dict()[name]
    copy.load_state_dict(weights)
    return other, copy


SIZE = 262  # ids of `make_tokenizer`, without padding of a model
PAIRS = list(zip(CORPUS[:12], CORPUS[20:32], strict=True))
WORDY = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS]


def trained(
    folder, cross, teacher, teacher_tokenizer, student=None, tokenizer=None, rows=ROWS, held_out=None, **flags
):
    """`start`: of the flags, the checkpoint to go on from."""
    start = flags.pop("start", None)
    more = {"teacher_processing_class": teacher_tokenizer, "processing_class": tokenizer or make_tokenizer()}
    options = {
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "teacher_text_cache": "off",
        "max_steps": 2,
    }
    flags = {"cross_tokenizer": cross, "more": more} | options | flags
    student = make_model(0, vocab_size=SIZE) if student is None else student
    trainer = tiny_trainer(folder, student, teacher, rows, held_out, **flags)
    trainer.train(start)
    return trainer


def save(folder, name, model, tokenizer):
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
