"""Builders shared by the tests and by the scripts that tests start."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).parent.parent
# An EMPTY answer in the last row: "no answer", as in the published sample.
ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in (("one?", "1"), ("two and two?", "four, I think"), ("say hello", "hello"), ("hm?", "well"))
]

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|pad|>", "<|eos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


# The shape of a model of any family.
TINY = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def make_tokenizer(template: str = TEMPLATE, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level, 262 ids: every text is encodable, and one character is one token (for ASCII)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet, *extra])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer


def make_model(seed: int = 0, hidden_size: int = 32, vocab_size: int = 264, dtype=torch.float32, **config):
    """A Llama with 2 layers; its own end token is <|eos|> (1), the tokenizer's is <|end|> (2)."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # sharp distributions: differences show
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(options | config))).to(dtype)


def save_pair(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Saves `student` and `teacher` in a folder, as a user has them."""
    for name, seed, width in (("student", 0, 32), ("teacher", 1, 48)):
        make_model(seed=seed, hidden_size=width).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
