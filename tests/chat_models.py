"""22 chat templates as models have them, and three tokenizers, small, with the tokens of each template.

Templates that TRL keeps are read from it; the others are written here, shortened to what decides about tokens.
"""

import json
import re
from dataclasses import dataclass
from importlib.resources import files

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The answer is four. The prompt asks for the sum of two and two, assistant: user: system: hello world!",
    "[INST] [/INST] ASSISTANT: USER: ### Response: 2+2=4 3+3=6 \n\n a\n\nb {\"name\": \"add\"} Größe 你好",
] * 3  # fmt: skip


@dataclass
class ChatModel:
    """A template, the tokens of its vocabulary, and what it writes behind an answer.

    Args:
        end: closes the last answer; "" where nothing does.
        call_end: closes an answer that calls a tool, if it is another.
        eos: the tokenizer's own, if it is another.
        stops: further tokens that end an answer, as generation configs have them.
        rstrip: special tokens swallow white space behind them.
    """

    template: str
    end: str
    call_end: str = ""
    eos: str = ""
    bos: str = "<s>"
    stops: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()  # looks like a special token and is none
    rstrip: bool = False

    @property
    def stop_tokens(self) -> list[str]:
        return list(dict.fromkeys(token for token in (self.eos or self.end, self.end, *self.stops) if token))


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


PLAIN_TOOLS = (  # ChatML that takes every role and writes tools: what a user gives by --chat_template_path
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (  # a system prompt, and the tools, go to the last question; the tools' turns as it writes them
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if tools and message == user_messages[-1] %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}"
    "{%- endif %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message.tool_calls is defined and message.tool_calls is not none %}"
    "{{- '[TOOL_CALLS] ' + message.tool_calls | tojson + eos_token }}{%- elif message['role'] == 'assistant' %}"
    "{{- ' ' + message['content'] | trim + eos_token }}{%- elif message['role'] == 'tool' %}"
    "{{- '[TOOL_RESULTS] ' + message['content'] | string + '[/TOOL_RESULTS]' }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GRANITE = (
    "{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>\n' + tools | tojson + '<|end_of_text|>\n' }}"
    "{%- endif %}{%- for message in messages %}{%- if message['role'] == 'assistant_tool_call' or message.tool_calls %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|><|tool_call|>' + message.tool_calls | tojson + '<|end_of_text|>\n' }}"
    "{%- elif message['role'] == 'tool' %}"
    "{{- '<|start_of_role|>tool_response<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}{%- else %}"
    "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}"
    "{%- endif %}{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}"
    "{%- endif %}{%- endfor %}"
)
PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

CHAT_MODELS = {
    "llama-2": ChatModel(LLAMA2, "</s>"),
    "llama-3": ChatModel(trl_template("llama3"), "<|eot_id|>", bos="<|begin_of_text|>", stops=("<|end_of_text|>",)),
    "llama-3.2": ChatModel(
        trl_template("llama3_2"), "<|eot_id|>", bos="<|begin_of_text|>", stops=("<|end_of_text|>", "<|eom_id|>")
    ),
    "mistral-v0.1": ChatModel(MISTRAL_1, "</s>"),
    "mistral-v0.3": ChatModel(MISTRAL_3, "</s>"),
    "zephyr": ChatModel(ZEPHYR, "</s>", plain=("<|user|>", "<|system|>", "<|assistant|>")),
    "chatml": ChatModel(CHATML, "<|im_end|>"),
    "vicuna": ChatModel(VICUNA, "</s>"),
    "qwen2.5": ChatModel(trl_template("qwen2_5"), "<|im_end|>", stops=("<|endoftext|>",)),
    "qwen3": ChatModel(trl_template("qwen3"), "<|im_end|>", stops=("<|endoftext|>",)),
    "qwen3-instruct-2507": ChatModel(trl_template("qwen3_instruct_2507"), "<|im_end|>", stops=("<|endoftext|>",)),
    "qwen3-thinking-2507": ChatModel(
        re.sub(
            r"\{%- if add_generation_prompt %\}.*",
            r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}",
            trl_template("qwen3"),
            flags=re.DOTALL,
        ),
        "<|im_end|>",
        stops=("<|endoftext|>",),
    ),
    "phi-3": ChatModel(trl_template("phi3"), "<|end|>", eos="<|endoftext|>", stops=("<|assistant|>",), rstrip=True),
    "phi-4": ChatModel(PHI4, "<|im_end|>"),
    "gemma-2": ChatModel(trl_template("gemma"), "<end_of_turn>", eos="<eos>", bos="<bos>"),
    "gemma-3": ChatModel(trl_template("gemma3"), "<end_of_turn>", eos="<eos>", bos="<bos>"),
    "deepseek-r1-0528": ChatModel(trl_template("deepseekv3"), "<｜end▁of▁sentence｜>"),
    "deepseek-r1-distill": ChatModel(trl_template("deepseek_r1_distill"), "<｜end▁of▁sentence｜>"),
    "gpt-oss": ChatModel(trl_template("gptoss"), "<|return|>", "<|call|>", stops=("<|endoftext|>", "<|call|>")),
    "aya": ChatModel(trl_template("cohere"), "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>"),
    "granite": ChatModel(GRANITE, "<|end_of_text|>"),
    "glm-4-moe": ChatModel(trl_template("glm4moe"), "", eos="<|endoftext|>", stops=("<|user|>", "<|observation|>")),
}
_SPECIAL = re.compile(
    r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_turn>|</?think>|</?tool_call>|\[/?(?:AVAILABLE_TOOLS|TOOL_\w+)\]|\[gMASK\]|<sop>"
)


def _trained(pre_tokenizer, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) else []
    texts = CORPUS if alphabet else [text.replace("\n", " ") for text in CORPUS]  # Llama's line feed is a byte
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    told = json.loads(core.to_str())["model"]
    return told["vocab"], [tuple(pair) for pair in told["merges"]]


def _byte_level() -> Tokenizer:
    vocab, merges = _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), 400)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen's
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(legacy: bool) -> Tokenizer:
    """As Llama's and Mistral's: bytes for what the vocabulary lacks; a space before the first text, or before each."""
    vocab, merges = _trained(pre_tokenizers.Metaspace(), 300)
    for token in ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256))):
        vocab.setdefault(token, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


CORES = {
    "byte-level": _byte_level,
    "sentencepiece": lambda: _sentencepiece(False),
    "sentencepiece, legacy": lambda: _sentencepiece(True),
}


def tokenizer_of(model: ChatModel, kind: str) -> PreTrainedTokenizerFast:
    core = CORES[kind]()
    specials = [*_SPECIAL.findall(model.template + PLAIN_TOOLS), *model.stop_tokens, model.bos]
    names = dict.fromkeys(token for token in specials if token not in model.plain)
    core.add_special_tokens(
        [AddedToken(name, normalized=False, special=True, rstrip=model.rstrip and name != model.bos) for name in names]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=model.bos,
        eos_token=model.stop_tokens[0],
        pad_token=model.stop_tokens[0],
        chat_template=model.template,
    )
