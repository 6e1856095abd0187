"""How close a student is to its teacher on prompts it has not trained on."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gkd.collator import GKDCollator, RowEncoder
from gkd.generation import CompletionGenerator, training_batch
from gkd.heads import LogitHead, last_hidden_states
from gkd.losses import TokenStatistics, distillation_loss


@dataclass
class HeldOut:
    """Averages over the scored tokens; KLs in nats."""

    forward_kl: float
    reverse_kl: float
    agreement: float
    tokens: int


def encode_prompts(rows: list[dict], encoder: RowEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of raw rows and their mask, (B, P)."""
    batch = GKDCollator(encoder.tokenizer.pad_token_id)([encoder(row, i) for i, row in enumerate(rows)])
    return batch["prompts"], batch["prompt_attention_mask"]


@torch.no_grad()
def teacher_text(
    teacher: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict], encoder: RowEncoder, batch_size: int = 16
) -> list[dict[str, torch.Tensor]]:
    """The teacher's greedy answers to `rows`, as batches to score students on: the same text for all of them."""
    config = GenerationConfig(
        max_new_tokens=encoder.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=encoder.stop_ids,
    )
    generate = CompletionGenerator()
    batches = []
    for start in range(0, len(rows), batch_size):
        prompts, mask = encode_prompts(rows[start : start + batch_size], encoder)
        prompts, mask = prompts.to(teacher.device), mask.to(teacher.device)
        completions = generate(teacher, prompts, mask, config)
        batches.append(training_batch(prompts, mask, *completions, pad=tokenizer.pad_token_id))
    return batches


@torch.no_grad()
def held_out(
    student: nn.Module, teacher: nn.Module, batches: list[dict[str, torch.Tensor]], vocab_size: int
) -> HeldOut:
    """Scores a student against its teacher on fixed text, teacher-forced."""
    total, tokens = 0, 0
    for batch in batches:
        scored = batch["labels"][:, 1:] != -100  # (B, L - 1)
        hidden, teacher_hidden = (
            last_hidden_states(model, batch["input_ids"], batch["attention_mask"])[:, :-1][scored]  # (N, H)
            for model in (student, teacher)
        )
        labels = batch["labels"][:, 1:][scored]
        heads = LogitHead.of(student), LogitHead.of(teacher)
        _, statistics = distillation_loss(hidden, teacher_hidden, labels, *heads, vocab_size=vocab_size, beta=0.0)
        total, tokens = total + statistics.sum(1), tokens + len(labels)
    mean = TokenStatistics(*(total / max(tokens, 1)).tolist())
    return HeldOut(mean.forward_kl, mean.reverse_kl, mean.agreement, tokens)
