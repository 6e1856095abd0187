"""The chat: piped and on a terminal, with tiny models."""

import argparse
import fcntl
import io
import os
import pty
import re
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from serving import TOKEN, in_thread
from tiny import REPO, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from vllm_engines import SHAPE, save_models

from gkd.cli.chat import main, read_prompts, show
from gkd.cli.speakers import Answer, LoadedSpeaker, ServedSpeaker, SpeakerInPieces
from gkd.generation.vllm import own_parameters
from gkd.io.console import printable

pytest_plugins = ["vllm_engines"]  # its fixtures
TOKENS = 12


def squeezed(text):
    """The text without white space, which terminals change."""
    return "".join(printable(text).plain.split())


def talk(monkeypatch, capsys, prompts, *flags):
    """The output for these lines of stdin, split at the prompts."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{prompt}\n" for prompt in prompts)))
    main(["--temperature", "0", "--max_new_tokens", str(TOKENS), *map(str, flags)])
    out = capsys.readouterr().out
    return ["> " + part for part in ("\n" + out).split("\n> ")[1:]]


def greedy(model, folder, messages):
    """The answer of `generate` to a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = messages
    if not isinstance(messages, str):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=[1, 2], pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def turns(*contents):
    return [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * 2, contents, strict=False)]


def test_both_answer_with_their_own_history(saved, monkeypatch, capsys):
    printed = talk(
        monkeypatch,
        capsys,
        ["hello", "", "and then?", "/clear", "and then?", "/quit", "unread"],
        *("--student", saved / "student", "--teacher", saved / "teacher"),
    )
    assert [part.split("\n")[0] for part in printed] == ["> hello", "> and then?", "> /clear", "> and then?"]
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(saved / role)
        first = greedy(model, saved / role, turns("hello"))
        second = greedy(model, saved / role, turns("hello", first, "and then?"))
        cleared = greedy(model, saved / role, turns("and then?"))
        assert second != cleared
        for part, answer in zip((printed[0], printed[1], printed[3]), (first, second, cleared), strict=True):
            title = f"{role}: {saved / role}"
            assert squeezed(title + answer) in squeezed(part)
    assert f"{TOKENS} tokens, " in printed[0]
    assert f"tokens/s, cut at {TOKENS}" in printed[0]


def test_one_model_with_a_system_prompt(saved, monkeypatch, capsys):
    (printed,) = talk(monkeypatch, capsys, ["hi"], "--student", saved / "student", "--system", "be brief")
    model = AutoModelForCausalLM.from_pretrained(saved / "student")
    answer = greedy(model, saved / "student", [{"role": "system", "content": "be brief"}, *turns("hi")])
    assert squeezed(answer) in squeezed(printed)
    assert "teacher" not in printed.replace(str(saved), "")


def test_without_a_chat_template_the_text_goes_on(tmp_path, monkeypatch, capsys):
    model = make_model(5)
    model.save_pretrained(tmp_path)
    make_tokenizer(template=None).save_pretrained(tmp_path)
    printed = talk(monkeypatch, capsys, ["once upon", "then"], "--student", tmp_path)
    first = greedy(model, tmp_path, "once upon")
    second = greedy(model, tmp_path, f"once upon{first}\nthen")
    assert squeezed(first) in squeezed(printed[0])
    assert squeezed(second) in squeezed(printed[1])
    assert second != greedy(model, tmp_path, "then")


