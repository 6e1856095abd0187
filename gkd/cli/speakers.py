"""Who answers in a chat: a model here, one in an engine of vLLM, or one behind `gkd serve`, each with its conversation."""

import random
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from gkd.config.teacher import TeacherArguments
from gkd.data.continuation import prompt_ids
from gkd.generation.vllm import completed, new_engine, own_parameters
from gkd.io.errors import first_line, one_line
from gkd.models.heads import base_of
from gkd.models.loading import load_trained, read_configs, stored_dtype
from gkd.models.tokenizers import stop_token_ids
from gkd.models.weights import adapter_config
from gkd.teachers import describe


class Answer(BaseStreamer, StoppingCriteria):
    """A growing answer: `generate` streams tokens into it, and asks it whether to stop.

    transformers' TextStreamer delays text until a space comes, which some answers (and languages) never have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] | None = None  # None until `generate` has passed on the prompt
        self.seconds = 0.0
        self.stopped = False  # set it to stop
        self.note = ""
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
        else:
            self.ids += value.tolist()
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """Nothing is left to flush."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids or [], skip_special_tokens=True)

    def figures(self) -> str:
        speed = f"{len(self.ids)} tokens, {len(self.ids) / self.seconds:.1f} tokens/s" if self.ids else ""
        return ", ".join(filter(None, (speed, self.note)))


class Speaker:
    """A model with its tokenizer and its conversation."""

    stop_ids: list[int]
    positions: int | None  # that it has room for

    def __init__(self, title: str, tokenizer: PreTrainedTokenizerBase, args: Namespace):
        self.title, self.tokenizer, self.args = title, tokenizer, args
        self.clear()

    def clear(self) -> None:
        self.messages = opening(self.args.system)

    def answer(self, prompt: str, answer: Answer) -> None:
        """Fills `answer`, and adds both to the conversation. Runs in a thread, so errors become the answer's note."""
        self.messages.append({"role": "user", "content": prompt})
        try:
            inputs = encode(self.tokenizer, self.messages)
            limit = self.args.max_new_tokens
            if self.positions is not None:
                limit = min(limit, self.positions - inputs["input_ids"].shape[1])
            if limit < 1:
                raise ValueError(f"the conversation fills the model's {self.positions} positions: /clear forgets it")
            sampling = {"do_sample": False}
            if self.args.temperature:
                sampling = {"do_sample": True, "temperature": self.args.temperature}
            # A single row is never padded.
            self.write(inputs, limit, answer, eos_token_id=self.stop_ids, pad_token_id=self.stop_ids[0], **sampling)
            if not answer.ids or answer.ids[-1] not in self.stop_ids:
                answer.note = "stopped" if answer.stopped else f"cut at {limit}"
        except Exception as error:
            answer.note = f"failed: {first_line(error) or type(error).__name__}"
        self.messages.append({"role": "assistant", "content": answer.text})

    def write(self, inputs: transformers.BatchEncoding, limit: int, answer: Answer, **config: Any) -> None:
        """Puts at most `limit` tokens into the answer, as `encode`'s inputs and the generation config have it."""
        raise NotImplementedError


class LoadedSpeaker(Speaker):
    """A model here. Raises ValueError without one, or without a stop token."""

    def __init__(
        self, title: str, folder: str, tokenizer: PreTrainedTokenizerBase, args: Namespace, trusted: bool = False
    ):
        super().__init__(title, tokenizer, args)
        try:
            self.model = load_trained(folder, args.dtype, device_map=args.device, trust_remote_code=trusted)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: the model can't be loaded: {first_line(error)}") from error
        base = base_of(self.model)
        self.stop_ids = stop_token_ids(tokenizer, base.config, base.generation_config)
        self.positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)

    def write(self, inputs: transformers.BatchEncoding, limit: int, answer: Answer, **config: Any) -> None:
        inputs = inputs.to(self.model.device)
        self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=limit,
            num_beams=1,
            streamer=answer,
            stopping_criteria=StoppingCriteriaList([answer]),
            **config,
        )


