"""Turns rows into tokens: templating, which tokens are scored, and truncation.

Each row is tokenized once, before training; the collator (gkd.data.batch) only pads.
"""

import hashlib
import json
import math
from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, islice, product
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from gkd.data.batch import IGNORE
from gkd.data.continuation import (
    ENCODING,
    common_prefix,
    continuation,
    continuing_ids,
    prompt_ids,
    text_ids,
    token_spans,
)
from gkd.data.rows import DataError, conversation_of, is_answer, row_problem
from gkd.data.templating import SWITCHES, Template, TemplateProblem, difference


@dataclass
class RowEncoder:
    """Encodes a row (see gkd.data.rows) to `prompt_ids`, `input_ids`, `labels`, and whether each was cut; with a column
    `teacher_prompt` also to `teacher_prompt_ids`, which are never cut; with several teachers to `teacher_shares`.

    A prompt is tokenized by itself, as generation sees it, whether its answer comes from the dataset or is generated.
    An answer has the ids that follow the prompt's when both are tokenized together.

    Args:
        max_length: tokens of prompt and completion together; None is no limit.
        max_new_tokens: how many of them are kept free for the completion.
        train_on: "last_turn" scores the last assistant message, "all_turns" every one.
        stop_ids: tokens that end an answer; template text after them (often a line feed) is not scored, since no
            generated answer has it.
        system_as_user: whether a system prompt becomes the beginning of the first question.
        source: the file or dataset of the rows, for errors.
        teacher_window: tokens that the teacher can read; None is no limit.
        teachers: the names of several, one or more of which each row names.
        reader: encodes prompts for a teacher with another tokenizer.
        whose: tokenizer it is, for errors.
        apart: an answer has the ids that it has behind any text, without the space that some tokenizers put behind a special
            token: what it writes is then what it writes in another tokenizer's ids.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    max_new_tokens: int
    train_on: str
    stop_ids: list[int]
    chat_template_kwargs: dict[str, Any] | None = None
    system_as_user: bool = False
    source: str | None = None
    teacher_window: int | None = None
    teachers: tuple[str, ...] = ()
    reader: "RowEncoder | None" = None
    whose: str = "student"
    apart: bool = False
    encoding: int = field(default=ENCODING, init=False)  # part of the fingerprint that `datasets` takes of this object

    @classmethod
    def of(
        cls,
        args: Any,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        teacher_window: int | None = None,
        teachers: tuple[str, ...] = (),
    ) -> "RowEncoder":
        limit, free = args.max_length, args.max_new_tokens
        if limit is not None and free >= limit:  # where nothing is generated: half for the answer
            free = limit // 2
        options = args.chat_template_kwargs, args.system_as_user
        more = {"teacher_window": teacher_window, "teachers": teachers}
        return cls(tokenizer, limit, free, args.train_on, stop_ids, *options, **more)

    def __call__(self, row: dict[str, Any], index: int | None = None) -> dict[str, Any]:
        """Encodes a row. Raises DataError, naming it, if it is malformed, or the template refuses it or moves tokens."""
        row = dict(row)  # datasets passes a lazy mapping
        try:
            return self._encode(row)
        except DataError as error:
            where = "" if index is None else f"{f'{self.source}, ' if self.source else ''}row {index}: "
            advice = f" {self._advice(row)}" if isinstance(error, TemplateProblem) else ""
            raise DataError(f"{where}{error}{advice}") from None

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        if problem := row_problem(row):
            raise DataError(problem)
        encoded = self._encode_student(row)
        if self.reader is not None or "teacher_prompt" in row:  # null where a row has none of its own
            encoded["teacher_prompt_ids"] = self._teacher_prompt(row, encoded)
        if self.teachers:
            encoded["teacher_shares"] = self._teacher_shares(row.get("teacher"))
        return encoded

    def _teacher_shares(self, named: Any) -> list[float]:
        """The share of each teacher in what a row is compared with; they sum to 1."""
        names = ", ".join(self.teachers)
        shares = {named: 1.0} if isinstance(named, str) else named
        if not isinstance(shares, dict):
            raise DataError(f"`teacher` must name one of {names}, or several with their shares, not {named!r}.")
        shares = {name: share for name, share in shares.items() if share is not None}  # Arrow gives all rows all names
        if unknown := shares.keys() - set(self.teachers):
            raise DataError(f"`teacher` names {', '.join(map(repr, sorted(unknown)))}; --teachers has {names}.")
        numbers = all(isinstance(share, int | float) and 0 <= share < math.inf for share in shares.values())
        if not numbers or not sum(shares.values()):
            raise DataError(f"`teacher` must give each name a share of 0 or more, and one above 0, not {named!r}.")
        return [shares.get(name, 0.0) / sum(shares.values()) for name in self.teachers]

    def _encode_student(self, row: dict[str, Any]) -> dict[str, Any]:
        messages = conversation_of(row)
        return self._encode_text(row) if messages is None else self._encode_conversation(row, messages)

    def _teacher_prompt(self, row: dict[str, Any], encoded: dict[str, Any]) -> list[int]:
        if self.train_on == "all_turns":  # also where it is null, since the teacher's text is joined anew for all rows
            raise DataError("`teacher_prompt` stands before one answer, the last: it needs --train_on last_turn.")
        asked = row.get("teacher_prompt")
        if asked is None and self.reader is None:
            return encoded["prompt_ids"]
        prompt = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
        prompt["prompt"] = _question(row) if asked is None else asked
        reader = self.reader or self
        try:
            ids = replace(reader, max_length=None)._encode_student(prompt)["prompt_ids"]
        except TemplateProblem as error:
            raise TemplateProblem(f"as the {reader.whose} reads it: {error}") from None
        answer = max(len(encoded["input_ids"]) - len(encoded["prompt_ids"]), self.max_new_tokens)
        if self.teacher_window is not None and len(ids) + answer > self.teacher_window:
            what = "the prompt, in the teacher's tokens," if asked is None else "`teacher_prompt`"
            raise DataError(
                f"{what} has {len(ids):,} tokens, which with {answer:,} of an answer is more than the teacher's "
                f"window of {self.teacher_window:,}: shorten it, or leave the row out."
            )
        return ids

    def answer_ids(self, row: dict[str, Any], message: dict[str, Any]) -> list[int]:
        """Ids of an answer behind a row's prompt, as if the row had it, and of any length.

        Args:
            row: without an answer, its conversation as `messages`.
            message: the assistant's.

        Raises DataError if the template refuses it.
        """
        encoded = replace(self, max_length=None, train_on="last_turn")._encode_student(_answered(row, message))
        return encoded["input_ids"][len(encoded["prompt_ids"]) :]

    def ending(self) -> int:
        """The stop token with which the chat template ends an answer; without one, the tokenizer's, or the first."""
        question = {"messages": [{"role": "user", "content": "a"}]}
        try:
            last = self.answer_ids(question, {"role": "assistant", "content": "yes"})[-1]
        except DataError:  # no template, or one that takes no such conversation
            last = None
        ends = (last, self.tokenizer.eos_token_id, *self.stop_ids)
        return next(index for index in ends if index in self.stop_ids)

    def check_answer(self, row: dict[str, Any]) -> None:
        """Raises DataError, with the flags that help, if the template refuses a plain answer behind a row's prompt. `row` is
        as for `answer_ids`."""
        row = {name: value for name, value in row.items() if name != "teacher_prompt"}
        message = {"role": "assistant", "content": "yes"}
        try:
            replace(self, max_length=None, train_on="last_turn", teachers=())(_answered(row, message))
        except DataError as error:
            raise DataError(f"A text of the teacher can't be trained on: {error}") from None

    def _advice(self, row: dict[str, Any]) -> str:
        """The flags with which a row that the template refuses passes. They are tried singly and in pairs."""
        flags: dict[str, dict] = {} if self.system_as_user else {"--system_as_user": {"system_as_user": True}}
        for name, value in product(SWITCHES, (False, True)):
            if any(name in str(reader.tokenizer.chat_template) for reader in (self, self.reader) if reader):
                variables = {**(self.chat_template_kwargs or {}), name: value}
                flags[f"--chat_template_kwargs '{json.dumps(variables)}'"] = {"chat_template_kwargs": variables}
        if self.train_on == "all_turns":
            flags["--train_on last_turn"] = {"train_on": "last_turn"}
        for number in (1, 2):
            passing = [names for names in combinations(flags, number) if self._passes(row, map(flags.get, names))]
            if passing:
                return f"It passes with {', or with '.join(map(' '.join, passing))}."
        another = "another --chat_template_path" if self.reader is None else "either tokenizer another chat template"
        return f"No other flag helps: give {another}, or leave such rows out."

    def _passes(self, row: dict[str, Any], changes: Iterable[dict[str, Any]]) -> bool:
        flags = dict(ChainMap(*changes))
        try:
            replace(self, **flags, reader=self.reader and replace(self.reader, **flags))._encode(row)
        except DataError:
            return False
        return True

    def _encode_text(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, prompt = text_ids(self.tokenizer, row["prompt"]), prompt_ids(self.tokenizer, row["prompt"])
        answer = []
        if (row.get("completion") or "").strip():
            answer = self._behind(row["prompt"], ids, row["completion"])
            if not set(answer[-1:]) & set(self.stop_ids):
                answer = [*answer, self.tokenizer.eos_token_id]
        return self._pack(prompt, [], answer, lambda: int(prompt[:1] == [self.tokenizer.bos_token_id]))

    def _encode_conversation(self, row: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
        if self.tokenizer.chat_template is None:
            where = " (--chat_template_path)" if self.whose == "student" else ": save one beside it"
            raise DataError(f"a conversation, but the {self.whose}'s tokenizer has no chat template{where}.")
        messages = without_nulls(messages)
        variables = {**(self.chat_template_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
        template = Template(self.tokenizer, row.get("tools") or None, variables, self.system_as_user, self.stop_ids)
        history = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        prompt_text = template.render(history, True)
        answer_text = template.answer(messages, prompt_text) if is_answer(messages[-1]) else ""
        earlier = self._earlier_answers(history, prompt_text, template) if self.train_on == "all_turns" else []
        if row.get("messages") is not None and row.get("prompt") is not None:
            is_text = isinstance(row["prompt"], str)
            row_prompt = row["prompt"] if is_text else template.render(without_nulls(row["prompt"]), True)
            self._check_prompt(row_prompt, prompt_text, is_text)
            prompt_text = row_prompt  # it may be templated elsewhere, with another date in its system prompt, say
        prompt = text_ids(self.tokenizer, prompt_text)
        scored = token_spans(self.tokenizer, prompt_text, prompt, earlier) if earlier else []
        answer = self._behind(prompt_text, prompt, answer_text) if answer_text else []
        return self._pack(prompt, scored, answer, lambda: self._head_length(history, prompt, template))

    def _behind(self, text: str, ids: list[int], answer: str) -> list[int]:
        """Ids of an answer behind a prompt's text and its ids."""
        if self.apart:
            return continuing_ids(self.tokenizer, answer)
        return continuation(self.tokenizer, text, ids, answer)

    def _check_prompt(self, row_prompt: str, templated: str, is_text: bool) -> None:
        """Checks that a `prompt` beside `messages` asks the same: equal messages, or text with the same end."""
        if row_prompt == templated:
            return
        if not is_text or self.train_on == "all_turns" or row_prompt[-8:] != templated[-8:]:
            raise DataError(
                "`prompt` is not what the template makes of `messages` without the last answer: "
                f"{difference(row_prompt, templated)} Remove the `prompt` column or make the two agree."
            )

    def _earlier_answers(self, history, prompt_text: str, template: Template) -> list[tuple[int, int]]:
        """The spans of the answers in the prompt's text, each with its stop token."""
        spans = []
        for position, message in enumerate(history):
            if not is_answer(message):
                continue
            before = template.render(history[:position], True)
            whole = before + template.answer(history[: position + 1], before)
            if not prompt_text.startswith(whole):
                raise TemplateProblem(
                    f"message {position}: the template writes this answer otherwise once more turns follow, so it can't "
                    f"be scored: {difference(whole, prompt_text)}"
                )
            spans.append((len(before), len(whole)))
        return spans

    def _head_length(self, history, prompt: list[int], template: Template) -> int:
        """How many tokens come before the first question: BOS and the system prompt, or the template's default one."""
        system = history[:1] if history[0]["role"] == "system" else []
        texts = [template.render([*system, {"role": "user", "content": text}], True) for text in ("a", "b")]
        first, second = (text_ids(self.tokenizer, text) for text in texts)
        return min(common_prefix(first, second), common_prefix(first, prompt))

    def _pack(
        self, prompt: list[int], scored: list[tuple[int, int]], answer: list[int], head: Callable[[], int]
    ) -> dict[str, Any]:
        """Joins prompt and answer, and cuts both to the limits: a long prompt keeps its first `head()` tokens and
        loses those after them. `scored` are spans of the prompt's tokens."""
        labels = [IGNORE] * len(prompt)
        for start, end in scored:
            labels[start:end] = prompt[start:end]
        prompt_cut = answer_cut = False
        if self.max_length is not None:
            most = self.max_length - self.max_new_tokens
            excess = len(prompt) - most
            if prompt_cut := excess > 0:
                keep = min(head(), most // 2)  # a long head may not fill it
                prompt, labels = (part[:keep] + part[keep + excess :] for part in (prompt, labels))
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


def never_stops(encoded: Iterable[dict[str, Any]], stop_ids: list[int]) -> str | None:
    """A warning if none of the first complete answers ends with a stop token; None if one does, or there are none."""
    answers = (row for row in islice(encoded, 32) if len(row["input_ids"]) > len(row["prompt_ids"]))
    last = [row["input_ids"][-1] for row in answers if not row["answer_cut"]]
    if not last or set(last) & set(stop_ids):
        return None
    return (
        "the chat template closes no answer, so nothing in the dataset teaches the student to stop: give one that "
        "does by --chat_template_path, or let models write the text (--lmbda 1, or --seq_kd True)"
    )


def _answered(row: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    """A row without an answer, with one."""
    asked = conversation_of(row)
    return row | ({"completion": message["content"]} if asked is None else {"messages": [*asked, message]})


def _question(row: dict[str, Any]) -> str | list[dict[str, Any]]:
    """What a row asks: text, or the messages before its answer."""
    messages = conversation_of(row)
    if messages is None:
        return row["prompt"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _encoded_and_kept(encoder: RowEncoder, row: dict[str, Any], index: int) -> dict[str, Any]:
    return encoder(row, index) | {"row": json.dumps(dict(row), ensure_ascii=False, default=str)}


def without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Removes null fields: Arrow gives every message the keys of all others, and a template would see them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def encode_dataset(
    data: Dataset | IterableDataset,
    encoder: RowEncoder,
    processes: int | None = None,
    keep_rows: bool = False,
    source: str | None = None,
) -> Dataset | IterableDataset:
    """Tokenizes a dataset, in one process or several; one that has `prompt_ids` already is returned unchanged.

    With `keep_rows`, a column `row` holds each row as JSON, which task metrics compare answers with. Errors name `source`,
    a file or a dataset.
    """
    columns = data.column_names or list(next(iter(data), {}))  # a stream that was mapped does not know its columns
    if "prompt_ids" in columns:
        return data
    encoder = replace(encoder, source=source)
    options = {} if isinstance(data, IterableDataset) else {"num_proc": processes, "desc": "Tokenizing"}
    encode = partial(_encoded_and_kept, encoder) if keep_rows else encoder
    return data.map(encode, with_indices=True, remove_columns=columns, **options)


def encode_kept(
    data: Dataset, encoder: RowEncoder, rewritten: Callable[[list[int]], list[int]] | None = None
) -> Dataset:
    """Encodes rows that a teacher cache kept as JSON, in `row`, beside the teacher's own tokens of them, in `labels`.

    Beside the columns of an encoded row the result has `teacher_answer_ids`, the teacher's scored tokens.

    Args:
        encoder: with the `reader` of the teacher's prompts.
        rewritten: from the teacher's tokens of an answer to the student's, where the teacher wrote it; None takes the row's.
    """
    data = data.select_columns(["row", "labels"])
    encode = partial(_encoded_kept, encoder, rewritten)
    return data.map(encode, with_indices=True, remove_columns=data.column_names, desc="Tokenizing")


def _encoded_kept(encoder: RowEncoder, rewritten: Callable | None, row: dict[str, Any], index: int) -> dict[str, Any]:
    told = [label for label in row["labels"] if label != IGNORE]
    encoded = encoder(json.loads(row["row"]), index)
    if rewritten is not None:
        prompt, answer = encoded["prompt_ids"], rewritten(told)[: encoder.max_new_tokens]
        cut = not set(answer) & set(encoder.stop_ids)
        labels = [IGNORE] * len(prompt) + answer
        encoded |= {"input_ids": prompt + answer, "labels": labels, "answer_cut": cut}
    return encoded | {"teacher_answer_ids": told}


def rows_fingerprint(encoded: Dataset, digest: Any = None) -> str:
    """A hash of the tokens of encoded rows and of which are scored. `digest`: as of hashlib, SHA-256 by default."""
    digest = hashlib.sha256() if digest is None else digest
    names = "prompt_ids", "input_ids", "labels", "teacher_prompt_ids", "teacher_answer_ids", "teacher_shares"
    columns = [name for name in names if name in encoded.features]
    for batch in encoded.select_columns(columns).with_format("arrow").iter(1000):
        for column in batch.columns:
            lists = column.combine_chunks()
            for part in (lists.value_lengths().to_numpy(), lists.flatten().to_numpy()):
                digest.update(np.ascontiguousarray(part, np.float64 if part.dtype.kind == "f" else np.int64))
    return digest.hexdigest()


def scored_tokens(encoded: Dataset) -> int:
    """How many tokens of encoded rows are scored."""
    parts = encoded.select_columns(["labels"]).with_format("arrow").iter(1000)
    return sum(int((part.column(0).combine_chunks().flatten().to_numpy() != IGNORE).sum()) for part in parts)
