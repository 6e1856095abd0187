"""A black box that writes the teacher's text: a fake server of OpenAI's API, training on its text, its faults, and its price."""

import json
import re
import time
from collections import deque
from email.utils import formatdate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastapi import FastAPI, Request, Response
from serving import in_thread as serving
from serving import running
from tiny import ROWS, make_model, make_tokenizer
from trainers import tiny_trainer
from transformers import GenerationConfig

import gkd
from gkd.cli import train
from gkd.config.evaluation import EvalArguments
from gkd.config.training import GKDArguments
from gkd.data.encoding import RowEncoder
from gkd.data.rows import DataError
from gkd.io.errors import RunStopped
from gkd.losses.objective import Objective, divergence_of
from gkd.losses.targets import TextTarget
from gkd.models.heads import LogitHead
from gkd.report.curves import training_curves
from gkd.report.runs import load_runs
from gkd.rollout.cache import TextCache
from gkd.runs.record import read_record
from gkd.teachers import text_writer

KEY = "sk-of-the-tests"
MODEL = "black/box"


class FakeAPI:
    """Answers each conversation with its length and last words; what stands in `faults` comes first.

    Attributes:
        asked: bodies of all chat completions that came, in order.
        faults: of the next requests, each a Response or a function of the body.
        most: how many requests were there at once.
    """

    def __init__(self):
        self.asked, self.faults, self.most, self._now, self.hidden = [], deque(), 0, 0, None
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.complete)

    async def models(self, request: Request):
        return self._refused(request) or self.hidden or {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    def _refused(self, request):
        if request.headers.get("authorization") == f"Bearer {KEY}":
            return None
        said = f"Incorrect API key provided: {request.headers.get('authorization')}"
        return Response(json.dumps({"error": {"message": said}}), 401)

    def complete(self, request: Request, body: dict):  # in a thread, so that requests overlap
        if (refused := self._refused(request)) is not None:
            return refused
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            self.asked.append(body)
            fault = self.faults.popleft() if self.faults else None
            return fault if isinstance(fault, Response) else (fault or answered)(body)
        finally:
            self._now -= 1


def words_of(body):
    return f"{len(body['messages'])}:{body['messages'][-1]['content']}"


def answered(body, text=None, finish="stop", **message):
    message = {"role": "assistant", "content": words_of(body) if text is None else text} | message
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


@pytest.fixture(scope="module")
def whole():
    api = FakeAPI()
    with running(api.app) as url:
        api.url = f"{url}/v1"
        yield api


@pytest.fixture
def api(whole, monkeypatch):
    monkeypatch.setenv("GKD_TEACHER_TEXT_KEY", KEY)
    whole.asked.clear()
    whole.faults.clear()
    whole.most = 0
    return whole


CONFIG = GenerationConfig(max_new_tokens=40, temperature=0.7, do_sample=True, eos_token_id=[1, 2], pad_token_id=0)
TEXT = {"seq_kd": True, "lmbda": 0.0, "teacher_text_model": MODEL}


def server_of(url, **flags):
    options = {"output_dir": "unused", "use_cpu": True, "bf16": False, "teacher_text_url": url, "teacher_timeout": 5.0}
    server = text_writer(GKDArguments(**(TEXT | options | flags)))
    server.encoder = RowEncoder(make_tokenizer(), 80, 40, "last_turn", [1, 2])
    return server


def keys_of(server, rows):
    return [asked.encode() for asked in server.columns([{"row": json.dumps(row)} for row in rows])["asked"]]


def written(server, rows, most=40):
    """The text that the student would read for each row."""
    keys = keys_of(server, rows)
    texts = dict(server.texts(list(dict.fromkeys(keys)), CONFIG))
    return [make_tokenizer().decode(server.tokens(key, texts[key], most)) for key in keys]


def stopped(call):
    start = time.monotonic()
    with pytest.raises(RunStopped) as stop:
        call()
    assert len(str(stop.value).splitlines()) == 1
    assert KEY not in str(stop.value)
    return str(stop.value), time.monotonic() - start


# ---------------------------------------------------------------------- what is asked, and how its answer is read


def test_messages_are_sent_as_they_are(api):
    """A system message and several turns; `teacher_prompt` in place of the prompt; text as a question; tools."""
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "and ünicode 🙂?"},
    ]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    rows = [
        {"messages": [*talk, {"role": "assistant", "content": "the dataset's"}]},
        {"prompt": talk[:2], "completion": [{"role": "assistant", "content": "x"}], "teacher_prompt": talk},
        {"prompt": "say so"},
        {
            "messages": [talk[1], {"role": "assistant", "content": None, "tool_calls": [call]}, talk[3]],
            "tools": [tool],
        },
    ]
    server = server_of(api.url, teacher_text_options={"top_p": 0.5, "max_tokens": None, "max_completion_tokens": 9})
    assert written(server, rows[:3]) == ["4:and ünicode 🙂?<|end|>", "4:and ünicode 🙂?<|end|>", "1:say so<|end|>"]
    settings = {"model": MODEL, "temperature": 0.7, "top_p": 0.5, "max_completion_tokens": 9}
    by_length = sorted(api.asked, key=lambda body: len(body["messages"]))
    assert by_length[0] == settings | {"messages": [{"role": "user", "content": "say so"}]}
    assert by_length[1:] == [settings | {"messages": talk}] * 2
    api.asked.clear()
    list(server.texts(keys_of(server, rows[3:]), CONFIG))
    sent = api.asked[0]["messages"][1]["tool_calls"][0]["function"]
    assert json.loads(sent["arguments"]) == {"at": 1}
    assert api.asked[0]["tools"] == [tool]
    assert api.asked[0]["messages"][0] == talk[1]


