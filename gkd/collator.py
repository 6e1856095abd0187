"""Rows to tokens: templating, which tokens are scored, truncation, and padding.

Each row is tokenized once, before training; the collator only pads.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from gkd.arguments import GKDArguments
from gkd.rows import DataError, conversation_of, is_answer, row_problem
from gkd.teacher_cache import topk_of

IGNORE = -100


def stop_token_ids(*holders: Any) -> list[int]:
    """All tokens that end an answer, of tokenizers, model configs and generation configs alike.

    Chat models often end a turn with a token that only one of these names.

    Raises:
        ValueError: if none is known, so that no generation could ever end by itself.
    """
    found: set[int] = set()
    for holder in holders:
        ids = getattr(holder, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    if not found:
        raise ValueError("Neither the tokenizer nor a model names an end-of-sequence token; set --eos_token.")
    return sorted(found)


@dataclass
class RowEncoder:
    """Encodes a row (see gkd.rows) to `prompt_ids`, `input_ids`, `labels` and two flags of truncation.

    A conversation is cut into pieces at the borders of its scored answers, and each piece is tokenized by itself: so a
    prompt has the same tokens whether its answer comes from the dataset or is yet to be generated.

    Args:
        max_length: of prompt and completion together; None is no limit.
        max_new_tokens: how much of it is kept free for the completion.
        train_on: "last_turn" scores the last assistant message, "all_turns" every one.
        stop_ids: what ends an answer; template text after it (a line feed, often) is not scored, since no generated
            answer has it.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    max_new_tokens: int
    train_on: str
    stop_ids: list[int]
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def of(cls, args: GKDArguments, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> "RowEncoder":
        free = args.max_new_tokens
        if args.max_length is not None and free >= args.max_length:  # where nothing is generated: half for the answer
            free = args.max_length // 2
        return cls(tokenizer, args.max_length, free, args.train_on, stop_ids, args.chat_template_kwargs)

    def __call__(self, row: dict[str, Any], index: int | None = None) -> dict[str, Any]:
        """Raises DataError, naming the row, if it is malformed or its template moves tokens."""
        row = dict(row)  # datasets passes a lazy mapping
        try:
            if problem := row_problem(row):
                raise DataError(problem)
            messages = conversation_of(row)
            return self._encode_text(row) if messages is None else self._encode_conversation(row, messages)
        except DataError as error:
            where = "" if index is None else f"row {index}: "
            raise DataError(f"{where}{error}") from None

    def _encode_text(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = self.tokenizer(row["prompt"])["input_ids"]
        if len(prompt) > 1 and prompt[-1] in self.stop_ids:  # some tokenizers close every text; this one goes on
            prompt = prompt[:-1]
        answer = []
        if (row.get("completion") or "").strip():
            answer = [*self._ids(row["completion"]), self.tokenizer.eos_token_id]
        return self._pack([(prompt, False)], answer, lambda: int(prompt[:1] == [self.tokenizer.bos_token_id]))

    def _encode_conversation(self, row: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
        if self.tokenizer.chat_template is None:
            raise DataError("a conversation, but the student's tokenizer has no chat template (--chat_template_path).")
        messages = _without_nulls(messages)
        kwargs = {**(self.chat_template_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
        tools = row.get("tools") or None

        def render(part: list[dict[str, Any]], ask: bool) -> str:
            return self.tokenizer.apply_chat_template(
                part, tools=tools, tokenize=False, add_generation_prompt=ask, **kwargs
            )

        history = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        prompt_text = render(history, True)
        answer_text = render(messages, False) if is_answer(messages[-1]) else ""
        if answer_text and not answer_text.startswith(prompt_text):
            raise DataError(_moved(prompt_text, answer_text))
        pieces = self._history_pieces(history, prompt_text, render)
        if row.get("messages") is not None and row.get("prompt") is not None:
            given = row["prompt"] if isinstance(row["prompt"], str) else render(_without_nulls(row["prompt"]), True)
            self._check_prompt(given, prompt_text, is_text=isinstance(row["prompt"], str))
            if given != prompt_text:  # text templated elsewhere, with another date in its system prompt, say
                pieces = [(self._ids(given), False)]
        answer = self._answer_ids(answer_text[len(prompt_text) :])[0] if answer_text else []
        return self._pack(pieces, answer, lambda: self._head_length(history, pieces[0][0], render))

    def _check_prompt(self, given: str, templated: str, is_text: bool) -> None:
        """A `prompt` beside `messages` must ask the same: equal as messages, or as text that ends alike."""
        if given == templated:
            return
        if not is_text or self.train_on == "all_turns" or given[-8:] != templated[-8:]:
            raise DataError(
                "`prompt` is not what the template makes of `messages` without the last answer: "
                f"{_difference(given, templated)} Remove the `prompt` column or make the two agree."
            )

    def _history_pieces(self, history, prompt_text, render) -> list[tuple[list[int], bool]]:
        """The prompt as (ids, scored) pieces; earlier answers are scored with train_on="all_turns"."""
        if self.train_on == "last_turn":
            return [(self._ids(prompt_text), False)]
        pieces, cursor = [], 0
        for position, message in enumerate(history):
            if not is_answer(message):
                continue
            before, after = render(history[:position], True), render(history[: position + 1], False)
            if not (after.startswith(before) and prompt_text.startswith(after)):
                raise DataError(f"message {position}: {_moved(before, prompt_text)}")
            answer, rest = self._answer_ids(after[len(before) :])
            pieces += [(self._ids(before[cursor:]), False), (answer, True), (rest, False)]
            cursor = len(after)
        return [*pieces, (self._ids(prompt_text[cursor:]), False)]

    def _answer_ids(self, text: str) -> tuple[list[int], list[int]]:
        """An answer's ids up to its last stop token, and what the template writes behind it."""
        ids = self._ids(text)
        end = max((i for i, token in enumerate(ids) if token in self.stop_ids), default=len(ids) - 1) + 1
        return ids[:end], ids[end:]

    def _head_length(self, history, first_piece: list[int], render) -> int:
        """How many leading tokens come before the first question: BOS, a system prompt, the template's own too."""
        system = history[:1] if history[0]["role"] == "system" else []
        texts = [render([*system, {"role": "user", "content": text}], True) for text in ("a", "b")]
        first, second = (self._ids(text) for text in texts)
        same = 0
        for a, b, c in zip(first, second, first_piece, strict=False):
            if not a == b == c:
                break
            same += 1
        return same

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pack(
        self, pieces: list[tuple[list[int], bool]], answer: list[int], head: Callable[[], int]
    ) -> dict[str, Any]:
        """Joins the pieces; a prompt that is too long keeps its first `head()` tokens and loses the ones after them."""
        prompt = [token for ids, _ in pieces for token in ids]
        labels = [token if scored else IGNORE for ids, scored in pieces for token in ids]
        prompt_cut = answer_cut = False
        if self.max_length is not None:
            excess = len(prompt) - (self.max_length - self.max_new_tokens)
            if excess > 0:
                prompt_cut = True
                keep = min(head(), (self.max_length - self.max_new_tokens) // 2)  # a long head may not fill it
                del prompt[keep : keep + excess], labels[keep : keep + excess]
            room = self.max_length - len(prompt)
            answer, answer_cut = answer[:room], len(answer) > room
        if not prompt:
            raise DataError("the prompt has no tokens.")
        return {
            "prompt_ids": prompt,
            "input_ids": prompt + answer,
            "labels": labels + answer,
            "prompt_cut": prompt_cut,
            "answer_cut": answer_cut,
        }


@dataclass
class RowKeeper:
    """Encodes rows and keeps them as JSON in a column `row`: what task metrics compare answers with."""

    encoder: RowEncoder

    def __call__(self, row: dict[str, Any], index: int | None = None) -> dict[str, Any]:
        return self.encoder(row, index) | {"row": json.dumps(dict(row), ensure_ascii=False, default=str)}


def _without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arrow gives every message the keys of all, null where absent; a template would see them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _difference(a: str, b: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"they part at character {at}, {a[at : at + 40]!r} against {b[at : at + 40]!r}."


def _moved(prompt: str, conversation: str) -> str:
    return (
        "the templated prompt is not the beginning of the templated conversation, so tokens would move between prompt "
        f"and answer: {_difference(prompt, conversation)} A template that adds <think> does this; set it by "
        "--chat_template_kwargs (such as '{\"enable_thinking\": false}') or give another --chat_template_path."
    )


def encode_dataset(
    data: Dataset | IterableDataset, encoder: RowEncoder, processes: int | None = None, keep_rows: bool = False
) -> Dataset | IterableDataset:
    """Tokenizes a dataset once, in one process or several; one that has `prompt_ids` already is returned as it is.

    With `keep_rows`, for evaluation, a column `row` holds each row as JSON.
    """
    columns = data.column_names or list(next(iter(data), {}))  # a stream that was mapped does not know its columns
    if "prompt_ids" in columns:
        return data
    encoder = RowKeeper(encoder) if keep_rows else encoder
    if isinstance(data, IterableDataset):
        return data.map(encoder, with_indices=True, remove_columns=columns)
    return data.map(encoder, with_indices=True, remove_columns=columns, num_proc=processes, desc="Tokenizing")


@dataclass
class GKDCollator:
    """Pads encoded rows to a batch.

    Returns `prompts` and `prompt_attention_mask` (B, P), left-padded for generation; `input_ids`, `attention_mask` and
    `labels` (B, L), the dataset's own text right-padded, labels -100 where nothing is scored; `answer_cut` (B,). Rows of a
    teacher cache also give `topk`, what the teacher says of the N scored tokens, a `gkd.topk.TopK`.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts, prompt_mask = self._pad([r["prompt_ids"] for r in rows], self.pad_token_id, left=True)
        ids, mask = self._pad([r["input_ids"] for r in rows], self.pad_token_id)
        known = topk_of(rows)
        return {
            "prompts": prompts,
            "prompt_attention_mask": prompt_mask,
            "input_ids": ids,
            "attention_mask": mask,
            "labels": self._pad([r["labels"] for r in rows], IGNORE)[0],
            "answer_cut": torch.tensor([r["answer_cut"] for r in rows]),
            **({} if known is None else {"topk": known}),
        }

    @staticmethod
    def _pad(rows: list[list[int]], value: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), value)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, span], mask[i, span] = torch.tensor(row), 1
        return ids, mask
