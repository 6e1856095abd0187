"""A teacher in vLLM or SGLang: the top k that a model here has, the same training, and what answers may get wrong."""

import copy
import json
import math
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from commands import ANSWERS
from fastapi import FastAPI, Response
from inference_servers import (
    KEY,
    InferenceServer,
    K,
    batch_of,
    ready,
    same,
    side_of,
    stopped,
    target_of,
    teacher_of,
    top_k_here,
)
from serving import Proxy, running
from tiny import make_model, make_tokenizer
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from trainers import TWELVE_ROWS, losses, tiny_trainer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from gkd.cli import cache, diagnose, evaluate, train
from gkd.config.caching import CacheArguments
from gkd.config.evaluation import EvalArguments
from gkd.config.teacher import PlacementArguments
from gkd.config.training import GKDArguments
from gkd.data.batch import Batch, scored_positions
from gkd.generation.generator import CompletionGenerator, complete
from gkd.losses.objective import Objective, divergence_of
from gkd.losses.targets import HiddenTarget
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead, last_hidden_states
from gkd.models.pairing import Side
from gkd.models.tokenizers import VocabularyMismatch
from gkd.runs.record import read_record
from gkd.runs.results import read_results
from gkd.teachers.base import Teacher
from gkd.teachers.cache import TeacherCache
from gkd.teachers.servers import client
from gkd.teachers.servers.client import Wrong
from gkd.teachers.servers.logprobs import top_k_of


@pytest.fixture(scope="module")
def whole():
    server = InferenceServer()
    with running(server.app) as url:
        server.url = f"{url}/v1"
        yield server


@pytest.fixture(params=["vllm", "sglang"])
def server(whole, request):
    return fresh(whole, request.param)


@pytest.fixture
def vllm(whole):
    return fresh(whole, "vllm")


def fresh(server, owner):
    server.owner, server.most, server.most_logprobs, server.key = owner, 0, 20, None
    server.asked.clear()
    server.faults.clear()
    server.gate.set()
    return server


class TopKHere(Teacher):
    """The same target of a model here."""

    writes = coarse = True

    def __init__(self, server):
        self.server = server

    def side(self, student, args):
        return Side(student.tokenizer, student.size, ())

    def target(self, batch):
        return nullcontext(top_k_here(self.server, batch))

    def write(self, prompts, mask, config, seed):
        return complete(self.server.model, Accelerator(), CompletionGenerator(), prompts, mask, config, seed)


# ---------------------------------------------------------------------- the same as a model here


def test_its_target_is_the_top_k_of_a_model_here(server):
    teacher, batch = ready(server.url), batch_of()
    expected = top_k_here(server, batch)
    same(target_of(teacher, batch), expected)
    assert len(expected) == len(batch.scored) > 40
    teacher.prepare([batch, batch_of(1)])  # pieces of a batch on its way
    pieces = list(batch.pieces(2))
    for piece, part in zip(pieces, (slice(0, len(pieces[0].scored)), slice(len(pieces[0].scored), None)), strict=True):
        same(target_of(teacher, piece), expected[part])
    empty = Batch(batch.input_ids[2:3], batch.labels[2:3], scored_positions(batch.labels[2:3]))
    assert len(target_of(teacher, empty)) == 0