def test_an_adapter_folder(saved, tmp_path, monkeypatch, capsys):
    """An adapter without a tokenizer uses that of its base model."""
    model = AutoModelForCausalLM.from_pretrained(saved / "student")
    plain = greedy(model, saved / "student", turns("hello"))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    (printed,) = talk(monkeypatch, capsys, ["hello"], "--student", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(saved / "student")
    answer = greedy(PeftModel.from_pretrained(base, tmp_path), saved / "student", turns("hello"))
    assert answer != plain
    assert squeezed(answer) in squeezed(printed)


@pytest.fixture(scope="module")
def for_vllm(tmp_path_factory):
    """Models that vLLM has kernels for."""
    folder = tmp_path_factory.mktemp("models")
    return save_models(folder, student=make_model(0, **SHAPE), teacher=make_model(1, **SHAPE))


def test_engines_of_vllm_answer_as_the_models_here(engines, for_vllm, monkeypatch, capfd):
    """Two at once, in pieces of five tokens."""
    monkeypatch.setattr(SpeakerInPieces, "_TOGETHER", 5)
    flags = ["--student", for_vllm / "student", "--teacher", for_vllm / "teacher", "--generation_backend", "vllm"]
    printed = talk(monkeypatch, capfd, ["hello", "and then?"], *flags, "--vllm_memory", "0.2")
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(for_vllm / role)
        first = greedy(model, for_vllm / role, turns("hello"))
        second = greedy(model, for_vllm / role, turns("hello", first, "and then?"))
        for part, answer in zip(printed, (first, second), strict=True):
            assert squeezed(f"{role}: {for_vllm / role}{answer}") in squeezed(part)
    assert f"{TOKENS} tokens, " in printed[0]


def test_vllm_samples_by_the_models_own_config(stand_in):
    own = GenerationConfig(top_p=0.8, repetition_penalty=1.1)
    asked = vars(own_parameters(own, 0.7, 5, [2]))
    assert {"temperature": 0.7, "max_tokens": 5, "stop_token_ids": [2], "top_k": 50}.items() <= asked.items()
    assert {"top_p": 0.8, "min_p": 0.0, "repetition_penalty": 1.1}.items() <= asked.items()
    assert vars(own_parameters(None, 0.0, 5, [2]))["repetition_penalty"] == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vllm_memory", "1.5"], "--vllm_memory is a share of the GPU's memory, between 0 and 1, not 1.5"),
        (["--device", "cpu"], "--device cpu: with --generation_backend vllm CUDA_VISIBLE_DEVICES chooses the GPU"),
        (["--teacher", "{adapter}"], "is an adapter, and --generation_backend vllm takes whole models: gkd export"),
    ],
)
def test_what_vllm_can_not_have_is_refused(stand_in, saved, tmp_path, capsys, flags, message):
    (tmp_path / "adapter_config.json").write_text("{}")
    flags = [flag.format(adapter=tmp_path) for flag in flags]
    with pytest.raises(SystemExit):
        main(["--student", str(saved / "student"), "--generation_backend", "vllm", *flags])
    assert message in capsys.readouterr().err


def test_an_engine_that_does_not_start_ends_the_chat(stand_in, for_vllm, monkeypatch, capsys):
    flags = ["--student", for_vllm / "student", "--generation_backend", "vllm", "--vllm_memory", "0.95"]
    with pytest.raises(
        SystemExit, match=r"gkd chat: vLLM did not start for \S+student: Free memory on device is less\. --vllm"
    ):
        talk(monkeypatch, capsys, ["hello"], *flags)


def arguments(**changes):
    options = {"system": None, "dtype": "auto", "device": "cpu", "temperature": 0.0, "max_new_tokens": TOKENS}
    return argparse.Namespace(**(options | changes))


def test_an_answer_that_is_stopped_is_kept(saved, tokenizer):
    speaker = LoadedSpeaker("", str(saved / "student"), tokenizer, arguments(max_new_tokens=100))
    answer = Answer(tokenizer)
    answer.stopped = True
    speaker.answer("hello", answer)
    assert len(answer.ids) == 1
    assert answer.figures().endswith("stopped")
    assert speaker.messages == turns("hello", answer.text)


def test_a_conversation_that_is_too_long_says_so_and_can_be_cleared(saved, tokenizer):
    speaker = LoadedSpeaker("", str(saved / "student"), tokenizer, arguments(max_new_tokens=1000))
    room, none = Answer(tokenizer), Answer(tokenizer)
    speaker.answer("x" * 485, room)
    assert 0 < len(room.ids) <= 512 - 485
    speaker.answer("more", none)
    assert none.figures() == "failed: the conversation fills the model's 512 positions: /clear forgets it"
    speaker.clear()
    speaker.answer("more", again := Answer(tokenizer))
    assert again.ids


