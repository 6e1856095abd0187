"""A teacher behind `gkd serve` trains, writes, is evaluated and cached to the bit as one beside the student; and faults."""

import json
import pickle
import random
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch
from accelerate import Accelerator
from commands import ANSWERS
from inference_servers import stopped
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from serving import TOKEN, Process, Proxy, in_thread
from tiny import make_model, make_tokenizer
from trainers import TWELVE_ROWS, losses, tiny_trainer
from transformers import GenerationConfig

import cache_teacher
import eval_gkd
import train_gkd
from gkd.cli import serve, train
from gkd.config.caching import make_parser
from gkd.config.evaluation import EvalArguments
from gkd.config.teacher import TeacherArguments
from gkd.config.training import GKDArguments
from gkd.data.batch import Batch
from gkd.generation.generator import CompletionGenerator
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead, last_hidden_states
from gkd.models.pairing import Pairing, Side
from gkd.models.tokenizers import describe_tokenizer
from gkd.runs.record import read_record
from gkd.runs.results import read_results
from gkd.teachers import describe
from gkd.teachers.cache import TeacherCache
from gkd.teachers.forward import TeacherForward
from gkd.teachers.placed import place_teacher
from gkd.teachers.servers import wire
from gkd.teachers.servers.server import plain_head


@pytest.fixture(scope="module", autouse=True)
def token():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKD_TEACHER_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="module")
def processes(saved):
    """Two real servers of the saved teacher."""
    started = [Process(saved / "teacher") for _ in range(2)]
    yield started
    for process in started:
        process.end()


@pytest.fixture(scope="module")
def urls(processes):
    return [process.url for process in processes]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with in_thread(make_model(1, hidden_size=48).eval(), tmp_path_factory.mktemp("served")) as served:
        yield served


def remote(*urls, timeout=20.0):
    return describe(TeacherArguments(teacher_url=",".join(urls), teacher_timeout=timeout))


def batch_of(rows=2, width=9, seed=0):
    ids = torch.randint(6, 262, (rows, width), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, ids, torch.tensor([2, 3, width + 1]), None)


def hidden_here(batch):
    return last_hidden_states(make_model(1, hidden_size=48).eval(), batch.input_ids, None).flatten(0, 1)[batch.scored]


def hidden_of(teacher, batch):
    with teacher.target(batch) as target:
        return target.hidden


# ---------------------------------------------------------------------- the same bits


def trained(folder, teacher, **options):
    sizes = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 1e-2,
    }
    trainer = tiny_trainer(folder, make_model(0), teacher, TWELVE_ROWS, **(sizes | options))
    trainer.train()
    return trainer


MIXES = {"dataset": {"lmbda": 0.0}, "on_policy": {"lmbda": 1.0}, "teacher": {"lmbda": 0.3, "seq_kd": True}}


@pytest.mark.parametrize(
    ("mix", "beta", "servers"),
    [("dataset", 0.0, 1), ("dataset", 1.0, 2), ("on_policy", 0.5, 2), ("on_policy", 1.0, 1), ("teacher", 0.5, 2)],
)
def test_twenty_steps_have_the_bits_of_a_teacher_here(tmp_path, urls, mix, beta, servers):
    options = {"beta": beta, **MIXES[mix]}
    one = trained(tmp_path / "here", make_model(1, hidden_size=48), **options)
    other = trained(tmp_path / "there", remote(*urls[:servers]), **options)
    assert losses(one) == losses(other)
    assert len(losses(one)) == 20
    for weight, same in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(weight, same)


def command(saved, out, *flags, teacher=None):
    teacher = ("--teacher_model_name_or_path", saved / "teacher") if teacher is None else ("--teacher_url", teacher)
    words = ["--model_name_or_path", saved / "student", *teacher, "--dataset_name", ANSWERS, "--output_dir", out]
    return [str(word) for word in (*words, "--max_new_tokens", 6, "--max_length", 80, *flags)]


TRAIN = (
    "--max_steps 4 --save_steps 2 --logging_steps 1 --learning_rate 1e-2 --lmbda 0.5 --seq_kd True --report_to none"
)
TRAIN = f"{TRAIN} --use_cpu True --bf16 False --preflight off --disable_tqdm True".split()


