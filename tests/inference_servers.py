"""Servers that answer as vLLM and SGLang do, over a tiny model; teachers behind them, and what a model here says."""

import json
import threading
import time
from collections import deque
from functools import partial

import pytest
import torch
from fastapi import FastAPI, Request, Response
from tiny import make_model, make_tokenizer

from gkd.config.teacher import TeacherArguments
from gkd.data.batch import Batch, scored_positions
from gkd.io.errors import RunStopped
from gkd.losses.topk import TopK
from gkd.models.pairing import Side
from gkd.teachers import describe

KEY = "key-of-the-tests"
K = 12


class InferenceServer:
    """Attributes:
    asked: paths and bodies of all requests for text or log-probabilities, in order.
    faults: of the next of these requests, each a Response in place of the answer, or a function that spoils it.
    most: how many of them were there at once.
    gate: they wait for it.
    key: if set, that each request must have.
    """

    def __init__(self, model=None, tokenizer=None, name="tiny", most_logprobs=20):
        self.model = (model or make_model(1, hidden_size=48)).eval()
        self.tokenizer = tokenizer or make_tokenizer()
        self.name, self.most_logprobs, self.owner, self.key = name, most_logprobs, "vllm", None
        self.window = 512
        self.asked, self.faults, self.gate = [], deque(), threading.Event()
        self.most = self._now = 0
        self.gate.set()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/tokenize")(self.tokenize)
        self.app.post("/detokenize")(self.detokenize)
        self.app.post("/v1/chat/completions")(self.chat)
        for path in ("/v1/completions", "/generate"):
            self.app.post(path)(partial(self.answer, path))

    async def models(self, request: Request):
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return Response(json.dumps({"error": f"Unauthorized: {request.headers.get('authorization')}"}), 401)
        card = {"id": self.name, "object": "model", "owned_by": self.owner, "max_model_len": self.window}
        adapter = card | {"id": "adapter", "parent": self.name}
        return {"object": "list", "data": [adapter, card]}

    async def tokenize(self, body: dict):
        assert body["add_special_tokens"] is False
        return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}

    async def detokenize(self, body: dict):
        return {"prompt" if self.owner == "vllm" else "text": self.tokenizer.decode(body["tokens"])}

    async def chat(self, body: dict):
        return {"choices": [{"message": {"content": "chat"}, "finish_reason": "stop"}]}

    def answer(self, path: str, body: dict):  # in a thread, so that requests overlap
        self.asked.append((path, body))
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            assert self.gate.wait(60)
            fault = self.faults.popleft() if self.faults else None
            if isinstance(fault, Response):
                return fault
            answer = self.vllm(body) if path == "/v1/completions" else self.sglang(body)
            return answer if fault is None or isinstance(answer, Response) else fault(answer)
        finally:
            self._now -= 1

    @torch.no_grad()
    def log_probs(self, ids):
        """(tokens, V): what stands at a position says what comes behind it."""
        return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    @torch.no_grad()
    def write(self, ids, new, temperature, stops, seed=0):
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        options = {"max_new_tokens": new, "eos_token_id": stops, "pad_token_id": 0, **sampling}
        written = self.model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        return written, "stop" if written[-1] in stops else "length"

    def vllm(self, body):
        ids, k = body["prompt"], body.get("prompt_logprobs")
        assert body["model"] == self.name
        if k is None:
            stops = body["stop_token_ids"]
            written, reason = self.write(ids, body["max_tokens"], body["temperature"], stops, body["seed"] % 2**32)
            return {"choices": [{"text": "", "finish_reason": reason, "token_ids": written}]}
        if k > self.most_logprobs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most_logprobs}"
            return Response(json.dumps({"error": {"message": said, "code": 400}}), 400)
        listed = [None]
        for token, row in zip(ids[1:], self.log_probs(ids), strict=False):
            # The token itself first, and ranks that count it, as vLLM has them.
            likeliest = dict.fromkeys([token, *row.topk(k).indices.tolist()])
            listed.append(
                {
                    str(i): {"logprob": float(row[i]), "rank": int((row >= row[i]).sum()), "decoded_token": "?"}
                    for i in likeliest
                }
            )
        return {"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": listed}]}

    def sglang(self, body):
        ids, sampling = body["input_ids"], body["sampling_params"]
        if not body.get("return_logprob"):
            stops = sampling["stop_token_ids"]
            written, reason = self.write(ids, sampling["max_new_tokens"], sampling["temperature"], stops)
            return {"text": "", "output_ids": written, "meta_info": {"finish_reason": {"type": reason}}}
        start, k = body["logprob_start_len"], body["top_logprobs_num"]
        rows = self.log_probs(ids)[start:-1]
        last = self.model.config.vocab_size - 1  # SGLang names it 0
        own = [[float(row[i]), i if i < last else 0, None] for i, row in zip(ids[start + 1 :], rows, strict=True)]
        tops = [[[float(row[i]), i, None] for i in row.topk(k).indices.tolist()] for row in rows]
        about = {"input_token_logprobs": [[None, ids[start], None], *own], "input_top_logprobs": [None, *tops]}
        return {"text": "x", "output_ids": [7], "meta_info": about | {"finish_reason": {"type": "length"}}}


def teacher_of(*urls, k=K, timeout=10.0, requests=32):
    flags = {"teacher_timeout": timeout, "teacher_top_k": k, "teacher_logprobs_requests": requests}
    return describe(TeacherArguments(teacher_logprobs_url=",".join(urls), **flags))


def side_of(tokenizer=None):
    return Side.of_model(make_model(0), tokenizer or make_tokenizer())


def ready(*urls, **flags):
    """A teacher that has compared its vocabulary with the student's."""
    teacher = teacher_of(*urls, **flags)
    assert teacher.side(side_of(), None).window == 511  # a token is written behind each row
    return teacher


def batch_of(seed=0):
    """Rows of 9, 20, no and two parts of scored tokens."""
    ids = torch.randint(6, 262, (4, 24), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :15] = labels[1, :4] = labels[2] = labels[3, 6:11] = -100
    return Batch(ids, labels, scored_positions(labels))


def top_k_here(server, batch, k=K):
    ids, _, scored = batch.teacher_inputs
    with torch.no_grad():
        logits = server.model(ids).logits.flatten(0, 1)[scored]
    following = logits.log_softmax(-1).gather(1, ids.flatten()[scored + 1][:, None])[:, 0]
    return TopK(*TopK.of_logits(logits, k).tensors, following)


def same(one, other):
    assert torch.equal(one.ids, other.ids)
    for a, b in ((one.log_probs, other.log_probs), (one.tail, other.tail), (one.following, other.following)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def target_of(teacher, batch):
    with teacher.target(batch) as target:
        return target


def stopped(call, most=8.0):
    """The line with which a run stops, in time."""
    start = time.monotonic()
    with pytest.raises(RunStopped) as stop:
        call()
    assert time.monotonic() - start < most
    assert len(str(stop.value).splitlines()) == 1
    return str(stop.value)