def test_a_teacher_behind_a_server_answers_in_pieces(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GKD_TEACHER_TOKEN", TOKEN)
    monkeypatch.setattr(ServedSpeaker, "_TOGETHER", 5)
    model = AutoModelForCausalLM.from_pretrained(saved / "teacher")
    flags = "--student", saved / "student", "--teacher"
    with in_thread(model.eval(), tmp_path) as served:
        printed = talk(monkeypatch, capsys, ["hello", "and then?"], *flags, served.url)
        expected = talk(monkeypatch, capsys, ["hello", "and then?"], *flags, saved / "teacher")
        for answer, wanted in zip(printed, expected, strict=True):
            *_, told, text = answer.rpartition("teacher: tiny (weights ")
            assert told
            assert re.search(r"\d+ tokens, [\d.]+ tokens/s", text)
            assert text.splitlines()[1:-2] == wanted.rpartition("teacher: ")[2].splitlines()[1:-2]
        speaker = ServedSpeaker(served.url, arguments(temperature=1.0, max_new_tokens=1000))
        speaker.answer("x" * 485, answer := Answer(speaker.tokenizer))
        assert 0 < len(answer.ids) <= 512 - 485
        speaker.clear()
        stopped = Answer(speaker.tokenizer)
        stopped.stopped = True
        speaker.answer("hello", stopped)
        assert (stopped.ids, stopped.note) == ([], "stopped")


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as error:
        main([*map(str, flags)])
    return error.value.code, capsys.readouterr().err


def test_bad_input(saved, tmp_path, capsys):
    code, said = refused(capsys, "--student", saved / "student", "--teacher", tmp_path)
    assert code == 2
    assert f"--teacher {tmp_path}: no model in this folder, neither config.json nor adapter_config.json.\n" in said
    message, said = refused(capsys, "--student", "no-such/model")
    assert message.startswith("gkd chat: no-such/model: no model and tokenizer there, on disk or on the hub: ")
    assert "\n" not in message + said
    (tmp_path / "checkpoint-20").mkdir()
    _, said = refused(capsys, "--student", tmp_path)
    assert said.endswith(f"Its last checkpoint is {tmp_path / 'checkpoint-20'}.\n")

    broken = tmp_path / "broken"
    make_model(0).save_pretrained(broken)
    make_tokenizer("{{ raise_exception('no system prompts') }}").save_pretrained(broken)
    message, _ = refused(capsys, "--student", broken, "--system", "x")
    assert message == f"gkd chat: {broken}: its chat template refuses the conversation: no system prompts"
    make_tokenizer().save_pretrained(broken)
    (broken / "model.safetensors").write_bytes(b"half of a file")
    message, _ = refused(capsys, "--student", broken)
    assert message.startswith(f"gkd chat: {broken}/model.safetensors is not whole: ")
    assert "\n" not in message

    for flag, value in (
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--max_new_tokens", "0"),
        ("--device", "x"),
    ):
        code, said = refused(capsys, "--student", saved / "student", flag, value)
        assert code == 2
        assert f"error: {flag}" in said


def drawn(width, growing=False, text="[bold]one[/bold]", height=20):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    speakers = [SimpleNamespace(title=role) for role in ("student: s", "teacher: t")]
    answers = [SimpleNamespace(text=said, figures=lambda: "5 tokens") for said in (text, "two")]
    console.print(show(console, speakers, answers, growing))
    return console.file.getvalue().splitlines()


def test_side_by_side_or_one_below_the_other():
    wide = drawn(80)
    assert any("student: s" in line and "teacher: t" in line for line in wide)
    assert any("[bold]one[/bold]" in line and "two" in line for line in wide)
    assert sum(line.count("5 tokens") for line in wide) == 2
    assert drawn(79) == ["student: s", "[bold]one[/bold]", "5 tokens", "", "teacher: t", "two", "5 tokens", ""]


@pytest.mark.parametrize("width", [79, 120])
def test_while_it_grows_an_answer_shows_its_end_and_fits_the_screen(width):
    text = "\n".join(f"line {i}." for i in range(100))
    growing = drawn(width, growing=True, text=text)
    assert len(growing) < 20
    assert any("line 99." in line for line in growing)
    assert not any("line 5." in line for line in growing)
    assert any("student: s" in line for line in growing)
    assert any("line 5." in line for line in drawn(width, text=text))


@pytest.mark.parametrize("interactive", [True, False])
def test_interrupt_at_the_prompt(interactive, monkeypatch):
    """At the prompt, Ctrl-C drops the line and keeps the conversation; it ends a pipe."""
    said = iter(["one", KeyboardInterrupt, " two ", EOFError])

    def say(shown):
        word = next(said)
        if not isinstance(word, str):
            raise word
        return word

    monkeypatch.setattr("builtins.input", say)
    if interactive:
        assert list(read_prompts(True)) == ["one", "two"]
    else:
        prompts = read_prompts(False)
        assert next(prompts) == "one"
        with pytest.raises(KeyboardInterrupt):
            next(prompts)


def test_on_a_terminal(saved, tmp_path):
    """Answers stream; Ctrl-C stops the answer and not the chat, Ctrl-D quits."""
    endless = make_model(0, max_position_embeddings=1_000_000)
    with torch.no_grad():
        endless.lm_head.weight[:6] = 0  # no special token is the likeliest
    endless.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gkd", "chat", "--student", str(tmp_path), "--teacher", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--temperature", "0", "--max_new_tokens", "900000"],
        cwd=REPO,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that it gets the signal of Ctrl-C
    )
    os.close(theirs)
    try:

        def read_until(pattern):
            seen = ""
            while not re.search(pattern, seen):
                seen += os.read(ours, 65536).decode(errors="replace")
            return seen

        prompt = r"(\n|\x1b\[\?2004h)> $"  # not a > in a model's answer
        read_until(prompt)
        os.write(ours, b"hello\n")
        read_until(" tokens/s")
        os.write(ours, b"\x03")
        stopped = read_until(prompt)
        assert stopped.count("stopped") >= 2
        assert "Traceback" not in stopped
        assert "^C" not in stopped  # an echo would tear the screen
        os.write(ours, b"\x04")
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