PROMPTED = [
    row | {"teacher_prompt": [{"role": "system", "content": "Be brief. " * n}, row["messages"][0]]}
    for n, row in enumerate(TWELVE_ROWS, 1)
]


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_training_has_the_losses_of_the_top_k_here(tmp_path, server, lmbda, beta):
    """On the dataset's text and the student's own, behind prompts of the teacher's own, two micro-batches a step."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "max_length": 100}
    sizes |= {"learning_rate": 1e-2, "lmbda": lmbda, "beta": beta}
    here = tiny_trainer(tmp_path / "here", make_model(0), TopKHere(server), PROMPTED, **sizes)
    there = tiny_trainer(tmp_path / "there", make_model(0), teacher_of(server.url), PROMPTED, **sizes)
    for trainer in (here, there):
        trainer.train()
    assert len(losses(here)) == 4
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)
    assert len({round(loss, 3) for loss in losses(here)}) > 1
    prompts = [body.get("prompt") or body["input_ids"] for _, body in server.asked]
    assert any(make_tokenizer().decode(prompt).startswith("<|system|>Be brief.") for prompt in prompts)


def test_it_writes_as_a_model_here(server):
    teacher = ready(server.url)
    prompts = torch.randint(6, 262, (5, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    for new in (3, 60):  # cut by the limit, and ended
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=[1, 2, 40, 41], pad_token_id=0)
        ids, kept = teacher.write(prompts, mask, config, 5)
        expected, expected_mask = TopKHere(server).write(prompts, mask, config, 5)
        assert torch.equal(ids * kept, expected * expected_mask)
        assert torch.equal(kept, expected_mask)
    sampled = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=0.7, eos_token_id=[2], pad_token_id=0)
    assert teacher.identity(sampled) != teacher.identity(config)
    server.asked.clear()
    teacher.write(prompts, mask, sampled, 5)
    settings = [body.get("sampling_params", body) for _, body in server.asked]
    plain = {"temperature": 0.7, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert all(plain.items() <= body.items() for body in settings)
    if server.owner == "vllm":
        assert len({body["seed"] for body in settings}) == 5


def test_evaluation_has_the_figures_of_these_buckets(vllm):
    """A lower bound of KLs; agreement, the five likeliest and likelihoods are exact."""
    teacher, batch, student = ready(vllm.url, k=20), batch_of(), make_model(0).eval()
    objective, head = (
        Objective(divergence_of(GKDArguments("unused", use_cpu=True, bf16=False)), 264),
        LogitHead.of(student),
    )
    with torch.no_grad():
        hidden = last_hidden_states(student, batch.input_ids, None).flatten(0, 1)[batch.scored]
    labels = batch.labels.flatten()[batch.scored + 1]
    coarse = objective.measure(hidden, target_of(teacher, batch), labels, head)
    states = last_hidden_states(vllm.model, batch.input_ids, None).flatten(0, 1)[batch.scored].detach()
    exact = objective.measure(hidden, HiddenTarget(states, LogitHead.of(vllm.model)), labels, head)
    loss, forward, reverse, *_ = range(9)
    for row in (loss, forward, reverse):
        assert (coarse[row] <= exact[row] + 1e-4).all()
        assert coarse[row].mean() > 0.1 * exact[row].mean()
    for row in (3, 5, 6, 7, 8):  # student's entropy, agreement, top 5, both likelihoods
        torch.testing.assert_close(coarse[row], exact[row], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- requests


def test_requests_go_out_ahead_and_no_more_than_allowed(vllm):
    teacher = ready(vllm.url, requests=4)
    vllm.most = 0
    vllm.gate.clear()
    batches = [batch_of(seed) for seed in range(3)]
    teacher.prepare(batches)  # returns while nothing is answered
    until = time.monotonic() + 10
    while vllm.most < 4 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert vllm.most == 4
    vllm.gate.set()
    for batch in batches:
        same(target_of(teacher, batch), top_k_here(vllm, batch))
    assert vllm.most == 4


def test_two_servers_share_the_work_and_one_may_go(vllm):
    other = InferenceServer()
    with running(other.app) as url:
        proxy = Proxy(url)
        teacher, batch = ready(vllm.url, proxy.url), batch_of()
        vllm.asked.clear()
        other.asked.clear()
        same(target_of(teacher, batch), top_k_here(vllm, batch))
        assert len(vllm.asked) + len(other.asked) == 3
        assert other.asked
        assert vllm.asked
        proxy.mode, proxy.times, proxy.bytes_kept = "cut", 10**6, 0
        for seed in range(3):
            same(target_of(teacher, batch_of(seed)), top_k_here(vllm, batch_of(seed)))
        proxy.close()
    renamed = InferenceServer(name="another")
    with running(renamed.app) as url:
        message = stopped(lambda: teacher_of(vllm.url, url))
    assert message.startswith(
        f"{url} has another teacher (model another) than {vllm.url.removesuffix('/v1')} (model tiny)"
    )


def test_another_model_where_a_server_was_away_is_refused(server, monkeypatch):
    """SGLang's answers do not name their model, and vLLM knows no other."""
    monkeypatch.setattr(client, "_REST", 0.0)
    other = InferenceServer(make_model(2, hidden_size=48), name="another")
    other.owner = server.owner
    with running(other.app) as url:
        proxy = Proxy(url)
        proxy.mode, proxy.times, proxy.bytes_kept = "cut", 10**6, 0
        teacher = ready(server.url, proxy.url)
        proxy.mode = "forward"
        message = stopped(lambda: [target_of(teacher, batch_of(seed)) for seed in range(9)])
        proxy.close()
    assert message.startswith(
        f"{proxy.url} has another teacher (model another) than the start of this run (model tiny)"
    )
    assert not other.asked


