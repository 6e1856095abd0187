"""Exported models compute what was trained, whatever modules are adapted; a lossy merge leaves no folder."""

import importlib.util
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from tiny import REPO, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, pipeline
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

import export_model
import gkd.cli.shrink
import gkd.export.exporter
import train_gkd
from gkd.export.source import find_model
from gkd.models.loading import load_trained
from gkd.models.shrink import shrink

ANSWERS = REPO / "data/sample_answers.json"
IDS = torch.arange(20, 60).reshape(2, 20)
PROJECTIONS = ["q_proj", "up_proj", "down_proj"]


METHOD = {
    "teacher_model_name_or_path": "org/large",
    "lmbda": 1.0,
    "beta": 1.0,
    "seq_kd": False,
    "kd_ratio": 1.0,
    "temperature": 0.9,
    "loss_temperature": 1.0,
    "max_new_tokens": 128,
}


@pytest.fixture
def run(tmp_path, tokenizer):
    """Makes `tmp_path/run` as training leaves it: a whole model, or an adapter with random weights on `tmp_path/base`."""

    def make(model, folder="run", record=None, **lora):
        out = tmp_path / folder
        out.mkdir(exist_ok=True)
        if lora:
            base = tmp_path / "base"
            model.save_pretrained(base)
            model = get_peft_model(
                AutoModelForCausalLM.from_pretrained(base),
                LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **lora),
            )
            with torch.no_grad():  # modules_to_save begin as copies of the base's
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        if record is not None:
            (out / "run.json").write_text(json.dumps(record))
        return out

    return make


def export(run, out, *flags):
    export_model.main([str(word) for word in (run, "-o", out, "--device", "cpu", *flags)])


def refused(capsys, *words) -> str:
    """The message with which the command stops."""
    with pytest.raises(SystemExit) as stop:
        export(*words)
    assert stop.value.code not in (0, None)
    return f"{stop.value} {capsys.readouterr().err}"


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits.float()