def test_an_answer_ends_as_the_server_says(api):
    server, row = server_of(api.url), ROWS[0]
    for answer, expected in (
        ({"text": "done"}, "done<|end|>"),
        ({"text": "cut o", "finish": "length"}, "cut o"),
        ({"text": "", "finish": "stop"}, ""),
        ({"text": " \n"}, ""),
        ({"text": "half of", "finish": "content_filter"}, ""),
        ({"text": "\ud83d"}, "?<|end|>"),
        (
            {"text": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"text": "b"}]},
            "ab<|end|>",
        ),
        ({"text": "closed<|end|>\n"}, "closed<|end|>"),
        ({"text": "<|end|>"}, ""),
    ):
        api.faults.append(lambda body, answer=answer: Response(json.dumps(answered(body, **answer))))
        assert written(server, [row]) == [expected]
    assert written(server, [row], most=3) == ["1:o"]  # the student's tokens, of which there may be more
    unclosed = "{% for m in messages %}{{ m.content }}{% endfor %}"
    server.encoder.tokenizer.chat_template = unclosed
    assert written(server, [row]) == ["1:one?<|end|>"]  # a template that closes no answer


CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} "
)
CALLS += "{{ c.function.arguments | tojson }}]{% endfor %}<|end|>{% endfor %}"
CALLS += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"at": 1}', '[look {"at": 1}]<|end|>'),
        ("", "[look {}]<|end|>"),
        (None, "[look {}]<|end|>"),
        ({"at": 1}, '[look {"at": 1}]<|end|>'),
        ('{"at": "\\ud83d"}', '[look {"at": "?"}]<|end|>'),
        ('{"at": ', ""),  # cut by a limit of length
        ('"at"', ""),
    ],
)
def test_a_call_is_asked_for_once(api, caplog, arguments, expected):
    server = server_of(api.url)
    server.encoder.tokenizer.chat_template = CALLS
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    api.faults.append(lambda body: Response(json.dumps(answered(body, "", "tool_calls", tool_calls=[call]))))
    assert written(server, [ROWS[0]]) == [expected]
    assert len(api.asked) == 1
    assert ("A call of black/box can't be read, and its answer is left out" in caplog.text) == (not expected)