def test_the_smallest_window_of_the_servers_counts(vllm):
    other = InferenceServer()
    other.window = 300
    with running(other.app) as url:
        assert teacher_of(vllm.url, url).side(side_of(), None).window == 299


def test_text_is_kept_by_the_whole_name_of_its_model(whole):
    server, config = fresh(whole, "sglang"), GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=[2])
    other = InferenceServer(name=f"{'/models' * 12}/a")
    with running(other.app) as url:
        identities = []
        for owner in ("sglang", "vllm"):
            for name in "ab":
                other.owner, other.name = owner, other.name[:-1] + name
                identities.append(teacher_of(url).identity(config))
    identities += [teacher_of(server.url).identity(config), teacher_of(server.url, k=3).identity(config)]
    assert len(set(identities)) == 6


def test_what_may_pass_is_asked_again(server):
    teacher, batch = ready(server.url), batch_of()
    server.faults += [Response("busy", 503), Response("slow", 429), Response('{"choices": [', 200)]
    same(target_of(teacher, batch), top_k_here(server, batch))


def test_who_is_away_stops_the_run(vllm):
    proxy = Proxy(vllm.url.removesuffix("/v1"))
    teacher = ready(proxy.url, timeout=2.0)
    proxy.mode = "stall"
    message = stopped(lambda: target_of(teacher, batch_of()))
    assert message.startswith(
        f"No server of the teacher answered in 2 seconds (--teacher_timeout): {proxy.url}: no whole"
    )
    assert "vllm serve" in message
    proxy.close()


# ---------------------------------------------------------------------- answers that are wrong


def of_vllm(change):
    """Spoils what vLLM tells of the last position: `change` gets the entry and the list."""

    def spoil(answer):
        listed = answer["choices"][0]["prompt_logprobs"]
        change(listed[-1], listed)
        return json.loads(json.dumps(answer))

    return spoil


def raw(answer):  # NaN is no JSON, but Python's and some servers' have it
    listed = answer["choices"][0]["prompt_logprobs"]
    next(iter(listed[-1].values()))["logprob"] = math.nan
    return Response(json.dumps(answer))


def set_all(value):
    def change(entry, listed):
        for about in entry.values():
            about["logprob"] = value

    return of_vllm(change)


def renamed(entry, listed):
    """Its likeliest token is one that the student has not."""
    following, *others = entry
    likeliest = max(others, key=lambda i: entry[i]["logprob"])
    entry["264"] = entry.pop(likeliest) | {"logprob": -0.7}
    assert following in entry


def no_logprobs(answer):
    del answer["choices"][0]["prompt_logprobs"]
    return answer