MODELS = {
    "all linear": ({}, {"target_modules": "all-linear"}),
    "all linear, tied": ({"tie_word_embeddings": True}, {"target_modules": "all-linear"}),
    "head": ({}, {"target_modules": ["lm_head"]}),
    "head, tied": ({"tie_word_embeddings": True}, {"target_modules": ["lm_head", *PROJECTIONS]}),
    "embeddings, tied": ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", *PROJECTIONS]}),
    "both as one, tied": (
        {"tie_word_embeddings": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "saved module": ({}, {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head", "norm"]}),
    "saved head, tied": (
        {"tie_word_embeddings": True},
        {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head"]},
    ),
    "saved embeddings, tied": (
        {"tie_word_embeddings": True},
        {"target_modules": PROJECTIONS, "modules_to_save": ["embed_tokens"]},
    ),
    "saved both as one, tied": (
        {"tie_word_embeddings": True},
        {"target_modules": PROJECTIONS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "DoRA": ({}, {"target_modules": PROJECTIONS, "use_dora": True, "use_rslora": True}),
    "whole": ({}, {}),
    "whole, tied": ({"tie_word_embeddings": True}, {}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("config", "lora"), MODELS.values(), ids=MODELS.keys())
def test_the_export_computes_what_was_trained(run, tmp_path, config, lora):
    folder = run(make_model(0, **config), **lora)
    export(folder, tmp_path / "out")
    expected = logits(load_trained(str(folder), torch.float32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    tied = bool(config) and not (
        {"lm_head", "embed_tokens"} & {*lora.get("target_modules", ()), *lora.get("modules_to_save", ())}
    )
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    if lora:
        base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        assert (base - expected).norm() > 0.01 * expected.norm()


def test_a_student_of_its_teachers_layers(run, tmp_path):
    folder = run(shrink(make_model(0, num_hidden_layers=5), [0, 2, 4]), target_modules="all-linear")
    export(folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(model), logits(load_trained(str(folder), torch.float32)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [{"target_modules": "all-linear"}, {}], ids=["lora", "whole"])
def test_bfloat16(run, tmp_path, capsys, lora):
    folder = run(make_model(0), **lora)
    export(folder, tmp_path / "out", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = logits(load_trained(str(folder), torch.float32))
    assert (logits(model) - expected).norm() < 0.1 * expected.norm()
    assert "parameters, bfloat16" in capsys.readouterr().out


def test_auto_keeps_the_dtype_of_the_base(run, tmp_path):
    export(run(make_model(0, dtype=torch.bfloat16), target_modules="all-linear"), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_generation_ends_on_each_stop_token(run, tmp_path):
    """<|eos|> of the model, <|end|> of the tokenizer, <|user|> of the teacher; and no combination that can't be saved."""
    teacher = tmp_path / "teacher"
    make_model(1).save_pretrained(teacher)
    GenerationConfig(eos_token_id=[1, 4]).save_pretrained(teacher)
    model = make_model(0)
    folder = run(model, record={"arguments": METHOD | {"teacher_model_name_or_path": str(teacher)}})
    GenerationConfig(eos_token_id=1).save_pretrained(folder)
    greedy = json.loads((folder / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(greedy))
    export(folder, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.generation_config.eos_token_id == [1, 2, 4]
    assert exported.generation_config.pad_token_id == 0
    assert not exported.generation_config.temperature
    prompt = torch.tensor([[4, 20, 21, 5]])
    exported.lm_head.weight.data.zero_()
    for stop in (1, 2, 4):  # a head that says nothing but this token
        hook = exported.lm_head.register_forward_hook(
            lambda m, i, out, stop=stop: out.index_fill(-1, torch.tensor([stop]), 9.0)
        )
        assert exported.generate(prompt, max_new_tokens=5)[0, prompt.shape[1] :].tolist() == [stop]
        hook.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lost_adapter_is_caught(run, tmp_path, capsys, monkeypatch, dtype):
    folder = run(make_model(0), target_modules="all-linear")
    monkeypatch.setattr(gkd.export.exporter, "merge", lambda model: model.unload())
    assert "nearer to its base than to the trained student" in refused(
        capsys, folder, tmp_path / "out", "--dtype", dtype
    )
    assert not list(tmp_path.glob("out*"))


def test_a_damaged_weight_is_caught(run, tmp_path, capsys, monkeypatch):
    def damage(model, merge=gkd.export.exporter.merge):
        merged = merge(model)
        merged.model.layers[1].mlp.up_proj.weight.data *= 1.01
        return merged

    folder = run(make_model(0), target_modules="all-linear")
    monkeypatch.setattr(gkd.export.exporter, "merge", damage)
    said = refused(capsys, folder, tmp_path / "out")
    assert "does not compute what was trained" in said
    assert "rounding to its dtype alone makes 0.00e+00" in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("command", ["export", "shrink"])
def test_a_folder_of_the_users_beside_the_output_stays(run, tmp_path, monkeypatch, capsys, command, fails):
    """A folder `out.partial` of the user is left alone; the temporary folder is deleted on failure."""
    folder = run(make_model(0))
    mine = tmp_path / "out.partial/thesis.txt"
    mine.parent.mkdir()
    mine.write_text("four years")
    before = set(tmp_path.iterdir())
    if fails:
        monkeypatch.setattr(
            "transformers.PreTrainedTokenizerBase.save_pretrained", MagicMock(side_effect=OSError("full"))
        )
    with pytest.raises((SystemExit, OSError)) if fails else nullcontext():
        if command == "export":
            export(folder, tmp_path / "out")
        else:
            monkeypatch.setattr("sys.argv", ["shrink", str(folder), "-o", str(tmp_path / "out"), "--layers", "2"])
            gkd.cli.shrink.main()
    assert mine.read_text() == "four years"
    assert set(tmp_path.iterdir()) - before == (set() if fails else {tmp_path / "out"})
    if not fails:
        assert (tmp_path / "out/model.safetensors").is_file()
        assert (tmp_path / "out").stat().st_mode == folder.stat().st_mode


def test_checkpoints(run, tmp_path, capsys):
    folder = tmp_path / "run"
    for step in (2, 4, 10):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}/model.safetensors").touch()
    state = {"best_model_checkpoint": "/elsewhere/run/checkpoint-2", "global_step": 10}
    (folder / "checkpoint-10/trainer_state.json").write_text(json.dumps(state))
    for checkpoint, step in ((None, 10), ("last", 10), ("best", 2), ("4", 4)):
        assert find_model(str(folder), checkpoint) == folder / f"checkpoint-{step}"
    assert find_model(str(folder / "checkpoint-4"), None) == folder / "checkpoint-4"
    said = refused(capsys, folder, tmp_path / "out", "--checkpoint", "5")
    assert "There is: checkpoint-2, checkpoint-4, checkpoint-10." in said
    (folder / "checkpoint-10/trainer_state.json").unlink()
    assert "knows no best checkpoint" in refused(capsys, folder, tmp_path / "out", "--checkpoint", "best")
    run(make_model(10), "run/checkpoint-10")
    export(folder, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(make_model(10)))
    assert f"{folder} has no final model: exporting {folder}/checkpoint-10." in capsys.readouterr().out
    run(make_model(7))
    assert find_model(str(folder), None) == folder  # the final model goes before checkpoints


BAD = {
    "no run": (["{tmp}/nowhere"], "nowhere: no such folder."),
    "nothing in it": (["{tmp}/empty"], "empty holds neither a model nor an adapter nor a checkpoint."),
    "no checkpoints": (["{tmp}/run", "--checkpoint", "last"], "run holds no checkpoint."),
    "what checkpoint": (
        ["{tmp}/run", "--checkpoint", "final"],
        "--checkpoint takes last, best or a step, not 'final'.",
    ),
    "base gone": (["{tmp}/run"], "an adapter on {tmp}/base, whose config can't be loaded"),
    "no bitsandbytes": (["{tmp}/quantized"], "trained on a quantized base, which needs bitsandbytes"),
    "output exists": (["{tmp}/run", "-o", "{tmp}/full"], "full exists already and is not an empty folder."),
    "output is a file": (["{tmp}/run", "-o", "{tmp}/full/file"], "file is a file, not a folder."),
    "private alone": (["{tmp}/run", "--private"], "--private is about --push_to_hub."),
    "no repository": (["{tmp}/run", "--push_to_hub", "a/b/c"], "--push_to_hub: "),
    "damaged record": (["{tmp}/damaged"], "damaged/run.json is damaged: "),
    "damaged state": (["{tmp}/stated"], "stated/trainer_state.json is damaged: it is no object"),
    "damaged state of a checkpoint": (
        ["{tmp}/run", "--checkpoint", "best"],
        "checkpoint-1/trainer_state.json is damaged: it is no object",
    ),
    "no token": (["{tmp}/run", "--push_to_hub", "a/b"], "--push_to_hub needs a token of the hub"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(run, tmp_path, capsys, monkeypatch, words, message):
    run(make_model(0), "quantized", {"arguments": {"load_in_4bit": True}}, target_modules=["q_proj"])
    run(make_model(0), target_modules=["q_proj"])
    (run(make_model(0), "damaged", target_modules=["q_proj"]) / "run.json").write_text('{"arguments": {"load_in_4bit"')
    (tmp_path / "base").rename(tmp_path / "moved")
    (run(make_model(0), "stated") / "trainer_state.json").write_text("[]")
    if "best" in words:
        (tmp_path / "run/checkpoint-1").mkdir()
        (tmp_path / "run/checkpoint-1/trainer_state.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    monkeypatch.setattr("gkd.cli.checks.is_offline_mode", lambda: False)
    monkeypatch.setattr("gkd.cli.checks.get_token", lambda: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    words = [word.format(tmp=tmp_path) for word in words]
    if "-o" not in words:
        words += ["-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        export_model.main(words)
    assert stop.value.code != 0
    assert message.format(tmp=tmp_path) in f"{stop.value} {capsys.readouterr().err}"
    assert not list(tmp_path.glob("out*"))


def test_a_real_run_and_its_card(saved, tmp_path, capsys):
    out = tmp_path / "run"
    flags = (
        "--lmbda 0.5 --seq_kd True --beta 0 --use_peft --lora_r 4 --max_steps 2 --save_steps 1 --hub_token hf_secret \
        --max_new_tokens 8 --max_length 200 --report_to none --learning_rate 1e-2 --disable_tqdm True --preflight off"
    )
    models = f"--model_name_or_path {saved}/student --teacher_model_name_or_path {saved}/teacher"
    train_gkd.main(f"{models} --dataset_name {ANSWERS} --output_dir {out} {flags}".split())

    def result(model, step, value):
        metrics = {"dataset/forward_kl": {"value": value, "low": value - 0.125, "high": value + 0.125}}
        rest = {
            "beta": 0.0,
            "references": "the data's answers",
            "records": "r",
            "parameters": 1,
            "gib": 1,
            "tokens_per_second": 1,
        }
        return {
            "model": model,
            "step": step,
            "data": "heldout.json",
            "rows": 40,
            "settings": "s",
            "metrics": metrics,
        } | rest

    results = [result("before", 0, 2.0), result("step 1", 1, 1.5), result("after", 2, 1.25)]
    teacher = result("teacher", None, 0) | {
        "metrics": {"score/exact_match": {"value": 0.5, "low": 0.25, "high": 0.75}}
    }
    (out / "evaluation").mkdir(exist_ok=True)
    (out / "evaluation/results.json").write_text(json.dumps({"results": [*results, teacher]}))

    export(out, tmp_path / "mine")
    said = capsys.readouterr().out
    assert f"Checked on {ANSWERS}: its logits are" in said
    assert f"vllm serve {tmp_path}/mine" in said
    card = ModelCard.load(tmp_path / "mine/README.md")
    assert card.data.tags == ["gkd", "knowledge-distillation"]
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers")
    for line in (
        "| student before training | student |",
        "| teacher | teacher |",
        f"| data, train | {Path(ANSWERS).name}: 4 rows, 4 with an answer |",
        "forward KL(teacher‖student) (β = 0.0)",
        "## Held out: heldout.json, 40 rows",
        "| | before | after | teacher |",
        "| forward KL, the data's answers | 2 [1.88, 2.12] | 1.25 [1.12, 1.38] |  |",
        "| `--lora_r` | `4` |",
        "arXiv 2306.13649",
        "vllm serve mine",
    ):
        assert line in card.content
    text = "".join(path.read_text() for path in (tmp_path / "mine").iterdir() if path.suffix != ".safetensors")
    assert "hf_secret" not in text
    assert "hub_token" not in text
    assert str(tmp_path) not in text.replace(str(saved), "")

    answer = pipeline("text-generation", str(tmp_path / "mine"))([{"role": "user", "content": "hi"}], max_new_tokens=4)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    export(out, tmp_path / "first", "--checkpoint", "1")
    assert "| | before | step 1 | teacher |" in (tmp_path / "first/README.md").read_text()


def test_a_record_that_says_little(run, tmp_path):
    (run(make_model(0), record={"arguments": {"model_name_or_path": "x"}}) / "trainer_state.json").write_text("{}")
    export(tmp_path / "run", tmp_path / "out")
    assert "| student before training | x |" in (tmp_path / "out/README.md").read_text()


def test_without_a_record(run, tmp_path, capsys):
    export(run(make_model(0), target_modules="all-linear"), tmp_path / "out")
    assert "Checked on built-in texts" in capsys.readouterr().out
    card = (tmp_path / "out/README.md").read_text()
    assert "| student before training | base |" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_a_card_shows_values_of_a_record_as_text(run, tmp_path, capsys):
    """Neither Markdown, HTML nor YAML of somebody's run.json is read; a name with escapes does not reach the terminal."""
    rows = tmp_path / "\x1b[2Jrows.json"
    shutil.copy(ANSWERS, rows)
    evil = "a | b <img src=x onerror=y> `c` [d](javascript:e)\n\n# Owned\n---\nlicense: owned\n---\n{{ 7 * 7 }}"
    arguments = METHOD | {"model_name_or_path": evil, "teacher_model_name_or_path": evil, "dataset_name": str(rows)}
    arguments |= {"dataset_train_split": "train", "dataset_config": None, "run_note": evil, "x` <b>": evil}
    data = {evil: {"name": evil, "rows": evil, "answered": evil}}
    record = {"arguments": arguments, "changed": [*arguments, evil], "data": data, "versions": {evil: evil}}
    folder = run(make_model(0), record=record)
    value = {"value": 1.0, "low": 0.5, "high": 2.0}
    result = {
        "model": "after",
        "step": None,
        "data": evil,
        "rows": evil,
        "settings": "s",
        "metrics": {f"score/{evil}": value},
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation/results.json").write_text(json.dumps({"results": [result]}))
    export(folder, tmp_path / "out")
    assert "Checked on " in (said := capsys.readouterr().out)
    assert "\x1b" not in said
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    drawn = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    assert re.findall("<h1>(.*)</h1>", drawn) == ["out"]
    assert not re.search("<(img|b|hr)[ >]", drawn)
    assert drawn.count("href=") == 1  # the paper's
    assert "49" not in drawn.replace("2306.13649", "")
    assert drawn.count("&lt;img src=x") >= 8


def test_base_model_of_a_hub_id(run, tmp_path):
    folder = run(make_model(0), record={"arguments": {"model_name_or_path": "org/small"} | METHOD})
    export(folder, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out/README.md").data.base_model == "org/small"


def test_push_to_hub(run, tmp_path, capsys, monkeypatch):
    folder, api = run(make_model(0)), MagicMock()
    monkeypatch.setattr("gkd.cli.checks.is_offline_mode", lambda: False)
    monkeypatch.setattr("gkd.cli.checks.get_token", lambda: "hf_secret")
    for user in ("gkd.cli.export", "gkd.cli.checks"):
        monkeypatch.setattr(f"{user}.HfApi", lambda: api)
    export(folder, tmp_path / "out", "--push_to_hub", "me/small", "--private")
    api.create_repo.assert_called_once_with("me/small", private=True, exist_ok=True)
    api.upload_folder.assert_called_once_with(repo_id="me/small", folder_path=tmp_path / "out")
    assert "vllm serve me/small" in (tmp_path / "out/README.md").read_text()
    api.whoami.assert_called_once_with("hf_secret")
    api.upload_folder.side_effect = RuntimeError("no network")
    said = refused(capsys, folder, tmp_path / "again", "--push_to_hub", "me/small")
    assert "again is exported, but not pushed to me/small: no network" in said
    assert (tmp_path / "again/model.safetensors").is_file()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_qlora(run, tmp_path, bits):
    """The adapter is merged into the weights that it was trained on: the dequantized ones, not the originals."""
    stored = make_model(0, hidden_size=64, intermediate_size=128, dtype=torch.bfloat16)
    arguments = {
        **{"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "dtype": "bfloat16", "model_revision": "main"},
        **{"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": None},
    }
    folder = run(stored, record={"arguments": arguments | METHOD}, target_modules="all-linear")
    export(folder, tmp_path / "out", "--dtype", "float32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.float32
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype="bfloat16",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
    layer = load_trained(str(folder), "auto", quantization).get_submodule(
        "base_model.model.model.layers.0.mlp.up_proj"
    )
    packed = layer.get_base_layer()
    unpacked = dequantize_bnb_weight(packed.weight, getattr(packed, "state", None)).float().cpu()
    delta = layer.get_delta_weight("default").float().cpu()
    before = stored.model.layers[0].mlp.up_proj.weight.float()
    assert (unpacked - before).norm() > 0.001 * before.norm()
    torch.testing.assert_close(
        exported.model.layers[0].mlp.up_proj.weight.data, unpacked + delta, rtol=1e-5, atol=1e-5
    )
