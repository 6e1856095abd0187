"""Text by vLLM, whose engines are in this process and get a model's weights before each generation.

An engine is a shape and a dtype: it starts from a model's config alone, so models of one shape share it. Between
generations it sleeps, and its memory is free. Weights go to it as they are, since a fraction of a second is all that takes:
whether they have changed is not asked.
"""

import os
import pkgutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import GenerationConfig

from gkd.data.batch import padded_rows, unpadded_rows
from gkd.generation.generator import CompletionGenerator
from gkd.generation.static import autocast_dtype
from gkd.io.errors import RunStopped, first_line
from gkd.models.heads import base_of
from gkd.models.loading import is_spread

logger = get_logger(__name__)

# Rows that an engine decodes together, where the flags do not say.
_ROWS = 256
# Read by vLLM as it is imported. It sends statistics of its use to its makers unless told not to.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_HOST_IP": "127.0.0.1"}
# Those of this process, by what they started with. None is given up: vLLM would end all of torch's process groups with it, those
# of training among them.
_ENGINES: dict[tuple, Any] = {}
_INSTEAD = "--generation_backend auto does without vLLM."


class EngineFailed(RunStopped):
    """An engine did not start, or broke while it wrote. What was trained before is whole."""


def refusal(model: nn.Module) -> str | None:
    """Why an engine of this process can't have a model's weights; None if it can."""
    weights = list(model.parameters())
    if getattr(base_of(model), "is_quantized", False) or not all(w.is_floating_point() for w in weights):
        return "its weights are quantized"
    if any(isinstance(weight, DTensor) for weight in weights):
        return "its weights are sharded"
    device = weights[0].device
    if is_spread(model) or (device.type == "cuda" and device.index != PartialState().local_process_index):
        return "it is not on the GPU of this process"
    return None