WRONG = {
    "a position too few": (
        of_vllm(lambda entry, listed: listed.pop()),
        "log-probabilities of 23 positions, and the row has",
    ),
    "no entry": (
        of_vllm(lambda entry, listed: listed.__setitem__(-1, None)),
        "does not tell the log-probability of token",
    ),
    "an entry too few": (of_vllm(lambda entry, listed: entry.popitem()), f"it tells {K - 1} of a position"),
    "NaN": (raw, "is no number"),
    "null": (set_all(None), "is no number"),
    "text": (set_all("-1.5"), "is no number"),
    "above 0": (set_all(3.0), "log-probability of 3, above 0: are they logits"),
    "too much": (set_all(-0.5), "sum to"),
    "a number of 400 digits": (set_all(10**400), "no log-probabilities of the prompt"),
    "another vocabulary": (of_vllm(renamed), "it tells of id 264, and the student has 264"),
    "no log-probabilities": (no_logprobs, "its answer has no log-probabilities of the prompt"),
    "no object": (lambda answer: [answer], "its answer has no log-probabilities of the prompt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_nonsense_names_the_server_and_the_row(vllm, name):
    spoil, said = WRONG[name]
    teacher, batch = ready(vllm.url), batch_of()
    vllm.faults += [spoil]
    start = time.monotonic()
    # One row alone: the first 24 tokens of which are asked about.
    row = Batch(batch.input_ids[1:2], batch.labels[1:2], scored_positions(batch.labels[1:2]))
    message = stopped(lambda: target_of(teacher, row), most=3.0)
    assert time.monotonic() - start < 3
    assert message.startswith(vllm.url.removesuffix("/v1"))
    assert said in message
    assert "The row begins with" in message
    same(target_of(teacher, row), top_k_here(vllm, row))


def test_nonsense_of_sglang(whole):
    server = fresh(whole, "sglang")
    teacher, batch = ready(server.url), batch_of()

    def spoiled(name, change):
        def spoil(answer):
            change(answer["meta_info"][name])
            return answer

        return spoil

    for spoil, said in (
        (spoiled("input_top_logprobs", lambda listed: listed.pop()), "was asked for"),
        (spoiled("input_top_logprobs", lambda listed: listed[-1].pop()), f"it tells {K - 1} of a position"),
        (
            spoiled("input_token_logprobs", lambda listed: listed[-1].__setitem__(1, 5)),
            "it tells of token 5 where token",
        ),
        (spoiled("input_token_logprobs", lambda listed: listed[-1].__setitem__(0, None)), "is no number"),
    ):
        server.faults.extend([spoil] * 3)
        message = stopped(lambda: target_of(teacher, batch), most=3.0)
        assert said in message
        server.faults.clear()
        time.sleep(0.2)  # answers of the other rows are on their way
        server.faults.clear()


def test_the_tail_of_a_sure_teacher_is_not_what_rounding_leaves():
    """Else a student's mass there costs thousands of nats at β = 1, and in an evaluation's reverse KL."""
    logits = torch.randn(
        4, 264, generator=torch.Generator().manual_seed(0)
    ).double()  # whose rounding no machine decides
    logits[:, 7] += torch.tensor([5.0, 15.0, 25.0, 60.0])
    exact = TopK.of_logits(logits, K)
    told = [
        (dict(zip(*row, strict=True)), row[1][0])
        for row in zip(exact.ids.tolist(), exact.log_probs.tolist(), strict=True)
    ]
    tail = top_k_of(told, K, 264).tail
    torch.testing.assert_close(tail[:2].double(), exact.tail[:2], rtol=1e-2, atol=0)
    assert (tail >= exact.tail - 1e-2).all()
    assert (tail <= exact.tail + 5).all()
    assert top_k_of([({0: 0.0, 1: -20.0}, 0.0)], 2, 2).tail == -math.inf  # these two are all


@pytest.mark.parametrize("named", [7, 11])
def test_ids_that_the_student_has_not_are_left_out_as_where_the_model_is_here(named):
    """Models of one family have rows of embeddings that belong to no token, and different numbers of them."""
    size, k = 100, 9
    logits = 2 * torch.randn(5, size + 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[:, size:] = torch.tensor([-30.0, 3.2, -30.0])
    exact = TopK.of_logits(logits[:, :size], k - 1)
    whole = logits.log_softmax(-1)
    told = [({i: float(row[i]) for i in row.topk(k).indices.tolist()}, float(row[named])) for row in whole]
    assert all(max(row) == size + 1 for row, _ in told)
    found = top_k_of(told, k, size)
    assert found.ids.max() < size
    assert all(len(set(row)) == k for row in found.ids.tolist())
    torch.testing.assert_close(found.following.double(), logits[:, :size].log_softmax(-1)[:, named], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.log_probs[:, : k - 1].double(), exact.log_probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.log_probs.exp().sum(1) + found.tail.exp(), torch.ones(5), rtol=0, atol=1e-6)
    assert (found.tail > -math.inf).all()
    logits[:, size + 1] = 5.0
    told = [
        ({i: float(row[i]) for i in row.topk(k).indices.tolist()}, float(row[named])) for row in logits.log_softmax(-1)
    ]
    with pytest.raises(Wrong, match="id 101, and the student has 100"):
        top_k_of(told, k, size)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_probability_of_0_is_no_nan(beta):
    known = top_k_of([({1: 0.0, 2: -math.inf, 3: -math.inf}, -math.inf)], 3, 10)
    divergence = divergence_of(GKDArguments("unused", use_cpu=True, bf16=False, beta=beta))
    values, gradient = known.statistics_and_gradient(torch.zeros(1, 10), torch.zeros(1, dtype=torch.long), divergence)
    assert all(bool(value.isfinite().all()) for value in values)
    assert bool(gradient.isfinite().all())


def test_a_mass_slightly_over_one_has_next_to_no_tail(vllm):
    def change(answer):
        entry = answer["choices"][0]["prompt_logprobs"][-1]
        for about in entry.values():
            about["logprob"] = math.log(1.0005 / len(entry))
        return answer

    teacher = ready(vllm.url)
    ids = top_k_here(vllm, batch_of()).ids[-1:].tolist()[0]
    row = torch.tensor([[*batch_of().input_ids[3].tolist()[:23], ids[0]]])  # what follows is among the likeliest
    labels = row.clone()
    labels[:, :-2] = -100
    labels[:, -1] = ids[0]
    vllm.faults += [change]
    told = target_of(teacher, Batch(row, labels, scored_positions(labels)))
    assert told.tail[-1] == pytest.approx(math.log(2**-23))
    assert told.tail[0] > -10


# ---------------------------------------------------------------------- before a training


def swapped():
    """A tokenizer of which two ids, in no text that is compared, have changed places."""
    described = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocab = described["model"]["vocab"]
    vocab["Y"], vocab["~"] = vocab["~"], vocab["Y"]
    core = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")


def test_another_vocabulary_is_refused(server):
    teacher, other = teacher_of(server.url), swapped()
    number = other.get_vocab()["~"]
    with pytest.raises(VocabularyMismatch, match=rf"id {number} is '~' for the student and 'Y' for the teacher"):
        teacher.side(side_of(other), None)
    with pytest.raises(VocabularyMismatch, match="id 262 is 'zzz' for the student"):
        teacher_of(server.url).side(side_of(make_tokenizer(extra=("zzz",))), None)
    server.tokenizer = make_tokenizer()
    try:
        server.tokenizer.backend_tokenizer.normalizer = Lowercase()
        with pytest.raises(VocabularyMismatch, match="split text differently: .The quick"):
            teacher_of(server.url).side(side_of(), None)
    finally:
        server.tokenizer = make_tokenizer()


def test_more_than_the_server_tells_is_refused(vllm):
    vllm.most_logprobs = 5
    message = stopped(lambda: ready(vllm.url))
    assert "greater than max allowed: 5" in message
    assert message.endswith("Lower --teacher_top_k, or start it with more: vllm serve --max-logprobs N.")


def page_of(text):
    app = FastAPI()
    app.get("/v1/models")(lambda: Response(text))
    return app


def test_what_is_no_such_server():
    for page in ("<html>", "[]", '{"data": []}', '{"data": [{"id": 3}]}'):
        with running(page_of(page)) as url:
            message = stopped(lambda url=url: teacher_of(f"{url}/v1"), most=3.0)
        assert message.startswith(f"{url}: it shows no list of models, as vLLM and SGLang do at /v1/models")
    with running(FastAPI()) as url:
        assert "refuses (HTTP 404: Not Found). It needs vLLM's or SGLang's own paths" in stopped(
            lambda: teacher_of(url)
        )


def test_the_key_comes_from_the_environment(vllm, monkeypatch):
    vllm.key = KEY
    monkeypatch.delenv("GKD_TEACHER_TOKEN", raising=False)
    assert "refuses (HTTP 401" in stopped(lambda: teacher_of(vllm.url))
    monkeypatch.setenv("GKD_TEACHER_TOKEN", "another-secret")
    message = stopped(lambda: teacher_of(vllm.url))
    assert "GKD_TEACHER_TOKEN" in message
    assert "another-secret" not in message
    monkeypatch.setenv("GKD_TEACHER_TOKEN", KEY)
    assert ready(vllm.url).fingerprints == {"teacher_logprobs_url": "model tiny"}


def test_no_part_of_a_key_that_a_server_repeats_is_told(vllm, monkeypatch):
    monkeypatch.setenv("GKD_TEACHER_TOKEN", KEY)
    teacher = ready(vllm.url)
    vllm.faults += [Response(json.dumps({"error": "x" * 495 + KEY}), 400)]
    message = stopped(lambda: target_of(teacher, batch_of()))
    assert "xxx" in message
    assert KEY[:3] not in message


URL = {"teacher_logprobs_url": "http://a:1/v1"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"teacher_logprobs_url": "localhost:8000"}, "no address of a server; it is like http://127.0.0.1:8000/v1"),
        ({"teacher_logprobs_url": "http://me:secret@a:1"}, "--teacher_logprobs_url holds a name or password"),
        ({"teacher_logprobs_url": "http://a:1,http://a:1/"}, "an address twice"),
        (URL | {"teacher_top_k": 0}, "--teacher_top_k must be positive"),
        (URL | {"teacher_url": "http://b:1"}, "--teacher_logprobs_url does not go with --teacher_url"),
        (
            URL | {"teacher_model_name_or_path": "x"},
            "--teacher_model_name_or_path does not go with --teacher_logprobs_url",
        ),
        (URL | {"teacher_dtype": "float32"}, r"as its own flags \(vllm serve\) have it"),
        (URL | {"teachers": ["a=x"]}, "--teachers and --teacher_logprobs_url exclude each other"),
        ({"teacher_top_k": 5}, "--teacher_top_k has no effect without --teacher_logprobs_url"),
    ],
)
def test_flags_that_do_not_go_together(flags, said):
    with pytest.raises(ValueError, match=said):
        PlacementArguments(**flags).check_teacher()


