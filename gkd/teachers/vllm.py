"""A teacher that an engine of vLLM has, over one GPU or several: it writes text, and tells its likeliest tokens.

Of `gkd cache`: what it tells is what a cache of the top k holds. It is loaded as it is on disk, and over several GPUs vLLM
starts a process for each.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import GenerationConfig

from gkd.config.generation import VLLM
from gkd.data.batch import Batch, padded_rows, unpadded_rows
from gkd.generation.vllm import EngineFailed, completed, new_engine, sampling_parameters, telling_parameters
from gkd.io.errors import RunStopped, first_line
from gkd.losses.targets import Target
from gkd.losses.topk import TopK
from gkd.models.loading import stored_dtype
from gkd.models.pairing import Side
from gkd.models.tokenizers import shared_vocab_size
from gkd.teachers.placed import NamedTeacher


class VllmTeacher(NamedTeacher):
    """The teacher of `gkd cache --backend vllm`. Ids that the student lacks are never written, and have no probability."""

    writes = True
    coarse = True

    def __init__(self, args: Any):
        super().__init__(args)
        self.fingerprints = {"backend": VLLM}  # it rounds, and draws, as no other does

    def side(self, student: Side, args: Any) -> Side:
        side = super().side(student, args)
        self._sizes = shared_vocab_size(student.tokenizer, side.tokenizer, student.size, side.size), side.size
        # vLLM makes half precision of a float32 model unless told not to.
        self._dtype = stored_dtype(side.models[0].config, self.args.teacher_dtype)
        # A token is written behind each row that it reads.
        return replace(side, window=None if side.window is None else side.window - 1)

    def load(self) -> "VllmTeacher":
        """Starts the engine. Raises EngineFailed where it does not start, or can't leave ids out."""
        args, (vocab_size, size) = self.args, self._sizes
        name, count = args.teacher_model_name_or_path, args.tensor_parallel_size
        self._engine = new_engine(
            name,
            self._dtype,
            PartialState().device,
            args.vllm_memory,
            "--tensor_parallel_size shares them among more GPUs; without --backend transformers has the teacher.",
            revision=args.teacher_revision,
            trust_remote_code=args.teacher_trust_remote_code,
            max_num_seqs=args.batch_size,
            max_num_batched_tokens=2048,  # their logits are in memory that it does not count: 3 GB with 152,000 ids
            max_logprobs=args.top_k,
            tensor_parallel_size=count,
            distributed_executor_backend="mp" if count > 1 else "uni",
        )
        if vocab_size < size:
            try:
                self._engine.apply_model(partial(cut_logits, size=vocab_size))
            except Exception as error:
                raise EngineFailed(
                    f"vLLM can't leave out the {size - vocab_size} ids of {name} that the student lacks ({first_line(error)}): "
                    "without --backend transformers has the teacher."
                ) from error
        return self

    def write(
        self, prompts: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        texts = unpadded_rows(prompts, mask)
        sampling = sampling_parameters(config, seed, len(texts), self._sizes[0])
        try:
            answers = completed(self._engine, texts, sampling)
        except Exception as error:
            raise _broke(error) from error
        ids, kept = padded_rows(answers, config.pad_token_id)
        return ids.to(prompts.device), kept.to(prompts.device)

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        """A context with its TopK in float32, on the device of the labels.

        Raises:
            EngineFailed: the engine broke.
            RunStopped: its log-probabilities are no numbers.
        """
        k = self.args.top_k
        ids, _, scored = (None if tensor is None else tensor.cpu() for tensor in batch.teacher_inputs)
        rows, positions = scored // ids.shape[1], scored % ids.shape[1]
        asked = [positions[rows == row].tolist() for row in rows.unique().tolist()]
        texts = [ids[row, : at[-1] + 2].tolist() for row, at in zip(rows.unique().tolist(), asked, strict=True)]
        try:
            told = likeliest(self._engine, texts, k)
        except Exception as error:
            raise _broke(error) from error
        # What is told of a token stands behind the position that it follows, but for the first, of which nothing is told.
        parts = [torch.zeros(2, 0, k + 1, dtype=torch.float64)]
        parts += [of_row[:, at] for of_row, at in zip(told, asked, strict=True)]
        which, log_probs = torch.cat(parts, 1)
        if bool(log_probs.isnan().any()):
            raise RunStopped(
                "The teacher's log-probabilities in vLLM are no numbers: its weights, or its --teacher_dtype."
            )
        likeliest_of = which[:, 1:].long(), log_probs[:, 1:], self._sizes[0]
        return nullcontext(TopK.of_likeliest(*likeliest_of, log_probs[:, 0].float()).to(batch.labels.device))


def likeliest(engine: Any, texts: list[list[int]], k: int) -> list[torch.Tensor]:
    """Of each text (L ids) the token behind each id but the last, and the k likeliest there: ids and log-probabilities, float64
    (2, L - 1, k + 1)."""
    inputs = [{"prompt_token_ids": text} for text in texts]
    told = []
    for output in engine.generate(inputs, telling_parameters(k), use_tqdm=False) if texts else ():
        flat = output.prompt_logprobs
        # Of each token but the first its own entry, then k.
        both = torch.tensor([flat.token_ids, flat.logprobs], dtype=torch.float64)
        told.append(both.view(2, -1, k + 1))
    return told


def cut_logits(model: nn.Module, size: int) -> None:
    """Has one of vLLM's models give logits of its first `size` ids alone. It runs where the model is."""
    model.logits_processor.org_vocab_size = size


def _broke(error: Exception) -> EngineFailed:
    why = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
    if why == "RuntimeError: cancelled":  # as vLLM words it
        why = "one of its processes has ended"
    return EngineFailed(
        f"vLLM broke: {why}. Shards that are done are kept: the same command goes on. Where memory was short, lower "
        "--vllm_memory: log-probabilities take some beside it."
    )