class VllmGenerator:
    """See `gkd.generation.generator.Generator`. A teacher for which there is a `refusal` writes by `CompletionGenerator`.

    Args:
        args: has `vllm_memory`, the share of a GPU's memory that an engine takes while it writes.
        batch_size, choices, sharded, moving: see `gkd.generation.generator.new_generator`.

    Raises:
        ValueError: the student is sharded.
    """

    def __init__(self, args: Any, batch_size: int | None = None, choices=None, sharded: bool = False, moving=()):
        if sharded:
            raise ValueError("--generation_backend vllm needs whole weights on each GPU: use ZeRO-2 or DDP, or auto.")
        self.memory, self.rows = args.vllm_memory, batch_size or _ROWS
        self._others = CompletionGenerator(batch_size=batch_size, choices=choices, moving=moving)
        self._refused: set[str] = set()
        self._seconds = 0.0  # spent on starting engines
        PartialState()  # the logger reads the number of this process from it
        logger.warning(
            "vLLM samples from the distribution that the other backends sample from, but a run that is repeated or resumed "
            "need not get the same text bit for bit."
        )

    @property
    def capture_seconds(self) -> float:
        return self._seconds + self._others.capture_seconds

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, prompts: torch.Tensor, prompt_mask: torch.Tensor, config: GenerationConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Generator`.

        Raises:
            EngineFailed: vLLM does not start, or fails; an adapter can't be merged.
            RunStopped: the weights are not finite.
        """
        name = type(base_of(model)).__name__
        if (why := refusal(model)) is not None:
            if name not in self._refused:
                logger.warning(f"{name} writes without vLLM: {why}.")
            self._refused.add(name)
            return self._others(model, prompts, prompt_mask, config)
        if any(isinstance(m, BaseTunerLayer) and not (m.merged or m.disable_adapters) for m in model.modules()):
            raise EngineFailed(
                f"vLLM needs the adapter of {name} merged into its weights, which is not possible: it is on an output head "
                f"that is tied to the embedding, or memory is short. {_INSTEAD}"
            )
        seed = int(torch.randint(2**62, ()))  # before an engine starts, which seeds torch
        device, dtype = PartialState().device, autocast_dtype(prompts.device) or base_of(model).dtype
        texts = unpadded_rows(prompts, prompt_mask)
        vocab_size = _vocab_size(model, config)
        weights = dict(named_weights(model, vocab_size))
        if not bool(get_total_norm(list(weights.values()), torch.inf).isfinite()):
            raise RunStopped(f"The weights of {name} are not finite, so it can't write: lower --learning_rate.")
        with torch.autocast(device.type, enabled=False):
            engine = self._engine(model, vocab_size, dtype, device)
            try:
                sampling = sampling_parameters(config, seed, len(texts), vocab_size)
                completions = _completions(engine, weights, texts, sampling, device)
            except Exception as error:  # vLLM has errors of many kinds
                raise EngineFailed(
                    f"vLLM failed while {name} wrote: {type(error).__name__}: {first_line(error)}. {_INSTEAD}"
                ) from error
        ids, mask = padded_rows(completions, config.pad_token_id)
        return ids.to(prompts.device), mask.to(prompts.device)

    def _engine(self, model: nn.Module, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        """The engine for models of this shape, asleep on a GPU. Starting one is collective."""
        what = _config_json(model, vocab_size, dtype), dtype, device, self.memory, self.rows
        if what not in _ENGINES:
            started = time.perf_counter()
            name = type(base_of(model)).__name__
            # vLLM holds on to groups that accelerate has ended.
            ended = bool(_ENGINES) and not torch.distributed.is_initialized()
            try:
                _ENGINES[what] = _start(name, *what)
            except EngineFailed as error:
                if not ended:
                    raise
                why = "a run before has ended what the engines of this process share: start a new process."
                raise EngineFailed(f"vLLM did not start for {name}: {why} {_INSTEAD}") from error
            self._seconds += time.perf_counter() - started
        return _ENGINES[what]


def _vocab_size(model: nn.Module, config: GenerationConfig) -> int:
    """The ids that may be sampled: the suppressed ones are the last, and the engine gets no weights of them."""
    return (config.suppress_tokens or [base_of(model).get_output_embeddings().weight.shape[0]])[0]


def _config_json(model: nn.Module, vocab_size: int, dtype: torch.dtype) -> str:
    """What an engine starts from: equal for models of one shape, wherever they come from."""
    base = base_of(model)
    config = deepcopy(base.config)
    config._name_or_path, config.dtype = "", dtype
    config.architectures = [type(base).__name__]  # a model that was not loaded from a folder has none
    config.get_text_config().vocab_size = vocab_size
    for part in (config, config.get_text_config()):  # what trainers change, and engines do not use
        part.bos_token_id = part.eos_token_id = part.pad_token_id = None
        part.use_cache = True
    ends = (base.get_output_embeddings(), base.get_input_embeddings())
    # What is so, since an adapter may have a head of its own.
    config.tie_word_embeddings = _active(ends[0]).weight is _active(ends[1]).weight
    return config.to_json_string(use_diff=False)


def _active(module: nn.Module) -> nn.Module:
    """The module whose weights count, inside an adapter's wrapper."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.get_submodule(_saved_part(module))
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _saved_part(wrapper: ModulesToSaveWrapper) -> str:
    """The path of the module in use, the adapter's or the base model's."""
    return "original_module" if wrapper.disable_adapters else f"modules_to_save.{wrapper.active_adapters[0]}"


def named_weights(model: nn.Module, vocab_size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's weights by the names that transformers saves them under, with adapters merged or disabled as they are now.

    Args:
        vocab_size: embedding and head are cut to so many ids.
    """
    base = base_of(model)
    prefix = model.base_model.prefix if isinstance(model, PeftModel) else None
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    of_ids = tuple(f"{name}." for name, module in base.named_modules() if module in ends)
    parts = {
        f"{name}.": f"{_saved_part(module)}."
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    for name, parameter in base.named_parameters():
        if prefix is not None and prefix in name:
            continue
        weight = parameter.data[:vocab_size] if name.startswith(of_ids) else parameter.data
        wrapper = next((start for start in parts if name.startswith(start)), "")
        rest = name.removeprefix(wrapper)
        if wrapper and not rest.startswith(parts[wrapper]):
            continue
        yield wrapper + rest.removeprefix(parts.get(wrapper, "")).replace("base_layer.", ""), weight


def sampling_parameters(config: GenerationConfig, seed: int, rows: int, vocab_size: int) -> list[Any]:
    """vLLM's parameters for each row, which has noise of its own. Only the config's tokens stop a text."""
    make = pkgutil.resolve_name("vllm:SamplingParams")
    seeds = np.random.SeedSequence(seed).generate_state(rows, np.uint64) >> np.uint64(1)
    options = {
        "temperature": config.temperature if config.do_sample else 0.0,
        "max_tokens": config.max_new_tokens,
        "stop_token_ids": [token for token in config.eos_token_id or [] if token < vocab_size],
        "ignore_eos": True,
        "detokenize": False,
    }
    return [make(seed=int(number), **options) for number in seeds]


def own_parameters(config: GenerationConfig | None, temperature: float, tokens: int, stop_ids: list[int]) -> Any:
    """vLLM's parameters for a text as transformers' `generate` samples it by a model's own config; 0 is greedy."""
    make, usual = pkgutil.resolve_name("vllm:SamplingParams"), {"top_k": 50, "top_p": 1.0, "min_p": 0.0}
    usual["repetition_penalty"] = 1.0
    own = {name: getattr(config, name, None) for name in usual}
    sampling = usual | {name: value for name, value in own.items() if value is not None}
    options = {"stop_token_ids": stop_ids, "ignore_eos": True, "detokenize": False}
    return make(temperature=temperature, max_tokens=tokens, **sampling, **options)


def telling_parameters(k: int) -> Any:
    """vLLM's parameters for the k likeliest tokens at each place of a prompt; it has to write a token too."""
    make = pkgutil.resolve_name("vllm:SamplingParams")
    return make(temperature=0.0, max_tokens=1, prompt_logprobs=k, flat_logprobs=True, detokenize=False)


def _start(name: str, shape: str, dtype: torch.dtype, device: torch.device, memory: float, rows: int) -> Any:
    """A vLLM engine without the model's weights, asleep on a GPU."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        pkgutil.resolve_name(
            "vllm._custom_ops"
        )._supports_onednn = False  # it packs weights, which then stay as they are
    with tempfile.TemporaryDirectory(prefix="gkd-vllm-") as folder:
        Path(folder, "config.json").write_text(shape, encoding="utf-8")
        engine = new_engine(
            name,
            dtype,
            device,
            memory,
            _INSTEAD,
            model=folder,
            load_format="dummy",
            max_num_seqs=rows,
            enable_sleep_mode=on_gpu,
            # Among several processes each has an engine, and torch's groups are there.
            distributed_executor_backend="external_launcher" if PartialState().num_processes > 1 else "uni",
        )
    if on_gpu:
        engine.sleep(level=2)
    return engine


def new_engine(
    name: str, dtype: torch.dtype, device: torch.device, memory: float, instead: str, **options: Any
) -> Any:
    """A `vllm.LLM` whose scheduler is in this process, and which reads and writes ids.

    Args:
        name: the model's, a folder or a hub id unless `options` say from where it loads.
        memory: the share of each GPU's memory that it takes.
        instead: a sentence that says how to do without it.
        options: more of `vllm.LLM`, or other values than those below.

    Raises:
        EngineFailed: it does not start.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # it reads the weights where they are
    if device.type != "cuda":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # of the threads that train
    usual = {
        "model": name,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": str(dtype).removeprefix("torch."),
        "gpu_memory_utilization": memory,
        "max_model_len": -1,  # the model's window, or what fits
        "max_num_batched_tokens": 4096,  # vLLM counts the memory of so many as taken
        "enable_prefix_caching": False,  # weights may change
        "enforce_eager": device.type != "cuda",
        "seed": 0,
    }
    try:
        with _precision_kept():
            engine = pkgutil.resolve_name("vllm:LLM")(**usual | options)
    except Exception as error:  # vLLM has errors of many kinds
        raise EngineFailed(
            f"vLLM did not start for {name}: {first_line(error).rstrip('.')}. --vllm_memory ({memory}) is the share of the GPU "
            f"for its weights and cache, and has to be free. {instead}"
        ) from error
    if (finalizer := getattr(engine.llm_engine.engine_core, "_finalizer", None)) is not None:  # of vLLM 0.31
        finalizer.atexit = False  # see _ENGINES; by then they have ended
    return engine


@contextmanager
def _precision_kept() -> Iterator[None]:
    """Keeps what --tf32 set, which vLLM sets anew."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        yield
    finally:
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before


def _completions(
    engine: Any, weights: dict[str, torch.Tensor], prompts: list[list[int]], sampling: list[Any], device: torch.device
) -> list[list[int]]:
    """Has an engine load weights and complete prompts; ids with the stop token that ended them."""

    def load(model: nn.Module) -> set[str]:
        """Returns names of vLLM's weights that got nothing."""
        return {name for name, _ in model.named_parameters()} - set(model.load_weights(weights.items()))

    if device.type == "cuda":
        clear_device_cache()  # what torch keeps for itself
        engine.wake_up(tags=["weights"])
    (missing,) = engine.apply_model(load)
    if missing:
        raise ValueError(f"it has weights that the model lacks, such as {sorted(missing)[0]}")
    if device.type == "cuda":
        engine.wake_up(tags=["kv_cache"])
    completions = completed(engine, prompts, sampling)
    if device.type == "cuda":
        engine.sleep(level=2)  # drops the weights too, which are here
    return completions


def completed(engine: Any, prompts: list[list[int]], sampling: list[Any]) -> list[list[int]]:
    """Has an engine complete prompts; ids with the stop token that ended them. Raises ValueError for a text that broke off."""
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    if broken := next((answer for answer in answers if answer.finish_reason not in ("stop", "length")), None):
        raise ValueError(f"a text ended by {broken.finish_reason}")
    return [list(answer.token_ids) for answer in answers]