def test_what_top_k_log_probabilities_can_not_do():
    with pytest.raises(ValueError, match="--loss_temperature 2.0: --teacher_logprobs_url tells log-probabilities at"):
        GKDArguments("unused", use_cpu=True, bf16=False, loss_temperature=2.0, **URL)
    names = {"output_dir": "unused", "model_name_or_path": "s", "dataset_name": "d"}
    with pytest.raises(ValueError, match="--keep hidden needs hidden states"):
        CacheArguments(**names, keep="hidden", **URL)
    with pytest.raises(ValueError, match="--top_k 30: with --teacher_logprobs_url as many are kept"):
        CacheArguments(**names, top_k=30, **URL)
    served = CacheArguments(**names, **URL)
    assert (served.top_k, served.batch_size) == (20, 128)
    assert CacheArguments(**names, teacher_model_name_or_path="t").batch_size == 16
    assert CacheArguments(**names, top_k=40, teacher_top_k=40, **URL).top_k == 40


# ---------------------------------------------------------------------- the commands

COMMON = "--max_new_tokens 6 --max_length 80"
TRAIN = (
    "--max_steps 4 --save_steps 2 --logging_steps 1 --learning_rate 1e-2 --report_to none --use_cpu True --bf16 False"
)


def words(saved, server, out, *flags):
    names = ("--model_name_or_path", saved / "student", "--teacher_logprobs_url", server.url, "--output_dir", out)
    return [str(word) for word in (*names, "--dataset_name", ANSWERS, *COMMON.split(), *flags)]


