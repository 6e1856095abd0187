"""Engines for tests of vLLM: a stand-in, and vLLM itself where it is installed (tests/vllm_cpu.sh)."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from prompts import config
from tiny import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from gkd.data.batch import unpadded_rows
from gkd.generation import vllm
from gkd.generation.generator import CompletionGenerator

INSTALLED = importlib.util.find_spec("vllm") is not None
if INSTALLED:  # before it is imported
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # vLLM has kernels for 64 a head


class StandIn:
    """A model of transformers behind the calls of `vllm.LLM` that gkd makes."""

    made: list["StandIn"]
    breaks_after: int | None = None  # so many generations

    def __init__(self, model, dtype, **options):
        if options["gpu_memory_utilization"] > 0.9:
            raise ValueError("Free memory on device is less\nthan desired")
        self.options, self.calls = options, []
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(_finalizer=SimpleNamespace(atexit=True)))
        dtype = getattr(torch, dtype)
        if options.get("load_format") == "dummy":
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.model.eval().load_weights = self.load
        self.model.logits_processor = SimpleNamespace(org_vocab_size=self.model.config.vocab_size)
        type(self).made.append(self)

    def load(self, weights):
        self.calls.append("load")
        parameters = dict(self.model.named_parameters())
        for name, weight in weights:
            parameters[name].data.copy_(weight)
            yield name

    def apply_model(self, function):
        return [function(self.model)]

    def generate(self, prompts, sampling, use_tqdm):
        self.calls.append("generate")
        if self.calls.count("generate") == type(self).breaks_after:
            raise RuntimeError("EngineCore encountered an issue")
        if not isinstance(sampling, list):
            return [SimpleNamespace(prompt_logprobs=self.tell(prompt, sampling)) for prompt in prompts]
        return [SimpleNamespace(outputs=[self.complete(*row)]) for row in zip(prompts, sampling, strict=True)]

    @torch.no_grad()
    def tell(self, prompt, sampling):
        """Of each token but the first itself, and the k likeliest in its place."""
        assert (sampling.max_tokens, sampling.flat_logprobs, sampling.detokenize) == (1, True, False)
        assert sampling.prompt_logprobs <= self.options["max_logprobs"]
        ids = torch.tensor([prompt["prompt_token_ids"]])
        logits = self.model(ids).logits[0, :-1, : self.model.logits_processor.org_vocab_size]
        log_probs = logits.float().log_softmax(-1)
        own = ids[0, 1:, None]
        top = torch.cat([own, log_probs.topk(sampling.prompt_logprobs).indices], 1)
        return SimpleNamespace(token_ids=top.flatten().tolist(), logprobs=log_probs.gather(1, top).flatten().tolist())

    def complete(self, prompt, sampling):
        assert sampling.ignore_eos
        assert not sampling.detokenize
        ids = torch.tensor([prompt["prompt_token_ids"]])
        options = {"do_sample": sampling.temperature > 0, "eos_token_id": sampling.stop_token_ids}
        options |= {"temperature": sampling.temperature} if sampling.temperature > 0 else {}
        lacking = list(range(self.model.logits_processor.org_vocab_size, self.model.config.vocab_size)) or None
        options = config(max_new_tokens=sampling.max_tokens, suppress_tokens=lacking, **options)
        with torch.random.fork_rng():
            torch.manual_seed(getattr(sampling, "seed", 0))
            ids, mask = CompletionGenerator("dynamic")(self.model, ids, torch.ones_like(ids), options)
        (text,) = unpadded_rows(ids, mask)
        return SimpleNamespace(
            token_ids=text, finish_reason="stop" if text[-1] in sampling.stop_token_ids else "length"
        )

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")


@pytest.fixture
def stand_in(monkeypatch):
    """A package `vllm` with the stand-in, of which `made` lists the engines."""
    kind = type("LLM", (StandIn,), {"made": []})
    for name in ("vllm", "vllm._custom_ops"):
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        module.LLM, module.SamplingParams = kind, SimpleNamespace
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("gkd.config.generation.version", lambda name: "0.31.0+cpu")
    monkeypatch.setattr(vllm, "_ENGINES", {})
    return kind


@pytest.fixture
def groups_stay(monkeypatch):
    """Commands end torch's process groups, which the engines of other tests share."""
    monkeypatch.setattr(Accelerator, "end_training", lambda self: None)


def save_models(folder, **models):
    """Each with the tokenizer in a folder of its name; returns `folder`."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


needs_vllm = pytest.mark.skipif(not INSTALLED, reason="needs vllm: tests/vllm_cpu.sh")


@pytest.fixture(params=["stand-in", pytest.param("vllm", marks=needs_vllm)])
def engines(request):
    """Whether engines are vLLM's."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
    return request.param == "vllm"
