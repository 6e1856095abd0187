"""Writes a student and a teacher with random weights and one tokenizer, to run commands at full size with no download.

    python benchmarks/random_pair.py OUT --student 1b --teacher 8b

creates OUT/student and OUT/teacher in the shapes of Llama-3.2-1B and Llama-3.1-8B, in bf16. Speed and memory are those of
real models of that shape; their text is noise.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BASE = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SHAPES = {
    "micro": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "small": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "qwen0.5b": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen1.7b": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "qwen7b": {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    "32b": {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte; the models' other ids are padding."""
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    result = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    result.chat_template = TEMPLATE
    return result


def model_of(shape: dict) -> PreTrainedModel:
    """A Llama, or the family that the shape names, with random weights in the default dtype on the default device."""
    config = AutoConfig.for_model(**({"model_type": "llama"} | BASE | shape))
    return AutoModelForCausalLM.from_config(config)


def write_pair(out: Path, student: str, teacher: str, **changes) -> None:
    """Writes OUT/student and OUT/teacher in these shapes; `changes` go into both configs, for example `vocab_size`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for name, shape, seed in (("student", student, 0), ("teacher", teacher, 1)):
            torch.manual_seed(seed)
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                model = model_of(SHAPES[shape] | changes)
            model.save_pretrained(out / name)
            tokenizer().save_pretrained(out / name)
            print(f"{out / name}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f}B parameters")
            del model
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--student", choices=SHAPES, default="1b")
    parser.add_argument("--teacher", choices=SHAPES, default="8b")
    args = parser.parse_args()
    write_pair(args.out, args.student, args.teacher)


if __name__ == "__main__":
    main()