def test_the_commands_take_it(saved, server, tmp_path, capsys):
    """Training on all three kinds of text with evaluations, `gkd evaluate`, a cache, and what a record says of it."""
    run = tmp_path / "run"
    mix = ("--lmbda", 0.5, "--seq_kd", "True", "--disable_tqdm", "True", "--eval_dataset_name", ANSWERS, "--beta", 0.5)
    train.main(words(saved, server, run, *TRAIN.split(), *mix))
    said = capsys.readouterr().out
    assert "warning: --beta 0.5 weighs what the student says outside of the teacher's likeliest tokens" in " ".join(
        said.split()
    )
    record = read_record(run)
    assert record["fingerprints"]["teacher_logprobs_url"] == "model tiny"
    with pytest.raises(ValueError, match=f"type --teacher_logprobs_url {server.url} --teacher_top_k 20 again"):
        EvalArguments(run=str(run))
    evaluate.main([str(run), "--output_dir", str(tmp_path / "evaluated"), "--teacher_logprobs_url", server.url])
    for place in (run, tmp_path / "evaluated"):
        results = read_results(place)
        assert {result["model"] for result in results} == {"before", "after", "teacher"}
    with pytest.raises(SystemExit):
        diagnose.main([str(saved / "student"), "--teacher_logprobs_url", server.url, "--dataset_name", str(ANSWERS)])
    assert "a diagnosis needs the teacher's whole distribution" in capsys.readouterr().err


