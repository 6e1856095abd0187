"""A teacher in vLLM or SGLang, which tells for each token of a prompt the likeliest tokens' log-probabilities there.

What it tells is what a cache of the top k has, a `gkd.losses.topk.TopK`: near the whole divergence at β = 0 alone. A row is
a request: the server itself makes batches of what it is asked at once.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import httpx
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gkd.config.teacher import TeacherArguments
from gkd.data.batch import Batch, padded_rows, unpadded_rows
from gkd.generation.sampling import sampling_seed
from gkd.io.errors import RunStopped
from gkd.io.terminal import visible
from gkd.losses.targets import Target
from gkd.losses.topk import TopK
from gkd.models.pairing import Side
from gkd.models.tokenizers import PROBES, VocabularyMismatch
from gkd.teachers.servers import wire
from gkd.teachers.servers.client import (
    CONNECT,
    OVERHEAD,
    Failed,
    Promised,
    ServedTeacher,
    Servers,
    Wrong,
    may_pass,
    parts_of,
    said_in,
)
from gkd.teachers.servers.remote import TOKEN

_FLAG = "--teacher_logprobs_url"
_MOST = 1e-3  # by which a mass may exceed 1, and a log-probability 0: what half precision rounds
_LEAST = -1e4  # in place of -inf
_BEYOND = 0.05  # of the probability may be on ids that the student has not
_DECODED = 1000  # ids whose text is compared at a time
_BYTES = 512  # of JSON for a token with its log-probability, more than there are
# What reading an answer raises, where it is not what was asked for.
_UNLIKE = (ValueError, LookupError, TypeError, AttributeError, OverflowError)

# A token's likeliest tokens by id, with their log-probabilities, and the log-probability of the token itself.
Position = tuple[dict[int, float], float]


class LogprobsServers(Servers):
    """Servers with OpenAI's API, and vLLM's or SGLang's beside it."""

    started_by = "vllm serve or SGLang"

    def _named(self, weights: str) -> str:
        return f"model {visible(weights)[:80]}"

    def _once(
        self, server: Any, path: str, body: bytes | None, limit: int, read: Callable, seconds: float, *more: Any
    ):
        """Asks for the model first, and again when a server was away: SGLang's answers do not name it."""
        if self.weights is not None and not server.compared:
            weights = super()._once(server, "/v1/models", None, OVERHEAD, _about, min(CONNECT, seconds))["weights"]
            if weights != self.weights:
                raise self._differ(server.url, weights, self.weights, "the start of this run")
            server.compared = True
        try:
            return super()._once(server, path, body, limit, read, seconds, *more)
        except Failed:
            server.compared = False
            raise

    def _headers(self, seconds: float) -> dict[str, str]:
        return {"content-type": "application/json"}

    def _check(self, server: Any, response: httpx.Response, until: float) -> None:
        """Raises for an answer that is an error."""
        status = response.status_code
        if status == 200:
            return
        said = said_in(b"".join(parts_of(response, OVERHEAD, until)), self.token)
        why = f"HTTP {status}{said and ': '}{said}"
        if may_pass(status):
            raise Failed(why)
        hint = ""
        if status in (401, 403):
            hint = f" Its key comes from {TOKEN}."
        elif response.is_redirect:
            hint = " Give the address behind the redirection."
        elif status in (404, 405):
            hint = f" It needs vLLM's or SGLang's own paths, such as {response.request.url.path}."
        elif "max allowed" in said:  # as vLLM words it
            hint = " Lower --teacher_top_k, or start it with more: vllm serve --max-logprobs N."
        raise RunStopped(f"{server.url} refuses ({why}).{hint}")

    def post(self, path: str, body: dict[str, Any], limit: int, read: Callable[[dict[str, Any]], Any]) -> Future:
        """`read` of the JSON that a server answers. What `read` can't read is an error at once: it came whole."""

        def parse(content: bytes) -> Any:
            answer = json.loads(content)
            try:
                return read(answer)
            except _UNLIKE as error:
                raise Wrong(
                    f"{path} gives no such answer as vLLM or SGLang ({type(error).__name__}: {error})."
                ) from None

        return self.later(path, json.dumps(body).encode(), limit, parse)