def test_nulls_of_arrow_are_not_sent(api):
    """At no depth, in tools, calls and `teacher_prompt`; nor what a call has beside its id, type and function."""
    properties = {"at": {"type": "string", "enum": None}, "of_another_tool": None}
    tool = {"type": "function", "strict": None, "function": {"name": "look", "parameters": {"properties": properties}}}
    call = {"id": None, "index": 0, "function": {"name": "look", "arguments": {"at": 1, "to": None}}}
    talk = [
        {"role": "user", "content": "one?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_calls": None},
    ]
    server = server_of(api.url)
    list(server.texts(keys_of(server, [{"prompt": "x", "teacher_prompt": talk, "tools": [tool]}]), CONFIG))
    (body,) = api.asked
    parameters = {"properties": {"at": {"type": "string"}}}
    assert body["tools"] == [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    sent = {"type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    expected = [{"role": "user", "content": "one?"}, {"role": "assistant", "tool_calls": [sent]}]
    assert body["messages"] == [*expected, {"role": "tool", "content": "2"}]


def test_a_template_that_refuses_answers_is_told_before_a_request(saved, api, data, tmp_path, monkeypatch):
    """With the flag that helps: this one opens the thinking in the prompt, and writes none with the answer."""
    opens = "{% if add_generation_prompt and enable_thinking is not false %}(hm){% endif %}"
    asks = make_tokenizer().chat_template + opens
    (tmp_path / "t.jinja").write_text(asks)
    monkeypatch.setattr("gkd.models.loading.load_student", None)
    with pytest.raises(SystemExit) as stop:
        train.main(command(saved, api.url, tmp_path / "run", data, "--chat_template_path", tmp_path / "t.jinja"))
    assert "A text of the teacher can't be trained on: " in str(stop.value)
    assert "It passes with --chat_template_kwargs '{\"enable_thinking\": false}'" in str(stop.value)
    assert len(str(stop.value).splitlines()) == 1

    server = server_of(api.url)
    server.encoder.tokenizer.chat_template = asks
    with pytest.raises(DataError, match="It passes with --chat_template_kwargs"):
        written(server, [ROWS[0]])
    assert api.asked == []


def test_text_that_the_template_refuses_is_left_out(api, caplog):
    server = server_of(api.url)
    refuses = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    server.encoder.tokenizer.chat_template = f"{refuses}<|{{{{ m.role }}}}|>{{{{ m.content }}}}<|end|>{{% endfor %}}"
    api.faults.append(lambda body: answered(body, "no"))
    assert written(server, [ROWS[0]]) == [""]
    assert f"A text of {MODEL} is left out: the chat template refuses its messages: not this" in caplog.text
    api.faults.extend([lambda body: answered(body, "no")] * 30)
    message, _ = stopped(
        lambda: written(server, [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(40)])
    )
    assert "have no text to train on (the last: the chat template refuses its messages: not this)" in message


def test_so_many_requests_at_once(api):
    def slow(body):
        time.sleep(0.05)
        return answered(body)

    rows = [{"prompt": f"number {i}"} for i in range(12)]
    for most in (1, 3):
        api.most = 0
        api.faults.extend([slow] * 12)
        assert written(server_of(api.url, teacher_text_requests=most), rows) == [
            f"1:number {i}<|end|>" for i in range(12)
        ]
        assert api.most == most


def test_the_fingerprint_names_model_and_sampling_alone(api):
    own = server_of(api.url).identity(CONFIG)
    assert own == server_of("https://elsewhere.example/v1", teacher_text_requests=2).identity(CONFIG)
    for change in ({"teacher_text_model": "other"}, {"teacher_text_options": {"top_p": 0.5}}):
        assert own != server_of(api.url, **change).identity(CONFIG)
    for change in ({"temperature": 0.8}, {"max_new_tokens": 9}):
        assert own != server_of(api.url).identity(GenerationConfig(**(CONFIG.to_diff_dict() | change)))


def test_text_is_found_whatever_the_order_of_keys(tmp_path):
    cache = TextCache(tmp_path, b"", vocab_size=256, keeps_all=True)
    one, other = (
        b'{"messages": [{"role": "user", "content": "x"}]}',
        b'{"messages": [{"content": "x", "role": "user"}]}',
    )
    cache.store([[*one]], [[7]])
    assert cache.lookup([[*other], [*b'{"messages": []}']]) == [[7], None]


# ---------------------------------------------------------------------- faults


def said(status, message, **headers):
    return Response(json.dumps({"error": {"message": message}}), status, headers=headers)


@pytest.mark.parametrize(
    ("fault", "least", "told"),
    [
        (
            said(429, "slow down", **{"retry-after": "1"}),
            1.0,
            "HTTP 429: slow down, and asks for a pause of 1 seconds",
        ),
        (
            lambda _: said(503, "full", **{"retry-after": formatdate(time.time() + 2, usegmt=True)}),
            0.9,
            "HTTP 503: full, and asks",
        ),
        (Response(json.dumps({"message": "overloaded"}), 500), 0.3, "HTTP 500: overloaded"),
        (Response('{"choices": [{"mess'), 0.3, "its answer is no chat completion"),
        (Response("[]"), 0.3, "its answer is no chat completion"),
        (Response(json.dumps({"choices": []})), 0.3, "its answer is no chat completion"),
        (Response("[" * 100_000), 0.3, "its answer is no chat completion"),
    ],
    ids=["429", "503 with a date", "500", "cut JSON", "a list", "no choice", "deep JSON"],
)
def test_what_passes_is_asked_again(api, caplog, fault, least, told):
    server = server_of(api.url)
    api.faults.append(fault)
    start = time.monotonic()
    assert written(server, [ROWS[0]]) == ["1:one?<|end|>"]
    assert least < time.monotonic() - start < 4
    assert len(api.asked) == 2
    assert told in caplog.text
    assert server.api.flush() == {"answers": 1, "prompt_tokens": 10, "completion_tokens": 3}
    assert server.api.flush()["answers"] == 0


def test_a_server_that_does_not_answer_stops_the_run(api):
    def stalls(body):
        time.sleep(3)
        return answered(body)

    server = server_of(api.url, teacher_timeout=1.0)
    api.faults.extend([stalls] * 2)
    message, seconds = stopped(lambda: written(server, [ROWS[0]]))
    assert message.startswith(
        f"{api.url} gives no answer within 1 seconds (--teacher_timeout): no whole answer in 0.5 seconds."
    )
    assert seconds < 2.5
    api.faults.clear()
    api.faults.append(said(429, "later", **{"retry-after": "3600"}))
    message, seconds = stopped(lambda: written(server, [ROWS[0]]))
    assert "HTTP 429: later, and asks for a pause of 3,600 seconds" in message
    assert seconds < 0.5


def test_whether_a_server_is_there_takes_a_minute_at_most(monkeypatch):
    monkeypatch.setattr("gkd.teachers.servers.chat_api._CHECK", 0.5)
    message, seconds = stopped(server_of("http://127.0.0.1:9/v1", teacher_timeout=600.0).check)
    assert message.startswith("http://127.0.0.1:9/v1 gives no answer within 0.5 seconds: ")
    assert "Connection refused" in message
    assert seconds < 2


@pytest.mark.parametrize("status", [403, 404, 405, 501])
def test_a_list_of_models_need_not_be_shown(api, caplog, monkeypatch, status):
    """A key that may only chat gets 403 there."""
    monkeypatch.setattr(api, "hidden", said(status, "not for you"))
    server_of(api.url).check()
    assert "shows no list of models" in caplog.text


def test_a_problem_is_told_once_however_it_is_worded(api, caplog):
    api.faults.extend(said(429, f"request {i}", **{"retry-after": "0"}) for i in range(3))
    assert written(server_of(api.url), [ROWS[0]]) == ["1:one?<|end|>"]
    assert caplog.text.count("It is asked again") == 1


def test_what_does_not_pass_stops_the_run_at_once(api, monkeypatch):
    server = server_of(api.url)
    server.check()
    assert api.asked == []
    for fault, told in (
        (
            said(404, "no such model"),
            f"HTTP 404: no such model). Is there a model {MODEL}, and does the address end like",
        ),
        (
            said(400, f"too long for {KEY}"),
            "refuses the request (HTTP 400: too long for ***). The prompt begins with 'one?'.",
        ),
        (
            Response("", 307, headers={"location": "http://127.0.0.1:9/"}),
            "redirects (HTTP 307): give the address behind it",
        ),
    ):
        api.faults.append(fault)
        message, seconds = stopped(lambda: written(server, [ROWS[0]]))
        assert told in message
        assert seconds < 0.5
    monkeypatch.setenv("GKD_TEACHER_TEXT_KEY", f"{KEY}-wrong")
    message, _ = stopped(server_of(api.url).check)
    assert "refuses the key in GKD_TEACHER_TEXT_KEY (HTTP 401: Incorrect API key provided: Bearer ***)." in message
    monkeypatch.delenv("GKD_TEACHER_TEXT_KEY")
    assert (
        "refuses a request without a key: set GKD_TEACHER_TEXT_KEY (HTTP 401" in stopped(server_of(api.url).check)[0]
    )
    monkeypatch.setenv("GKD_TEACHER_TEXT_KEY", "two words")
    with pytest.raises(ValueError, match="GKD_TEACHER_TEXT_KEY has a character that no HTTP header holds"):
        server_of(api.url)


def test_answers_under_way_are_kept_where_another_fails(api):
    """They have a price."""

    def slow(body):
        time.sleep(0.3)
        return answered(body)

    server = server_of(api.url, teacher_text_requests=3)
    api.faults.extend([slow, slow, said(400, "no")])
    kept = []
    with pytest.raises(RunStopped, match="HTTP 400: no"):
        for pair in server.texts(keys_of(server, [{"prompt": f"{i}"} for i in range(9)]), CONFIG):
            kept.append(pair)
    assert (len(api.asked), len(kept)) == (3, 2)


def test_a_model_that_only_thinks_stops_the_run(api):
    rows = [{"prompt": f"number {i}"} for i in range(30)]
    for answer in (
        {"text": "", "finish": "length", "reasoning_content": "hm"},
        {"text": " \n", "finish": "length"},
        {"text": "half of", "finish": "content_filter"},
    ):
        api.faults.clear()
        api.faults.extend([lambda body, answer=answer: answered(body, **answer)] * 30)
        message, _ = stopped(lambda: written(server_of(api.url), rows))
        assert f"the last 20 answers of {MODEL} have no text to train on (the last: finish_reason " in message
        assert f"{answer['finish']})" in message


# ---------------------------------------------------------------------- training


def test_the_loss_is_cross_entropy_on_the_text():
    """Value and gradient are those of torch on whole logits, whatever the divergence, kd_ratio and temperature."""
    model = make_model(0).double()
    hidden = torch.randn(7, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([5, 9, 0, 261, 17, 17, 3])
    expected = F.cross_entropy(model.lm_head(hidden)[:, :262], labels, reduction="sum")
    wanted = torch.autograd.grad(expected, [hidden, model.lm_head.weight])
    for settings in ({"divergence": "jsd", "beta": 0.5}, {"divergence": "tv"}):
        args = SimpleNamespace(**settings)
        objective = Objective(divergence_of(args), 262, temperature=2.0)
        loss, statistics = objective.loss(hidden, TextTarget(), labels, LogitHead.of(model), kd_ratio=0.3)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, [hidden, model.lm_head.weight]), wanted)
        log_probs = model.lm_head(hidden)[:, :262].log_softmax(-1)
        torch.testing.assert_close(statistics[3], -(log_probs.exp() * log_probs).sum(-1))


def command(saved, url, out, data, *flags):
    words = [
        "--model_name_or_path",
        saved / "student",
        "--dataset_name",
        data,
        "--output_dir",
        out,
        "--seq_kd",
        "True",
    ]
    words += ["--teacher_text_url", url, "--teacher_text_model", MODEL, "--max_new_tokens", 20, "--max_length", 100]
    words += ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--logging_steps", 1, "--lmbda", 0]
    words += ["--learning_rate", "1e-2", "--per_device_train_batch_size", 2, "--disable_tqdm", "True"]
    return [str(word) for word in (*words, *flags)]


@pytest.fixture
def data(tmp_path):
    system = {"role": "system", "content": "be brief"}
    rows = [{"messages": [system, *row["messages"][:1]]} for row in ROWS]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def logs_of(folder):
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def test_training_on_its_text_alone(saved, api, data, tmp_path, capsys, caplog, monkeypatch):
    """Two epochs ask once; so does a run that is resumed, and one with another student's tokenizer and a shared folder."""
    out = tmp_path / "run"
    flags = ["--teacher_text_cache", tmp_path / "texts", "--generation_batch_size", 2]  # two texts a step
    train.main(command(saved, api.url, out, data, "--num_train_epochs", 2, "--save_steps", 1, *flags))
    assert sorted(words_of(body) for body in api.asked) == sorted(f"2:{row['messages'][0]['content']}" for row in ROWS)
    assert all(body["messages"][0] == {"role": "system", "content": "be brief"} for body in api.asked)
    shown = capsys.readouterr().out
    assert "The teacher's server gave 4 answers, of 40 tokens in prompts and 12 in text." in shown
    logs = [entry for entry in logs_of(out) if "loss" in entry]
    assert len(logs) == 4
    assert sum(entry["teacher_text/completion_tokens"] for entry in logs) == 12
    assert logs[-1]["teacher/loss"] < logs[0]["teacher/loss"]
    assert "teacher/student_entropy" in logs[0]
    assert (
        not {"teacher/forward_kl", "teacher/reverse_kl", "teacher/agreement", "teacher/teacher_entropy"}
        & logs[0].keys()
    )
    record = read_record(out)
    assert (record["arguments"]["kd_ratio"], record["arguments"]["beta"]) == (0.0, 0.0)
    for path in out.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    assert KEY not in shown + caplog.text

    # Killed behind its first checkpoint, when all text had been written: nothing is asked again, and nothing is missed.
    api.asked.clear()
    caplog.clear()
    resume = ["--resume_from_checkpoint", out / "checkpoint-1", "--num_train_epochs", 2, *flags]
    train.main(command(saved, api.url, tmp_path / "resumed", data, *resume))
    assert (tmp_path / "resumed/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    train.main(command(saved, api.url, tmp_path / "again", data, "--max_steps", 2, *flags, "--learning_rate", "1e-3"))
    assert api.asked == []
    assert "texts that the teacher had written" not in caplog.text

    units = {}
    monkeypatch.setattr("gkd.report.curves._lines", lambda title, unit, *_: units.update({title: unit}) or {})
    training_curves(load_runs([out]))
    assert units["Loss"] == "cross-entropy, nats per token"
    assert not re.search("JSD|beta|kd_ratio|divergence", (out / "report.md").read_text())
    gkd.export(str(out), str(tmp_path / "exported"))
    card = (tmp_path / "exported/README.md").read_text().partition("## Use")[0]
    assert "| loss | cross-entropy on the text of black/box |" in card
    assert not re.search("β|KL|divergence|kd_ratio|Generalized", card)

    with pytest.raises(ValueError, match="its record names no teacher to compare with: give --teacher_model"):
        EvalArguments(run=str(out), dataset_name=str(data))


def test_a_run_that_dies_keeps_what_was_answered(saved, api, data, tmp_path):
    out = tmp_path / "run"
    api.faults.extend([answered, answered, said(400, "no")])
    one = ["--teacher_text_requests", 1, "--max_steps", 2]
    with pytest.raises(SystemExit) as stop:
        train.main(command(saved, api.url, out, data, *one))
    assert "refuses the request (HTTP 400: no). The prompt begins with" in str(stop.value)
    train.main(command(saved, api.url, out, data, *one))
    assert len(api.asked) == 3 + 2
    assert len({words_of(body) for body in api.asked}) == 4


def trained(folder, url, **flags):
    """Of two epochs on four rows, beside a teacher that is compared with."""
    options = {"max_steps": 4, "learning_rate": 1e-2, "max_new_tokens": 20, "beta": 0.5}
    options |= TEXT | {"teacher_text_url": url} | flags
    trainer = tiny_trainer(folder, make_model(0), make_model(1, hidden_size=48), **options)
    trainer.train()
    return trainer


def test_its_text_beside_the_distribution_of_another(api, tmp_path):
    """The divergence is the local teacher's, on the server's text; on-policy steps too."""
    trainer = trained(tmp_path / "a", api.url)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(api.asked) == 4
    assert logs[0]["teacher/forward_kl"] > 0
    lengths = [len(f"1:{row['messages'][0]['content']}") + 1 for row in ROWS]  # one token a character, and the stop
    assert sum(entry["teacher/completion_length"] for entry in logs) / 4 == pytest.approx(sum(lengths) / 4)

    answers = [
        {"messages": [r["messages"][0], {"role": "assistant", "content": f"1:{r['messages'][0]['content']}"}]}
        for r in ROWS
    ]
    options = {"max_steps": 4, "learning_rate": 1e-2, "max_new_tokens": 20, "beta": 0.5, "lmbda": 0.0}
    same = tiny_trainer(tmp_path / "b", make_model(0), make_model(1, hidden_size=48), answers, **options)
    same.train()
    for one, other in zip(trainer.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(one, other)

    mixed = trained(tmp_path / "c", api.url, lmbda=0.5, max_steps=6)
    sources = {name.split("/")[0] for entry in mixed.state.log_history for name in entry if name.endswith("/loss")}
    assert sources == {"teacher", "on_policy"}


def test_rows_without_text_change_nothing(api, tmp_path):
    before = make_model(0)
    api.faults.extend([lambda body: answered(body, "")] * 2)
    trainer = trained(tmp_path, api.url, max_steps=1, generation_batch_size=2)
    log = trainer.state.log_history[0]
    assert (log["loss"], log["teacher/empty"], log["teacher/truncated"]) == (0.0, 1.0, 0.0)
    for one, other in zip(before.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trainer.rollout.cache.written(trainer.rollout.cache.run)["entries"] == 0


def test_an_empty_answer_is_asked_for_again_by_the_next_run_alone(api, tmp_path):
    api.faults.extend([lambda body: answered(body, "")] * 4)
    for asked in (4, 8, 8):
        trained(tmp_path / "run", api.url, teacher_text_cache=str(tmp_path / "texts"))  # two epochs
        assert len(api.asked) == asked


def test_an_evaluation_needs_another_teacher(api, tmp_path):
    with pytest.raises(ValueError, match="nor a server of text alone has both: .*no eval_dataset="):
        tiny_trainer(tmp_path, make_model(0), None, held_out=ROWS, **TEXT, teacher_text_url=api.url)


def test_off_asks_anew(api, tmp_path):
    trained(tmp_path, api.url, teacher_text_cache="off")
    assert len(api.asked) == 8


def test_a_distribution_from_gkd_serve_and_text_from_the_api(saved, api, data, tmp_path, monkeypatch):
    monkeypatch.setenv("GKD_TEACHER_TOKEN", "token")
    with serving(make_model(1, hidden_size=48).eval(), tmp_path, token="token") as served:
        out = tmp_path / "run"
        flags = ["--teacher_url", served.url, "--max_steps", 2, "--beta", "0.5", "--save_steps", 1]
        train.main(command(saved, api.url, out, data, *flags))
    assert {words_of(body)[:2] for body in api.asked} == {"2:"}
    assert logs_of(out)[0]["teacher/forward_kl"] > 0


# ---------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"teacher_text_url": None}, "--teacher_text_model has no effect without --teacher_text_url"),
        ({"teacher_text_url": "localhost:8000/v1"}, "no address of a server; it is like http://127.0.0.1:8000/v1"),
        ({"teacher_text_url": "http://me:secret@a/v1"}, "give a token by GKD_TEACHER_TEXT_KEY instead"),
        ({"teacher_text_url": "http://a/v1?key=secret"}, "no address of a server"),
        ({"teacher_text_model": None}, "--teacher_text_url needs --teacher_text_model"),
        ({"seq_kd": False}, "add --seq_kd True"),
        ({"teacher_cache": "x"}, "--teacher_cache and --teacher_text_url exclude each other"),
        ({"teacher_text_options": '{"n": 2, "stream": true}'}, "--teacher_text_options can't set n, stream"),
        ({"teacher_text_options": "{"}, "--teacher_text_options is not JSON"),
        ({"teacher_text_requests": 0}, "--teacher_text_requests must be positive"),
    ],
)
def test_flags_that_exclude_each_other(flags, reason):
    options = {"output_dir": "unused", "use_cpu": True, "bf16": False, "teacher_text_url": "http://a/v1"}
    with pytest.raises(ValueError, match=reason):
        GKDArguments(**(TEXT | options | flags))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--lmbda 0.5", "--lmbda 0.5: the server of --teacher_text_url tells text and no distribution"),
        ("--eval_dataset_name data/sample_answers.json", "--eval_dataset_name: held-out rows"),
        ("--beta 0.5", "--beta 0.5: the server of --teacher_text_url tells text and no distribution, so the loss is"),
        ("--divergence tv", "--divergence tv: the server"),
        ("--kd_ratio 0.5", "--kd_ratio 0.5: the server"),
        ("--teacher_device cpu", "--teacher_device is about a teacher's weights"),
        ("--metrics exact_match", "--metrics compares with the teacher"),
    ],
)
def test_what_text_alone_can_not_do_is_told_before_a_model_loads(
    saved, api, data, tmp_path, monkeypatch, flags, reason
):
    monkeypatch.setattr("gkd.models.loading.load_student", None)
    monkeypatch.setattr("gkd.teachers.servers.text_server.TextServer.check", None)  # nor is the server asked before
    with pytest.raises(SystemExit) as stop:
        train.main(command(saved, api.url, tmp_path / "run", data, "--max_steps", 1, *flags.split()))
    assert reason in str(stop.value)
    assert len(str(stop.value).splitlines()) == 1
    assert api.asked == []