def test_a_cache_holds_what_the_server_tells(saved, server, tmp_path, capsys):
    """With answers of the dataset and of the teacher; then a training without the server."""
    for name, flags in (("answers", ()), ("written", ("--seq_kd", "True"))):
        out = tmp_path / name
        cache.main(words(saved, server, out, "--teacher_top_k", K, *flags))
        rows = TeacherCache(out).rows().with_format(None).to_list()
        assert len(rows) > 2
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            batch = Batch(ids, labels, scored_positions(labels))
            expected = top_k_here(server, batch).stored()
            assert row["topk_ids"] == expected.ids.flatten().tolist()
            assert row["topk_log_probs"] == pytest.approx(expected.log_probs.flatten().tolist(), rel=2e-3, abs=1e-3)
            assert row["tail_log_mass"] == pytest.approx(expected.tail.tolist(), rel=1e-3, abs=1e-4)
    capsys.readouterr()
    asked = len(server.asked)
    names = ["--model_name_or_path", str(saved / "student"), "--teacher_cache", str(tmp_path / "answers")]
    more = ["--output_dir", str(tmp_path / "run"), "--lmbda", "0", "--beta", "1", "--disable_tqdm", "True"]
    train.main([*names, *more, *TRAIN.split()])
    assert len(server.asked) == asked
    assert "warning: --beta 1 weighs" in " ".join(capsys.readouterr().out.split())


def test_a_run_stops_with_its_checkpoint_and_goes_on_elsewhere(saved, vllm, tmp_path):
    proxy = Proxy(vllm.url.removesuffix("/v1"))
    flags = (*TRAIN.split(), "--preflight", "off", "--disable_tqdm", "True", "--lmbda", 0, "--beta", 0)

    def cut():
        while not (tmp_path / "run/checkpoint-2/trainer_state.json").is_file():
            time.sleep(0.02)
        proxy.mode = "stall"

    there = copy.copy(vllm)
    there.url = proxy.url
    threading.Thread(target=cut, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        train.main(words(saved, there, tmp_path / "run", *flags, "--max_steps", 5000, "--teacher_timeout", 5))
    assert str(stop.value).startswith("gkd train: No server of the teacher answered in 5 seconds")
    proxy.close()
    last = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    more = ("--max_steps", last + 1, "--resume_from_checkpoint", "auto")
    train.main(words(saved, vllm, tmp_path / "run", *flags, *more))
    assert (tmp_path / "run/model.safetensors").is_file()


def test_text_may_come_from_the_same_server_as_text(tmp_path, vllm):
    """`--teacher_text_url` beside it writes; the target is the log-probabilities."""
    flags = {"teacher_logprobs_url": vllm.url, "teacher_text_url": vllm.url, "teacher_text_model": "tiny"}
    trainer = tiny_trainer(tmp_path, make_model(0), teacher_of(vllm.url), seq_kd=True, **flags)
    vllm.asked.clear()
    trainer.train()
    (prompts,) = {path: [body["prompt"] for _, body in vllm.asked] for path, _ in vllm.asked}.values()
    assert all("<|assistant|>chat<|end|>" in make_tokenizer().decode(prompt) for prompt in prompts)
    assert losses(trainer)[0] > 0