class Vllm:
    """What is asked of vLLM (`vllm serve`), and how it answers."""

    decoded = "prompt"  # what /detokenize calls the text

    def __init__(self, model: str):
        self.model = model

    def scoring(self, tokens: list[int], k: int, start: int) -> tuple[str, dict[str, Any]]:
        settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
        return "/v1/completions", {"model": self.model, "prompt": tokens, **settings}

    def positions(self, answer: dict[str, Any], tokens: list[int], k: int, start: int) -> Iterator[Position]:
        """Of each token behind `start`."""
        listed = answer["choices"][0]["prompt_logprobs"]
        if not isinstance(listed, list) or len(listed) != len(tokens):
            raise Wrong(f"it tells log-probabilities of {_length(listed)} positions, and the row has {len(tokens)}")
        for token, entry in zip(tokens[start + 1 :], listed[start + 1 :], strict=True):
            told = {int(i): about["logprob"] for i, about in (entry or {}).items()}
            if token not in told:
                raise Wrong(f"it does not tell the log-probability of token {token}, which stands there")
            following = told[token]
            if len(told) == k + 1:  # it is not among the likeliest
                del told[token]
            yield told, following

    def writing(self, prompt: list[int], config: GenerationConfig, seed: int) -> tuple[str, dict[str, Any]]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": config.max_new_tokens, "seed": seed}
        body |= {"return_token_ids": True, "stop_token_ids": config.eos_token_id, "top_k": 0, **_sampling(config)}
        return "/v1/completions", body

    def written(self, answer: dict[str, Any]) -> list[int]:
        """The ids, with the one that ended it."""
        ids = answer["choices"][0].get("token_ids")
        if ids is None:
            raise Wrong(
                "it tells no ids of what it writes: update vLLM, or add --teacher_text_url, the same address, for the "
                "text of --seq_kd."
            )
        return ids


class SGLang:
    """What is asked of SGLang, and how it answers."""

    decoded = "text"

    def __init__(self, model: str):
        self.model = model

    def scoring(self, tokens: list[int], k: int, start: int) -> tuple[str, dict[str, Any]]:
        settings = {"sampling_params": {"max_new_tokens": 1, "temperature": 0}, "return_logprob": True}
        return "/generate", {"input_ids": tokens, **settings, "logprob_start_len": start, "top_logprobs_num": k}

    def positions(self, answer: dict[str, Any], tokens: list[int], k: int, start: int) -> Iterator[Position]:
        """Of each token behind `start`, the first that it tells of: nothing is told of that one."""
        about = answer["meta_info"]
        tops, own = about["input_top_logprobs"], about["input_token_logprobs"]
        expected = tokens[start + 1 :]
        if not len(tops) == len(own) == len(expected) + 1:
            raise Wrong(f"it tells log-probabilities of {len(tops)} positions, and was asked for {len(expected) + 1}")
        for token, top, (following, told, *_) in zip(expected, tops[1:], own[1:], strict=True):
            if told not in (token, 0):  # it names the last id of the vocabulary 0
                raise Wrong(f"it tells of token {told} where token {token} stands")
            yield {int(i): value for value, i, *_ in top or ()}, following

    def writing(self, prompt: list[int], config: GenerationConfig, seed: int) -> tuple[str, dict[str, Any]]:
        sampling = {"max_new_tokens": config.max_new_tokens, "stop_token_ids": config.eos_token_id, "top_k": -1}
        return "/generate", {"input_ids": prompt, "sampling_params": sampling | _sampling(config)}

    def written(self, answer: dict[str, Any]) -> list[int]:
        """The ids, with the one that ended it."""
        return answer["output_ids"]


def _sampling(config: GenerationConfig) -> dict[str, Any]:
    """From the whole distribution, whatever the server's defaults are."""
    temperature = config.temperature if config.do_sample else 0.0
    plain = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return {"temperature": temperature, "top_p": 1.0, "skip_special_tokens": False, **plain}


def _length(listed: Any) -> int:
    return len(listed) if isinstance(listed, list) else 0


def _within(told: dict[int, float], following: float, vocab_size: int) -> tuple[Position, int]:
    """Without ids from `vocab_size` on, of which models of one family have different numbers and no tokens; how many are left.

    The others share their probability, as where gkd runs the teacher itself; ids of none keep the number of ids. Raises Wrong if
    they have more than `_BEYOND`, or nothing is left.
    """
    if max(told) < vocab_size:
        return (told, following), len(told)
    beyond = [i for i in told if i >= vocab_size]
    lost = sum(math.exp(told[i]) for i in beyond)
    if not lost <= _BEYOND or len(beyond) == len(told) or len(told) > vocab_size:
        raise Wrong(f"it tells of id {max(beyond)}, and the student has {vocab_size}: their vocabularies differ")
    rest = math.log1p(-lost)
    unnamed = itertools.islice((i for i in range(vocab_size) if i not in told), len(beyond))
    kept = {i: value - rest for i, value in told.items() if i < vocab_size}
    return (kept | dict.fromkeys(unnamed, _LEAST), following - rest), len(kept)


