"""From prompts to completions: prepares a model, seeds the noise, and generates by a `Generator`, here or elsewhere."""

import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from gkd.compat import unwrap_model_for_generation
from gkd.config.generation import GENERATION_BACKENDS
from gkd.generation.decoder import Unsupported
from gkd.generation.linears import quick_linears
from gkd.generation.sampling import NotFinite, draw, sampling_noise, uniform_noise
from gkd.generation.static import StaticDecoding, check_supported, rows_that_fit
from gkd.io.errors import RunStopped, first_line
from gkd.io.replaced import replaced
from gkd.models.graphs import on_device
from gkd.models.heads import base_of, modes_kept, probe_ids
from gkd.models.lora import merged_lora
from gkd.runs.choices import GENERATION_ROWS, Choices

logger = get_logger(__name__)


def _warn(message: str) -> None:
    PartialState()  # the logger reads the number of this process from it
    logger.warning(message)


class Generator(Protocol):
    """Samples one completion for each prompt."""

    @property
    def capture_seconds(self) -> float:
        """Seconds spent so far on one-off work such as capturing CUDA graphs, which logs show separately."""

    def __call__(
        self, model: nn.Module, prompts: torch.Tensor, prompt_mask: torch.Tensor, config: GenerationConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples with noise from torch's global generators, which `complete` seeds.

        A generator with noise of its own draws a seed from them, by `torch.randint`.

        Args:
            model: unwrapped, in evaluation mode, adapters merged (`generation_mode`). The model and its weights may
                differ from call to call.
            prompts, prompt_mask: left-padded ids and their mask, int64 (B, P), on the model's device.
            config: how to sample; names the stop tokens (a list) and the pad token.

        Returns:
            Completions (B, T), right-padded with the pad token, and their mask (B, T), int64. A completion includes its
            stop token.
        """


@contextmanager
def generation_mode(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    """Unwraps `model` and prepares it to generate: evaluation mode, LoRA merged, ZeRO-3 parameters gathered.

    Evaluation mode switches off dropout, and gradient checkpointing, which would disable the KV cache. The mode of each
    module is restored on exit, also after an exception.
    """
    unwrapped = accelerator.unwrap_model(model)
    with ExitStack() as stack:
        for module in unwrapped.modules():
            if "gradient_checkpointing" in vars(module):  # `hasattr` takes milliseconds of a large model
                stack.enter_context(replaced(module, "gradient_checkpointing", module.gradient_checkpointing))
        stack.enter_context(modes_kept(unwrapped))
        unwrapped.eval()
        if accelerator.deepspeed_plugin is not None and accelerator.deepspeed_plugin.zero_stage == 3:
            yield stack.enter_context(unwrap_model_for_generation(model, accelerator))
            return
        if accelerator.distributed_type is not DistributedType.FSDP:  # whose modules gather their weights when called
            stack.enter_context(merged_lora(unwrapped))
        yield unwrapped


def complete(
    model: nn.Module,
    accelerator: Accelerator,
    generator: Generator,
    prompts: torch.Tensor,
    prompt_mask: torch.Tensor,
    config: GenerationConfig,
    seed: int,
    autocast: bool = False,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions of prompts, which depend only on the weights, the prompts, `config` and `seed`.

    Args:
        model: may be wrapped for training, in any mode.
        prompts, prompt_mask, config: see `Generator`.
        seed: of the sampling noise; torch's global generators are restored afterwards.
        autocast: generate under the accelerator's autocast, as the student trains.
        device: of the model; by default that of `prompts`.

    Returns:
        Completions (B, T) and their mask, on the device of `prompts`.
    """
    device = device or prompts.device
    with (
        generation_mode(model, accelerator) as ready,
        sampling_noise(seed, device),
        accelerator.autocast() if autocast else nullcontext(),
    ):
        ids, mask = generator(ready, prompts.to(device), prompt_mask.to(device), config)
        return ids.to(prompts.device), mask.to(prompts.device)


class CompletionGenerator:
    """Decodes in this process, and holds the static decoders of each model.

    Args:
        backend: `static` decodes with a static cache, on a GPU as a replayed CUDA graph; `dynamic` is transformers'
            `generate`; `auto` is `static` on a GPU, and `dynamic` elsewhere and for models without static support.
        batch_size, choices, sharded, moving: see `new_generator`.
    """

    def __init__(
        self,
        backend: str = "auto",
        batch_size: int | None = None,
        choices: Choices | None = None,
        sharded: bool = False,
        moving: Iterable[nn.Module] = (),
    ):
        if sharded and backend == "static":
            raise ValueError(
                "--generation_backend static needs whole weights on each GPU: use ZeRO-2 or DDP, or auto."
            )
        if sharded:
            _warn("Sharded weights (ZeRO-3, FSDP) generate with a dynamic cache, which is slower than ZeRO-2.")
            backend = "dynamic"
        self.backend, self.batch_size, self.choices = backend, batch_size, choices or Choices()
        self._static: WeakKeyDictionary[nn.Module, StaticDecoding] = WeakKeyDictionary()
        self._dynamic_models: WeakSet[nn.Module] = WeakSet(moving)
        self._reads_padding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @property
    def capture_seconds(self) -> float:
        return sum(decoding.seconds for decoding in self._static.values())

    @property
    def captures(self) -> int:
        return sum(decoding.captures for decoding in self._static.values())

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, prompts: torch.Tensor, prompt_mask: torch.Tensor, config: GenerationConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Generator`. Raises `gkd.generation.decoder.Unsupported` for such a model with the backend `static`."""
        stops = torch.tensor(config.eos_token_id or [], dtype=torch.long, device=prompts.device)
        parts, start = [], 0
        noise = _noise(len(prompts), config)
        with _without_router_logits(model), quick_linears(model, prompts.device), on_device(prompts.device):
            # With sharded weights the test for padding is collective: all ranks run it, with padded prompts or not.
            sharded = _is_sharded(model)
            may_pad = sharded or not bool(prompt_mask.all())
            one_by_one = may_pad and self._misreads_padding(model, config.pad_token_id)
            most = min(self.batch_size or len(prompts), len(prompts))
            if not sharded:  # ranks that share weights generate equally often, whatever their prompts
                most = min(most, rows_that_fit(model, prompts.shape[1] + config.max_new_tokens, prompts.device))
                most = min(most, self.choices.get(GENERATION_ROWS) or most)
            while start < len(prompts):
                size = 1 if one_by_one else most
                rows = slice(start, start + size)
                # Cuts columns that are padding in all of these rows.
                left = int(prompt_mask[rows].any(0).long().argmax()) if size < len(prompts) else 0
                failure = None
                uniforms = None if noise is None else noise[rows].to(prompts.device)
                try:
                    ids = self._generate(model, prompts[rows, left:], prompt_mask[rows, left:], config, uniforms)
                except RuntimeError as error:
                    # Ranks that share weights would wait in the middle of a forward for the one that starts anew.
                    if sharded or len(prompts[rows]) == 1 or not lacks_memory(error):
                        raise
                    failure = first_line(error)
                except NotFinite:
                    raise RunStopped(
                        f"The logits of {type(base_of(model)).__name__} are not finite, so it can't write: its weights are "
                        "not. Start from weights that are, and lower --learning_rate."
                    ) from None
                if failure is not None:  # outside of the handler, whose traceback keeps tensors alive
                    most = self._shrink(len(prompts[rows]), failure)
                    continue
                start += size
                stopped = torch.isin(ids, stops).long()
                parts.append((ids, (stopped.cumsum(1) - stopped == 0).long()))  # (b, t): up to the first stop token
        length = max(int(mask.any(0).sum()) for _, mask in parts)
        cut = [[F.pad(t, (0, length - t.shape[1])) for t in part] for part in parts]  # or padded
        ids, masks = map(torch.cat, zip(*cut, strict=True))
        return torch.where(masks.bool(), ids, config.pad_token_id), masks

    def _generate(self, model, prompts, prompt_mask, config, uniforms) -> torch.Tensor:
        if self.is_static(model, prompts, config):
            try:
                decoding = self._static.setdefault(model, StaticDecoding())
                return decoding(model, prompts, prompt_mask, config, uniforms)
            except NotFinite:
                raise
            except Exception as error:  # Triton and the models have errors of many kinds
                if self.backend == "static" or (len(prompts) > 1 and lacks_memory(error)):
                    raise
                self._fall_back(model, f"{type(error).__name__}: {first_line(error)}")
        return generate_dynamic(model, prompts, prompt_mask, config, uniforms)

    def _misreads_padding(self, model: nn.Module, pad: int) -> bool:
        """Whether the model reads padding as text, so that prompts must generate one by one; warns once if so.

        Raises:
            ValueError: the model is sharded too; its ranks would have to generate the same number of times.
        """
        if model not in self._reads_padding:
            misreads = self._reads_padding[model] = reads_padding(model, pad)
            problem = f"{type(base_of(model)).__name__} reads padding as if it were text"
            if misreads and _is_sharded(model):
                raise ValueError(
                    f"{problem}, so its prompts generate one at a time, which sharded weights can't: use ZeRO-2 or DDP."
                )
            if misreads:
                _warn(f"{problem}: one prompt generates at a time.")
        return self._reads_padding[model]

    def _shrink(self, rows: int, failure: str) -> int:
        """Halves the rows that generate together, after running out of memory with so many; returns how many are left."""
        for decoding in self._static.values():
            decoding.release()
        clear_device_cache(garbage_collection=True)
        fewer = -(-rows // 2)
        message = f"Out of memory with {rows} prompts generating at a time ({failure}): {fewer} from here on."
        self.choices.lower(GENERATION_ROWS, fewer, message)
        return fewer

    def is_static(self, model: nn.Module, prompts: torch.Tensor, config: GenerationConfig) -> bool:
        """Whether this model completes these prompts with a static cache; warns once if it can't."""
        if model in self._dynamic_models:
            return False
        if self.backend == "static":
            return True
        if self.backend == "dynamic" or prompts.device.type != "cuda":
            return False
        try:
            check_supported(model, config)
        except Unsupported as error:
            self._fall_back(model, str(error))
            return False
        return True

    def _fall_back(self, model: nn.Module, why: str) -> None:
        self._dynamic_models.add(model)
        if decoding := self._static.get(model):  # stays in the table for its `seconds`
            decoding.release()
        _warn(f"{type(base_of(model)).__name__} generates with a dynamic cache, which is slower: {why}")


def in_process(args: Any, **options: Any) -> CompletionGenerator:
    """The generator of the backends `auto`, `static` and `dynamic`."""
    return CompletionGenerator(args.generation_backend, **options)


def new_generator(
    args: Any,
    batch_size: int | None = None,
    choices: Choices | None = None,
    sharded: bool = False,
    moving: Iterable[nn.Module] = (),
) -> Generator:
    """The generator that --generation_backend names.

    Args:
        args: all flags of the command.
        batch_size: prompts that generate together; all by default.
        choices: keep how many fit, once memory has run out: half as many, again and again. Whole weights only.
        sharded: the student's weights are sharded, so that all ranks must generate in step.
        moving: models whose weights change their addresses, so that no CUDA graph may read them.

    Raises:
        ValueError: the backend does not support sharded weights.
    """
    make = pkgutil.resolve_name(GENERATION_BACKENDS[args.generation_backend])
    return make(args, batch_size=batch_size, choices=choices, sharded=sharded, moving=moving)


def _without_router_logits(model: nn.Module) -> AbstractContextManager:
    """Switches `output_router_logits` off, which trainers may have saved in a config: decoding steps fail with it."""
    config = base_of(model).config.get_text_config()
    return (
        replaced(config, "output_router_logits", False) if hasattr(config, "output_router_logits") else nullcontext()
    )


def _noise(rows: int, config: GenerationConfig) -> torch.Tensor | None:
    """The noise of a generation, seeded by torch's global generator; None where it is greedy or `transformers` samples."""
    if not config.do_sample or config.top_k not in (0, None) or config.top_p not in (1.0, None):
        return None
    return uniform_noise(int(torch.randint(2**62, ())), rows, config.max_new_tokens)


class _Sampler(LogitsProcessor):
    """Draws a token of each row by its noise (B, T), and leaves no other choice."""

    def __init__(self, uniforms: torch.Tensor, width: int, temperature: float):
        self.uniforms, self.width, self.temperature = uniforms, width, temperature
        self.finite = torch.ones(len(uniforms), dtype=torch.bool, device=uniforms.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token, finite = draw(scores, self.uniforms[:, input_ids.shape[1] - self.width], self.temperature)
        self.finite &= finite
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def generate_dynamic(model, prompts, prompt_mask, config, uniforms=None) -> torch.Tensor:
    """New tokens (B, T) by transformers' `generate`; `uniforms` is the noise (B, T), see `uniform_noise`."""
    # Ranks that share weights continue until all have finished. transformers detects ZeRO-3, not FSDP2.
    in_step = _is_fsdp2(model) or None
    options = {"generation_config": config}
    if uniforms is not None:
        sampler = _Sampler(uniforms, prompts.shape[1], config.temperature)
        options |= {"logits_processor": LogitsProcessorList([sampler])}
        options["generation_config"] = GenerationConfig(**config.to_dict() | {"do_sample": False})
    # transformers fills open settings of a passed config from the model's own, such as a repetition penalty, which would
    # sample from another distribution than the one that trains.
    with replaced(base_of(model), "generation_config", options["generation_config"]):
        ids = model.generate(prompts, attention_mask=prompt_mask, synced_gpus=in_step, **options)
    if uniforms is not None and not bool(sampler.finite.all()):
        raise NotFinite
    return ids[:, prompts.shape[1] :]


def lacks_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: also while a graph was captured or created, where CUDA has errors of other kinds."""
    if error is None:
        return False
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # CUDA's, its libraries', a CPU's
    known = isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
    return known or lacks_memory(error.__context__)  # ending a capture fails after what broke it


def _is_fsdp2(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _is_sharded(model: nn.Module) -> bool:
    """Whether all ranks must call the model in step."""
    return is_deepspeed_zero3_enabled() or _is_fsdp2(model)


def reads_padding(model: nn.Module, pad: int) -> bool:
    """Whether the ids in a prompt's left padding change its next token, as in some recurrent models."""
    ids = probe_ids(model)
    mask = F.pad(torch.ones_like(ids), (ids.shape[1], 0))
    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
    )
    try:
        logits = [
            model.generate(torch.cat([padding, ids], 1), attention_mask=mask, generation_config=config).logits[0]
            for padding in (torch.full_like(ids, pad), ids.flip(1))
        ]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError):  # the model does not support padding
        return True
    return bool((logits[0] - logits[1]).abs().max() > 1e-3 * logits[0].abs().max())