class SpeakerInPieces(Speaker):
    """One that is asked for a few tokens at a time, so that the answer grows and can be stopped."""

    _TOGETHER = 16

    def write(self, inputs: transformers.BatchEncoding, limit: int, answer: Answer, **config: Any) -> None:
        answer.put(ids := inputs["input_ids"])
        while limit > 0 and not answer.stopped:
            size = min(limit, self._TOGETHER)
            written = self.piece(ids, size, config)
            for token in written:
                answer.put(token[None])
            if answer.ids[-1] in self.stop_ids:
                break
            ids, limit = torch.cat([ids, written[None]], 1), limit - size

    def piece(self, ids: torch.Tensor, size: int, config: dict[str, Any]) -> torch.Tensor:
        """At most `size` tokens behind ids (1, L), int64 (T,); fewer only where a stop token ends them."""
        raise NotImplementedError


class ServedSpeaker(SpeakerInPieces):
    """A teacher behind `gkd serve`, which samples from its whole distribution. Raises ValueError or RunStopped if none answers."""

    def __init__(self, url: str, args: Namespace):
        described = TeacherArguments(teacher_url=url)
        described.check_teacher()
        self._teacher = describe(described)
        side = self._teacher.side(None, described)
        if side.tokenizer is None:
            raise ValueError(f"--teacher {url}: the server tells no tokenizer.")
        super().__init__(f"teacher: {self._teacher.name}", side.tokenizer, args)
        self.stop_ids = stop_token_ids(side.tokenizer, *side.stops)
        self.positions = side.window

    def piece(self, ids: torch.Tensor, size: int, config: dict[str, Any]) -> torch.Tensor:
        sampling = GenerationConfig(max_new_tokens=size, top_k=0, top_p=1.0, **config)
        written, kept = self._teacher.write(ids, torch.ones_like(ids), sampling, random.getrandbits(62))
        return written[kept.bool()]


class VllmSpeaker(SpeakerInPieces):
    """A model in an engine of vLLM. Raises EngineFailed where it does not start, ValueError without a stop token."""

    _one_at_a_time = Lock()  # vLLM keeps what it computes now in the process, for all engines

    def __init__(self, title: str, folder: str, tokenizer: PreTrainedTokenizerBase, args: Namespace, trusted: bool):
        super().__init__(title, tokenizer, args)
        model, self._own = read_configs(f"--{title.partition(':')[0]}", folder, trust_remote_code=trusted)
        self._engine = new_engine(
            folder,
            stored_dtype(model, args.dtype),
            PartialState().device,
            args.vllm_memory,
            "--generation_backend auto does without vLLM.",
            trust_remote_code=trusted,
            max_num_seqs=1,
            enable_prefix_caching=True,  # of the piece before
        )
        self.stop_ids = stop_token_ids(tokenizer, model, self._own)
        self.positions = getattr(model.get_text_config(), "max_position_embeddings", None)

    def piece(self, ids: torch.Tensor, size: int, config: dict[str, Any]) -> torch.Tensor:
        sampling = own_parameters(self._own, self.args.temperature, size, self.stop_ids)
        with self._one_at_a_time:
            (written,) = completed(self._engine, ids.tolist(), [sampling])
        return torch.tensor(written)


def opening(system: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [{"role": "system", "content": system}] if system else []


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> transformers.BatchEncoding:
    """input_ids and attention_mask, int64 (1, L)."""
    if tokenizer.chat_template is None:  # a base model: prompt and answer are one text
        text = "".join(m["content"] + ("" if m["role"] == "user" else "\n") for m in messages)
        ids = torch.tensor([prompt_ids(tokenizer, text)])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def load_tokenizer(folder: str, system: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of an adapter's base model if the folder has none.

    Raises ValueError if there is no model, or its chat template refuses a system prompt.
    """
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    try:
        try:
            tokenizer = load(folder)
        except Exception:  # the tokenizers library raises bare ones
            if not Path(folder, "adapter_config.json").is_file():
                raise
            tokenizer = load(adapter_config(folder).base_model_name_or_path)
    except Exception as error:
        raise ValueError(
            f"{folder}: no model and tokenizer there, on disk or on the hub: {one_line(error)}"
        ) from error
    try:
        encode(tokenizer, [*opening(system), {"role": "user", "content": "?"}])
    except Exception as error:  # a template is a program
        raise ValueError(f"{folder}: its chat template refuses the conversation: {first_line(error)}") from error
    return tokenizer