def top_k_of(positions: list[Position], k: int, vocab_size: int) -> TopK:
    """What a server tells of n positions, in float32. Raises Wrong for what is no distribution over these ids."""
    for told, _ in positions:
        if len(told) != k:
            raise Wrong(f"it tells {len(told)} of a position's likeliest tokens, and was asked for {k}")
        if (least := min(told)) < 0:
            raise Wrong(f"it tells of id {least}")
    within = [_within(*position, vocab_size) for position in positions]
    positions, named = [position for position, _ in within], torch.tensor([left for _, left in within]).long()
    ids = torch.tensor([list(told) for told, _ in positions]).view(-1, k)
    values = [[*told.values(), following] for told, following in positions]
    if not all(type(value) in (int, float) for row in values for value in row):  # null is how JSON has NaN
        raise Wrong("it tells a log-probability that is no number")
    log_probs = torch.tensor(values, dtype=torch.float64).view(-1, k + 1)
    if bool(log_probs.isnan().any()):
        raise Wrong("it tells a log-probability that is no number")
    if bool((log_probs > _MOST).any()):
        raise Wrong(
            f"it tells a log-probability of {float(log_probs.max()):g}, above 0: are they logits (--logprobs-mode)?"
        )
    log_probs = log_probs.clamp(min=_LEAST, max=0)  # 0 · -inf would be no number
    mass = log_probs[:, :k].exp().sum(1)
    if bool((mass > 1 + _MOST).any()):
        raise Wrong(f"the probabilities that it tells of a position sum to {float(mass.max()):.4f}")
    return TopK.of_likeliest(ids, log_probs[:, :k], vocab_size, log_probs[:, k].float(), named)


def _joined(rows: list[Future], k: int) -> TopK:
    """Of the rows' positions, in their order."""
    return TopK.joined([row.result() for row in rows] or [top_k_of([], k, 0)])


