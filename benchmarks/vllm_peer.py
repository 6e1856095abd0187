"""vLLM as a peer, if it is installed: alone as in decode.py, and inside of TRL's DistillationTrainer as in step_time.py.

An engine runs in the process that measures, as TRL's colocate mode has it, and reads its weights from a folder.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence

import torch
from common import CUDA, DTYPE, random_model
from random_pair import tokenizer
from transformers import PreTrainedModel

MISSING = None if importlib.util.find_spec("vllm") else "skipped: vllm is not installed"


def settle_environment() -> None:
    """The variables that an engine in this process needs, before vLLM is imported; those that are set stay."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",  # a machine without a network does not know its address
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # FlashInfer is optional, and compiles its kernels at first use
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, without a GPU
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def save(model: PreTrainedModel) -> str:
    """Writes a model with random weights and its tokenizer, which then have this folder's name; returns it."""
    folder = tempfile.mkdtemp(prefix="vllm-")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model.name_or_path = model.config._name_or_path = folder  # where TRL has the engine read it
    return folder


def settings(model: PreTrainedModel, length: int, memory: float) -> dict:
    """The flags of a DistillationConfig whose text vLLM writes, for a model that `save` wrote.

    Args:
        length: of prompt and completion, in tokens.
        memory: the share of the GPU that the engine takes.
    """
    stops = model.generation_config.eos_token_id
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": memory,
        "vllm_max_model_length": length,
        "generation_kwargs": {
            "detokenize": False,
            "stop_token_ids": list(stops) if isinstance(stops, Sequence) else [stops],
        },
    }


def engine(shape: dict, length: int, rows: int, memory: float) -> Callable:
    """A function from prompts (B, P), their mask, the most tokens of a completion, and the ids of which each ends one, to
    the lengths of B completions, with random weights of this shape.

    Args:
        length: of prompt and completion, in tokens.
        rows: that are decoded together at most.
        memory: the share of the GPU that the engine takes.
    """
    settle_environment()
    import vllm  # an optional peer, which takes seconds to import

    model = random_model(shape, seed=0)
    folder = save(model)
    del model  # the engine has weights of its own
    if CUDA:
        torch.cuda.empty_cache()
    llm = vllm.LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype=str(DTYPE).removeprefix("torch."),
        gpu_memory_utilization=memory,
        max_model_len=length,
        max_num_seqs=rows,
        enable_prefix_caching=False,  # each call has the same prompts, and is to read them
        enforce_eager=not CUDA,
        seed=0,
    )

    def generate(prompts: torch.Tensor, mask: torch.Tensor, new: int, stops: list[int]) -> list[int]:
        sampling = vllm.SamplingParams(
            max_tokens=new, temperature=0.9, detokenize=False, ignore_eos=True, stop_token_ids=stops
        )
        rows = [row[kept.bool()].tolist() for row, kept in zip(prompts.cpu(), mask.cpu(), strict=True)]
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return generate