def test_the_commands_say_the_same_through_a_server(saved, urls, tmp_path):
    """Training with an evaluation, `gkd evaluate` and `gkd cache`, of the top k and of hidden states."""
    both = ",".join(urls)
    for place, url in (("here", None), ("there", both)):
        run = tmp_path / place / "run"
        train_gkd.main(command(saved, run, *TRAIN, "--eval_dataset_name", str(ANSWERS), teacher=url))
        eval_gkd.main([str(run), "--output_dir", f"{run}-evaluated", *([] if url is None else ["--teacher_url", url])])
        for keep in ("topk", "hidden"):
            flags = ("--seq_kd", "True", "--keep", keep)
            cache_teacher.main(command(saved, tmp_path / place / keep, *flags, teacher=url))
    ran = [tmp_path / place / "run" for place in ("here", "there")]
    for name in ("run", "run-evaluated"):
        results = [read_results(tmp_path / place / name) for place in ("here", "there")]
        for one, other in zip(*results, strict=True):
            assert {k: one[k] for k in ("model", "metrics", "records")} == {
                k: other[k] for k in ("model", "metrics", "records")
            }
    assert (ran[0] / "model.safetensors").read_bytes() == (ran[1] / "model.safetensors").read_bytes()
    for keep in ("topk", "hidden"):
        caches = [TeacherCache(tmp_path / place / keep) for place in ("here", "there")]
        rows = [cache.rows().with_format(None).to_list() for cache in caches]
        assert rows[0] == rows[1]
    files = [sorted((tmp_path / place / "hidden/shards").glob("*.safetensors")) for place in ("here", "there")]
    assert len(files[0]) == 2
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    record = read_record(ran[1])
    assert record["arguments"]["teacher_url"] == both
    assert TOKEN not in json.dumps(record)
    kind, digest = record["fingerprints"]["teacher_url"].split()
    assert (kind, len(digest)) == ("weights", 64)

    # A record may not say where the rows and the token go.
    with pytest.raises(ValueError, match=f"type --teacher_url {both} again, or give --teacher_model_name_or_path"):
        EvalArguments(run=str(ran[1]))

    # On resume the address may change, and the weights may not.
    for name in ("resumed", "refused"):
        shutil.copytree(ran[1], tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint-4")
    resume = ("--resume_from_checkpoint", tmp_path / "resumed/checkpoint-2", "--eval_dataset_name", str(ANSWERS))
    train_gkd.main(command(saved, tmp_path / "resumed", *TRAIN, *resume, teacher=urls[1]))
    assert (tmp_path / "resumed/model.safetensors").read_bytes() == (ran[1] / "model.safetensors").read_bytes()
    with in_thread(make_model(2, hidden_size=48).eval(), tmp_path) as other, pytest.raises(SystemExit) as stop:
        resume = ("--resume_from_checkpoint", tmp_path / "refused/checkpoint-2", "--eval_dataset_name", str(ANSWERS))
        train_gkd.main(command(saved, tmp_path / "refused", *TRAIN, *resume, teacher=other.url))
    assert f"can't go on with a changed teacher: teacher_url {both} -> {other.url}" in str(stop.value)
    assert len(str(stop.value).splitlines()) == 1


def test_what_the_client_knows_of_its_teacher(here):
    teacher, model = remote(here.url), here.teacher.inner
    assert teacher.size == here.teacher.size
    side = teacher.side(None, None)
    text = "Größe, 🙂 and\ttwo <|end|>"
    assert side.tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert side.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert (side.size, side.window, side.stops[0].eos_token_id) == (264, 512, [1])
    student = Side.of_model(make_model(0), make_tokenizer())
    args = GKDArguments(output_dir="unused", use_cpu=True, bf16=False)
    assert Pairing.of(student, side, args).stop_ids == [1, 2]
    config = GenerationConfig(max_new_tokens=3, eos_token_id=[2], pad_token_id=0, do_sample=False)
    assert teacher.identity(config) == here.teacher.identity(config)
    head, own = teacher._head_on(torch.device("cpu")), LogitHead.of(model)
    assert torch.equal(head.head.weight, own.head.weight)
    with teacher.head() as again:
        assert again is head
    columns = pickle.loads(pickle.dumps(teacher.columns))  # as a worker gets it
    assert columns([]) == {}


def test_a_promised_answer_is_taken_apart_with_its_batch(here):
    """As where memory was too short for the whole micro-batch."""
    teacher, batch = remote(here.url), batch_of()
    whole = hidden_of(teacher, batch)
    teacher.prepare([batch])
    pieces = list(batch.to("cpu").pieces(1))
    assert [len(piece.scored) for piece in pieces] == [2, 1]
    assert torch.equal(torch.cat([hidden_of(teacher, piece) for piece in pieces]), whole)
    teacher.prepare([])
    assert batch.teacher_output is None


def test_a_tokenizer_of_a_hostile_server_names_no_file(here, tmp_path, monkeypatch):
    described = describe_tokenizer(make_tokenizer())
    core = json.loads(described["tokenizer"])
    core["added_tokens"].append(core["added_tokens"][0] | {"id": 262, "content": str(tmp_path / "x.json")})
    special = described["special"] | {"tokenizer_file": str(tmp_path / "x.json"), "auto_map": "x"}
    monkeypatch.setattr(here, "_tokenizer", described | {"tokenizer": json.dumps(core), "special": special})
    tokenizer = remote(here.url).side(None, None).tokenizer
    assert str(tmp_path / "x.json") in tokenizer.get_vocab()
    assert not {"tokenizer_file", "auto_map"} & tokenizer.init_kwargs.keys()
    monkeypatch.setattr(here, "_tokenizer", described | {"tokenizer": "[" * 5000})
    with pytest.raises(ValueError, match="--teacher_url: the server's tokenizer can't be read"):
        remote(here.url).side(None, None)


def test_top_k_is_answered_for_others_clients(here):
    batch = batch_of()
    body = wire.pack(wire.of_batch(batch), k=5, temperature=2.0)
    tensors, _ = wire.unpack(post(here, "/topk", body).content)
    with here.teacher.target(batch) as target:
        expected = TopK.of_target(target, 3, 264, 5, 2.0, torch.device("cpu"))
    for name, values in zip(("ids", "log_probs", "tail"), expected.tensors, strict=True):
        assert torch.equal(tensors[name], values)


def test_a_head_beside_an_adapter(here, tmp_path):
    """One that was trained whole is sent; one with a low-rank update is no plain layer, and is refused."""
    whole = get_peft_model(make_model(1), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        LogitHead.of(whole).head.modules_to_save["default"].weight += 1
    with in_thread(whole.eval(), tmp_path) as served:
        head = remote(served.url)._head_on(torch.device("cpu"))
    assert torch.equal(head.head.weight, make_model(1).lm_head.weight + 1)
    lora = SimpleNamespace(inner=get_peft_model(make_model(1), LoraConfig(target_modules=["lm_head"])))
    with pytest.raises(ValueError, match="it has an adapter, packed weights or weights elsewhere. Serve the teacher"):
        plain_head(lora)


# ---------------------------------------------------------------------- faults of servers and networks


def test_prompts_of_its_own_are_read_as_here(here):
    """Also where rows begin alike, so that the beginning is read once: that rounds otherwise."""
    teacher, local = remote(here.url), make_model(1, hidden_size=48).eval()
    ids = torch.randint(6, 262, (2, 90), generator=torch.Generator().manual_seed(1))
    ids[1, :80] = ids[0, :80]
    student = batch_of()
    batch = Batch(student.input_ids, student.labels, student.scored, None, ids, None, torch.tensor([84, 85, 170]))
    assert batch.teacher_inputs[0] is ids
    expected = TeacherForward(local, 0, enabled=False)(*batch.teacher_inputs, prompted=True)
    assert torch.equal(hidden_of(teacher, batch), expected)
    for sent in (batch, student):
        read = wire.read_batch(wire.of_batch(sent), wire.Limits(264, None))
        assert (read.teacher_input_ids is None) == (sent is student)


def test_one_of_several_teachers(here, saved):
    """A row's teacher may be behind a server."""
    place = saved / "teacher"
    several, local = (
        describe(TeacherArguments(teachers=[f"a={where}", f"b={saved / 'student'}"])) for where in (here.url, place)
    )
    outputs = []
    for teacher in (several, local):
        teacher.load().place(lambda model: place_teacher(model, Accelerator(), TeacherArguments(), 0))
        batch = batch_of()
        teacher.read(batch, {"teacher_shares": torch.tensor([[1.0, 0.0], [0.5, 0.5]])})
        with teacher.target(batch) as target:
            outputs.append(target.logits(264, 3)(slice(0, 3)))
    assert torch.equal(*outputs)
    student = Side.of_model(make_model(0), make_tokenizer())
    assert [len(teacher.side(student, None).models) for teacher in (several, local)] == [1, 2]
    assert several.head_size == (remote(here.url).head_size[0], 0)  # the preflight counts it, and no other weight
    assert local.head_size is None


@pytest.fixture
def proxy(urls):
    proxy = Proxy(urls[0])
    yield proxy
    proxy.close()


def test_a_cut_answer_is_asked_for_again(proxy):
    """Reset before a byte of it, within its head, and within its tensors."""
    teacher, batch = remote(proxy.url), batch_of()
    expected = hidden_here(batch)
    for kept in (0, 40, 400):
        before, proxy.mode, proxy.bytes_kept, proxy.times = proxy.connections, "cut", kept, 2
        assert torch.equal(hidden_of(teacher, batch), expected)
        assert proxy.times == 0
        assert proxy.connections >= before + 2


def test_a_server_that_stalls_is_left_for_another(proxy, urls):
    teacher, batch = remote(proxy.url, urls[1], timeout=3.0), batch_of()
    hidden_of(teacher, batch)  # has the head
    proxy.mode = "stall"
    start = time.monotonic()
    batches = [batch_of(seed=seed) for seed in range(6)]
    teacher.prepare(batches)
    for batch in batches:
        assert torch.equal(hidden_of(teacher, batch), hidden_here(batch))
    assert time.monotonic() - start < 4


def test_no_server_is_left(proxy, urls):
    teacher = remote(proxy.url, timeout=2.0)
    hidden_of(teacher, batch_of())
    proxy.mode = "stall"
    message = stopped(lambda: hidden_of(teacher, batch_of(seed=1)), most=3.0)
    assert message.startswith(
        f"No server of the teacher answered in 2 seconds (--teacher_timeout): {proxy.url}: no whole"
    )
    assert message.endswith("gkd train by --resume_from_checkpoint auto, another command as it was.")
    nobody = "http://127.0.0.1:9"
    message = stopped(lambda: remote(nobody, timeout=1.0), most=2.0)
    assert f"{nobody}: [Errno 111] Connection refused" in message
    teacher = remote(nobody, urls[0])  # one is enough
    assert torch.equal(hidden_of(teacher, batch_of()), hidden_here(batch_of()))


def test_another_teacher_is_refused_at_once(proxy, here, urls, tmp_path):
    with in_thread(make_model(2, hidden_size=48).eval(), tmp_path) as other:
        message = stopped(lambda: remote(urls[0], other.url))
        assert message.startswith(f"{other.url} has another teacher (weights ")
        teacher = remote(proxy.url)
        hidden_of(teacher, batch_of())
        proxy.upstream, proxy.mode, proxy.times = other.url, "cut", 1  # restarted with other weights
        message = stopped(lambda: hidden_of(teacher, batch_of(seed=1)))
        assert "than the start of this run" in message


def test_what_is_no_server_of_a_teacher():
    answers = [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nx-gkd-version: 9\r\n\r\n",
        b"\0" * 99,
    ]
    for answer, reason in zip(answers, ("no answer of gkd serve", "speaks version 9", "No server of"), strict=True):
        with said_by_socket(answer) as url:
            assert reason in stopped(lambda url=url: remote(url, timeout=1.0), most=3.0)


@contextmanager
def said_by_socket(answer):
    """A program that answers each connection with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run():
            while True:
                try:
                    client, _ = listening.accept()
                    with client:
                        client.recv(2**16)
                        client.sendall(answer)
                except OSError:
                    return

        threading.Thread(target=run, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def test_out_of_memory_says_what_helps(here, monkeypatch):
    teacher = remote(here.url)
    hidden_of(teacher, batch_of())

    def hidden(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(here.teacher, "hidden", hidden)
        message = stopped(lambda: hidden_of(teacher, batch_of()), most=2.0)
    assert message.startswith(
        f"{here.url}: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB What helps: a"
    )
    assert torch.equal(hidden_of(teacher, batch_of()), hidden_here(batch_of()))


def test_training_stops_in_one_line_where_its_server_is_gone(saved, proxy, tmp_path):
    def cut():
        while not (tmp_path / "run/checkpoint-2/model.safetensors").is_file():
            time.sleep(0.02)
        proxy.mode = "stall"

    threading.Thread(target=cut, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        flags = ("--max_steps", "5000", "--teacher_timeout", "2", "--lmbda", "0", "--seq_kd", "False")
        train.main(command(saved, tmp_path / "run", *TRAIN, *flags, teacher=proxy.url))
    assert str(stop.value).startswith("gkd train: No server of the teacher answered in 2 seconds")
    assert proxy.url in str(stop.value)
    assert len(str(stop.value).splitlines()) == 1


# ---------------------------------------------------------------------- what a server lets in


CLIENT = httpx.Client(timeout=20)


def post(served, path, body, **headers):
    headers = {"authorization": f"Bearer {TOKEN}"} | headers
    return CLIENT.post(served.url + path, content=body, headers=headers)


def test_nobody_comes_in_without_the_token(here):
    paths = {route.path: route.methods for route in here.app.routes}
    assert paths.pop("/health") >= {"GET"}
    assert len(paths) == 8
    for path, methods in paths.items():
        for given in (
            None,
            "",
            "Bearer",
            "Bearer wrong",
            TOKEN,
            f"Bearer {TOKEN}x",
            f"Bearer  {TOKEN}",
            "Bearer \xe9",
        ):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            answer = CLIENT.request(min(methods), here.url + path, headers=headers, content=b"")
            assert answer.status_code == 401
            assert "x-gkd-weights" not in answer.headers
    assert CLIENT.get(f"{here.url}/health").json() == {"status": "ok"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKD_TEACHER_TOKEN", "wrong")
        assert "this server needs its token: set GKD_TEACHER_TOKEN" in stopped(lambda: remote(here.url))


def test_without_a_token_no_page_of_a_browser_comes_in(tmp_path):
    with in_thread(make_model(1), tmp_path, token=None) as open_server:
        assert CLIENT.get(f"{open_server.url}/identity").status_code == 200
        answer = CLIENT.get(f"{open_server.url}/identity", headers={"host": "rebound.example"})
        assert (answer.status_code, answer.headers.get("x-gkd-weights")) == (403, None)


GOOD = {"input_ids": torch.full((2, 6), 7), "scored": torch.tensor([0, 4, 8])}
PROMPTS = {"prompts": torch.full((2, 4), 7), "mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
SAMPLING = {"max_new_tokens": 2, "do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0}
SAMPLING |= {"pad_token_id": 0, "eos_token_id": [2], "suppress_tokens": None}
WRONG = [
    ("/hidden", b"nonsense", "no safetensors of this format"),
    ("/hidden", save(GOOD), "no safetensors of this format"),
    ("/hidden", save(GOOD, {"gkd": '{"version": 2}'}), "the body has the version 2, and this is version 1"),
    ("/hidden", save(GOOD, {"gkd": "[" * 5000}), "no safetensors of this format"),
    ("/hidden", wire.pack({"scored": GOOD["scored"]}), "it lacks input_ids"),
    ("/hidden", wire.pack(GOOD | {"more": GOOD["scored"]}), "it has ['more']"),
    ("/hidden", wire.pack(GOOD | {"input_ids": torch.full((2, 6), 264)}), "the id 264, and the teacher has 264"),
    ("/hidden", wire.pack(GOOD | {"input_ids": torch.full((2, 6), -1)}), "the id -1"),
    (
        "/hidden",
        wire.pack(GOOD | {"input_ids": torch.full((2, 600), 7)}),
        "rows of 600 tokens, and the teacher reads 512",
    ),
    ("/hidden", wire.pack(GOOD | {"input_ids": torch.zeros(2, 6)}), "input_ids is torch.float32, not torch.int64"),
    ("/hidden", wire.pack(GOOD | {"input_ids": torch.zeros(0, 6).long()}), "input_ids has the shape [0, 6]"),
    ("/hidden", wire.pack(GOOD | {"scored": torch.tensor([12])}), "a position outside of the 12 tokens"),
    ("/hidden", wire.pack(GOOD | {"scored": torch.tensor([-1])}), "a position outside of the 12 tokens"),
    (
        "/hidden",
        wire.pack(GOOD | {"scored": torch.zeros(13).long()}),
        "scored has 13 positions, and the rows 12 tokens",
    ),
    ("/hidden", wire.pack(GOOD | {"lengths": torch.tensor([6, 2])}), "scored holds a position behind its row's end"),
    ("/hidden", wire.pack(GOOD | {"lengths": torch.tensor([6, 7])}), "lengths holds a number outside of 1 to 6"),
    ("/hidden", wire.pack(GOOD | {"attention_mask": torch.full((2, 6), 2)}), "other values than 0 and 1"),
    ("/hidden", wire.pack(GOOD | {"attention_mask": torch.ones(6, 2).long()}), "attention_mask has the shape [6, 2]"),
    ("/topk", wire.pack(GOOD), "k and vocabulary must be numbers up to 264"),
    ("/topk", wire.pack(GOOD, k=265), "k and vocabulary must be numbers up to 264"),
    ("/topk", wire.pack(GOOD, k=2, temperature=float("nan")), "temperature must be above 0"),
    ("/generate", wire.pack(PROMPTS, seed=1), "sampling needs max_new_tokens"),
    ("/generate", wire.pack(PROMPTS, sampling=SAMPLING | {"top_k": 5}, seed=1), "top_k must be 0, and top_p 1"),
    ("/generate", wire.pack(PROMPTS, sampling=SAMPLING | {"temperature": 0}, seed=1), "temperature must be above 0"),
    (
        "/generate",
        wire.pack(PROMPTS, sampling=SAMPLING | {"max_new_tokens": 600}, seed=1),
        "600 new ones are more than",
    ),
    (
        "/generate",
        wire.pack(PROMPTS, sampling=SAMPLING | {"eos_token_id": ["a"]}, seed=1),
        "eos_token_id must be a list",
    ),
    ("/generate", wire.pack(PROMPTS, sampling=SAMPLING, seed=-1), "seed must be a number from 0"),
    ("/generate", wire.pack(PROMPTS, sampling=SAMPLING, seed=True), "seed must be a number from 0"),
    ("/generate", wire.pack(PROMPTS | {"mask": PROMPTS["mask"].flip(1)}, sampling=SAMPLING, seed=1), "on the left"),
    ("/fingerprint", wire.pack({}, sampling=[]), "sampling needs max_new_tokens"),
]


@pytest.mark.parametrize(("path", "body", "reason"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_request_is_told_what_is_wrong(here, path, body, reason):
    answer = post(here, path, body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
    assert len(answer.json()["error"].splitlines()) == 1


def test_too_much_or_too_late_is_refused(here):
    assert post(here, "/hidden", bytes(2**20 + 1)).status_code == 413
    assert post(here, "/hidden", (bytes(2**16) for _ in range(20))).status_code == 413  # without a content-length
    assert post(here, "/hidden", wire.pack(GOOD), **{wire.WAITS_HEADER: "0"}).status_code == 503
    assert post(here, "/hidden", wire.pack(GOOD), **{wire.WAITS_HEADER: "soon"}).status_code == 400


def garbage(draw):
    """A body that is mostly wrong: noise, a good one, whole or with some bytes changed or cut, or one with odd tensors and settings."""
    good = draw.choice([wire.pack(GOOD, k=3), wire.pack(PROMPTS, sampling=SAMPLING, seed=1)])
    kind = draw.randrange(5)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        changed = bytearray(good)
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    if kind == 3:
        return good
    if kind == 2:
        return good[: draw.randrange(len(good))]
    names = ["input_ids", "scored", "attention_mask", "lengths", "prompts", "mask", "\x00", "a" * 300]
    dtypes = [torch.int64] * 6 + [torch.float32, torch.bool, torch.int32]
    tensors = {}
    for name in draw.sample(names, draw.randrange(5)):
        shape = [draw.choice([0, 1, 2, 2, 6]) for _ in range(draw.randrange(4))]
        values = torch.randint(-2, draw.choice([2, 9, 300, 2**40]), shape)
        tensors[name] = values.to(draw.choice(dtypes))
    odd = [None, -1, 0, 2, 1e308, float("nan"), 10**30, "x" * 50, [], [1], {}, True]
    settings = {name: draw.choice(odd) for name in draw.sample(["k", "vocabulary", "temperature", "seed", "rows"], 3)}
    sampling = {name: draw.choice([value, value, *odd]) for name, value in SAMPLING.items()}
    return wire.pack(tensors, sampling=draw.choice([sampling, draw.choice(odd)]), **settings)


def test_a_thousand_requests_of_garbage(here):
    draw, seen = random.Random(0), {}
    torch.manual_seed(0)
    with httpx.Client(headers={"authorization": f"Bearer {TOKEN}"}, timeout=20) as client:
        for _ in range(1000):
            path = draw.choice(
                ["/hidden"] * 4 + ["/generate"] * 2 + ["/topk", "/fingerprint", "/head", "/../x", "/%00"]
            )
            method = draw.choice(["POST"] * 9 + ["GET", "PUT"])
            body = None if method == "GET" else garbage(draw)
            answer = client.request(method, here.url + path, content=body)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (path, body, answer.text)
            if answer.status_code >= 400:
                assert len(answer.json()["error"].splitlines()) <= 1
    assert seen[400] > 400
    assert seen[200] > 40
    assert torch.equal(hidden_of(remote(here.url), batch_of()), hidden_here(batch_of()))


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("fits", [True, False])
def test_requests_that_wait_share_a_forward_where_they_may(here, monkeypatch, merges, fits):
    monkeypatch.setattr(here, "merges", merges)
    first, go, shapes, hidden = threading.Event(), threading.Event(), [], here.teacher.hidden

    def watched(batch):
        shapes.append(tuple(batch.input_ids.shape))
        first.set()
        assert go.wait(20)
        if len(batch.input_ids) > 3 and not fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return hidden(batch)

    monkeypatch.setattr(here.teacher, "hidden", watched)
    batches = [batch_of(3, 12, 9), *(batch_of(width=width, seed=width) for width in (9, 30, 14))]
    prompted = batch_of(seed=5)
    names = "teacher_input_ids", "teacher_attention_mask", "teacher_scored"
    batches.append(replace(prompted, **dict(zip(names, prompted.teacher_inputs, strict=True))))
    url = remote(here.url)
    with ThreadPoolExecutor(len(batches)) as pool:
        answers = [pool.submit(hidden_of, url, batches[0])]
        assert first.wait(20)
        for count, batch in enumerate(batches[1:], 2):
            answers.append(pool.submit(hidden_of, remote(here.url), batch))
            while len(here._queued) < count:
                time.sleep(0.01)
        go.set()
        for batch, answer in zip(batches, answers, strict=True):
            torch.testing.assert_close(answer.result(), hidden_here(batch), rtol=1e-5, atol=1e-5)
    assert not here._queued
    alone = [(2, 9), (2, 30), (2, 14), (2, 9)]
    if not merges:
        assert shapes == [(3, 12), *alone]
    elif fits:
        assert shapes == [(3, 12), (6, 30), (2, 9)]
    else:
        assert shapes == [(3, 12), (6, 30), (2, 9), (4, 30), (2, 30), (2, 14), (2, 9)]


def test_metrics_are_for_prometheus(here):
    hidden_of(remote(here.url), batch_of())
    text = CLIENT.get(f"{here.url}/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text
    assert 'gkd_requests_total{endpoint="/hidden",status="200"}' in text
    assert 'gkd_tokens_total{endpoint="/hidden"}' in text
    assert "gkd_queue 0.0" in text
    assert "/../x" not in text


# ---------------------------------------------------------------------- flags, and the process


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"teacher_url": "localhost:8500"}, "no address of a server"),
        ({"teacher_url": "http://a:port"}, "no address of a server"),
        ({"teacher_url": "http://a:1,"}, "no address of a server"),
        ({"teacher_url": "http://me:secret@a:1"}, "--teacher_url holds a name or password"),
        ({"teacher_url": "http://a:1,http://a:1/"}, "an address twice"),
        ({"teacher_url": "http://a:1", "teacher_timeout": 0.0}, "--teacher_timeout must be positive"),
        *(
            ({"teacher_url": "http://a:1", name: value}, f"--{name} does not go with --teacher_url")
            for name, value in {
                "teacher_model_name_or_path": "x",
                "teacher_cache": "x",
                "teacher_device": "cpu",
                "teacher_offload": True,
                "teacher_sharded": True,
                "teacher_adapter": "x",
                "teacher_load_in_4bit": True,
                "teacher_dtype": "float16",
                "teacher_trust_remote_code": True,
            }.items()
        ),
    ],
)
def test_flags_that_exclude_each_other(flags, reason, monkeypatch):
    monkeypatch.setattr("gkd.config.teacher.need", lambda *a: None)
    with pytest.raises(ValueError, match=reason) as error:
        GKDArguments(output_dir="unused", use_cpu=True, bf16=False, **flags)
    assert "secret" not in str(error.value)


def test_a_cache_needs_either_teacher(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_one("--model_name_or_path S --dataset_name D --output_dir O".split())
    assert "--teacher_model_name_or_path is required, or --teacher_url" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--host 0.0.0.0", "--host 0.0.0.0 can be reached from other machines: set GKD_SERVE_TOKEN"),
        ("--port 70000", "--port 70000: a port is a number up to 65535"),
        ("--ssl_keyfile x", "--ssl_keyfile is the key of --ssl_certfile"),
        ("--ssl_certfile nowhere.pem", "--ssl_certfile nowhere.pem: No such file"),
        ("--teacher_url http://a:1", "unknown flag --teacher_url"),
    ],
)
def test_a_server_that_does_not_start(saved, capsys, monkeypatch, flags, reason):
    monkeypatch.delenv("GKD_SERVE_TOKEN", raising=False)
    with pytest.raises(SystemExit) as stop:
        serve.main([str(saved / "teacher"), *flags.split()])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_port_that_is_taken(saved, here):
    with pytest.raises(SystemExit, match="Address already in use"):
        serve.main([str(saved / "teacher"), "--port", here.url.rpartition(":")[2]])


def test_sigterm_lets_what_has_come_be_answered(processes, urls):
    teacher, answers = remote(urls[1]), []
    teacher.decode_by(CompletionGenerator(batch_size=4))  # slowly
    prompts = torch.full((12, 8), 9)
    config = GenerationConfig(max_new_tokens=200, pad_token_id=0, do_sample=False)
    thread = threading.Thread(
        target=lambda: answers.append(teacher.write(prompts, torch.ones_like(prompts), config, 1))
    )
    thread.start()
    deadline = time.monotonic() + 20
    while "gkd_queue 1.0" not in CLIENT.get(f"{urls[1]}/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text:
        assert time.monotonic() < deadline
    processes[1].process.send_signal(signal.SIGTERM)
    thread.join(60)
    (ids, mask), process = answers[0], processes[1].process
    assert ids.shape == mask.shape == (12, 200)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert processes[1].said[-1] == "gkd serve: stopped by SIGTERM.\n"