class LogprobsTeacher(ServedTeacher):
    """The teacher that `--teacher_logprobs_url` names.

    Raises RunStopped if no server answers, one refuses a request or answers nonsense, or they have different models.
    """

    writes = True
    coarse = True
    _tokenizer: PreTrainedTokenizerBase | None = None
    _size = 0

    def __init__(self, args: TeacherArguments):
        self.k, token = args.teacher_top_k, wire.check_token(TOKEN, os.environ.get(TOKEN, ""))
        urls = [url.removesuffix("/v1") for url in args.teacher_urls]
        self._servers = LogprobsServers(urls, args.teacher_timeout, token, at_a_time=args.teacher_logprobs_requests)
        abouts = self._servers.identities(_about, "/v1/models")
        about, windows = abouts[0], (about["window"] for about in abouts)
        self._model, self._window = about["weights"], min(filter(None, windows), default=None)
        self._api = (SGLang if about["owner"] == "sglang" else Vllm)(self._model)
        self.name = f"{visible(self._model)[:80]} (its {self.k} likeliest tokens)"
        self.fingerprints = {"teacher_logprobs_url": f"model {self._model}"}

    def side(self, student: Side, args: Any) -> Side:
        """Raises VocabularyMismatch if its ids mean other tokens, RunStopped if it does not tell so many log-probabilities."""
        if student.tokenizer is not self._tokenizer:
            self._tokenizer, self._size = student.tokenizer, student.size
            self._compare(student.tokenizer)
            ids = student.tokenizer(PROBES[0], add_special_tokens=False)["input_ids"]
            self._score(ids, list(range(len(ids) - 1))).result()
        # A token is written behind each row that it scores.
        window = None if self._window is None else self._window - 1
        return Side(student.tokenizer, student.size, (), window=window)

    def _compare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compares how texts are split, and the text of each id, without white space: versions of libraries treat it in
        different ways."""

        def ask(path: str, limit: int, name: str, **body: Any) -> Any:
            body = {"model": self._model, **body}
            return self._servers.post(path, body, limit, lambda answer: answer[name])

        splits = [ask("/tokenize", OVERHEAD, "tokens", prompt=text, add_special_tokens=False) for text in PROBES]
        for text, answer in zip(PROBES, splits, strict=True):
            if (own := tokenizer(text, add_special_tokens=False)["input_ids"]) != (its := answer.result()):
                raise VocabularyMismatch(
                    f"{_FLAG}: the tokenizers split text differently: {text!r} becomes {own[:8]}... for the student and "
                    f"{visible(str(its[:8]))}... for the teacher. GKD needs one vocabulary: take a student of the "
                    "teacher's family."
                )

        def decode(ids: list[int]) -> Future:
            limit = _BYTES * len(ids) + OVERHEAD
            return ask("/detokenize", limit, self._api.decoded, tokens=ids, skip_special_tokens=False)

        def differ(ids: list[int], its: str) -> bool:
            return "".join(tokenizer.decode(ids).split()) != "".join(its.split())

        ids = sorted(tokenizer.get_vocab().values())
        parts = [ids[start : start + _DECODED] for start in range(0, len(ids), _DECODED)]
        for part, answer in [(part, decode(part)) for part in parts]:
            if not differ(part, answer.result()):
                continue
            while len(part) > 1:
                half = part[: len(part) // 2]
                part = half if differ(half, decode(half).result()) else part[len(half) :]
            raise VocabularyMismatch(
                f"{_FLAG}: the tokenizers differ: id {part[0]} is {tokenizer.decode(part)!r} for the student and "
                f"{visible(decode(part).result())[:40]!r} for the teacher. GKD needs one vocabulary: take a student of the "
                "teacher's family."
            )

    # ------------------------------------------------------------------ log-probabilities

    def _score(self, tokens: list[int], scored: list[int]) -> Future:
        """Asks for the TopK at the positions `scored` of a row, each of which says what comes behind it."""
        tokens = tokens[: scored[-1] + 2]
        start, k, size, tokenizer = scored[0], self.k, self._size, self._tokenizer
        path, body = self._api.scoring(tokens, k, start)

        def read(answer: dict[str, Any]) -> TopK:
            try:
                told = list(self._api.positions(answer, tokens, k, start))
                return top_k_of([told[position - start] for position in scored], k, size)
            except (Wrong, *_UNLIKE) as error:
                why = str(error) if isinstance(error, Wrong) else "its answer has no log-probabilities of the prompt"
                raise Wrong(
                    f"{why.rstrip('.')}. The row begins with {visible(tokenizer.decode(tokens))[:60]!r}."
                ) from None

        # vLLM tells of each token of the prompt, whatever is scored.
        return self._servers.post(path, body, len(tokens) * (k + 2) * _BYTES + OVERHEAD, read)

    def _ask_for(self, batch: Batch) -> Promised:
        ids, _, scored = (None if tensor is None else tensor.cpu() for tensor in batch.teacher_inputs)
        rows, positions = scored // ids.shape[1], scored % ids.shape[1]
        asked = [self._score(ids[row].tolist(), positions[rows == row].tolist()) for row in rows.unique().tolist()]
        return Promised(partial(_joined, asked, self.k))

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        return nullcontext(self._output(batch))

    # ------------------------------------------------------------------ text

    def write(self, prompts, mask, config, seed) -> tuple[torch.Tensor, torch.Tensor]:
        def read(answer: dict[str, Any]) -> list[int]:
            ids = self._api.written(answer)
            if not all(type(i) is int and 0 <= i < self._size for i in ids):
                raise Wrong(f"it writes ids that the student, with {self._size}, has not")
            if not 0 < len(ids) <= config.max_new_tokens:
                raise Wrong(f"it writes {len(ids)} tokens, and was asked for {config.max_new_tokens} at most")
            return ids

        asked = []
        for row, prompt in enumerate(unpadded_rows(prompts, mask)):
            path, body = self._api.writing(prompt, config, sampling_seed(seed, row, 0))
            limit = _BYTES * (len(prompt) + config.max_new_tokens) + OVERHEAD
            asked.append(self._servers.post(path, body, limit, read))
        ids, kept = padded_rows([answer.result() for answer in asked], config.pad_token_id)
        return ids.to(prompts.device), kept.to(prompts.device)

    def identity(self, config: GenerationConfig) -> bytes:
        """A fingerprint of the model's whole name, k and the sampling, wherever the server is."""
        _, body = self._api.writing([], config, 0)
        return hashlib.sha256(f"{self._model} {self.k} {json.dumps(body, sort_keys=True)}".encode()).digest()


def _about(content: bytes) -> dict[str, Any]:
    """The first model that /v1/models lists which is no adapter."""
    try:
        listed = json.loads(content)["data"]
        about = next((model for model in listed if not model.get("parent")), listed[0])
        name, window = about["id"], about.get("max_model_len")
        if not isinstance(name, str) or not isinstance(window, int | None):
            raise TypeError
    except (*_UNLIKE, RecursionError):
        raise Wrong("it shows no list of models, as vLLM and SGLang do at /v1/models. Is the address right?") from None
    return {"weights": name, "window": window, "owner": about.get("owned_by")}
