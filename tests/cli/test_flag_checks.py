"""Errors in flags or in a model's files are reported in one line before weights load."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from tiny import ROWS, make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import cache_teacher
import eval_gkd
import export_model
import gkd.cli.chat
import gkd.cli.shrink
import train_gkd
from gkd.config.training import GKDArguments
from gkd.evaluation.bootstrap import figures_ahead
from gkd.models.loading import load_pretrained
from gkd.models.weights import rehearse
from gkd.runs.results import read_results
from gkd.training.trainer import GKDTrainer

EVAL = "--eval_dataset_name {m}/rows.json --eval_strategy steps --eval_steps 1 --save_steps 1 "


@pytest.fixture(scope="module")
def m(tmp_path_factory, saved, tokenizer):
    """A folder with a valid student and teacher, broken ones, adapters, and rows."""
    m = tmp_path_factory.mktemp("flags")
    for name in ("student", "teacher"):
        shutil.copytree(saved / name, m / name)
    for name in ("torn", "incomplete", "misshapen", "without_a_shard", "broken_tokenizer"):
        shutil.copytree(m / "teacher", m / name)
    weights = m / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    model = make_model(seed=1, hidden_size=48)
    state = model.state_dict()
    model.save_pretrained(m / "incomplete", state_dict={k: v for k, v in state.items() if "1.mlp.up_proj" not in k})
    make_model().save_pretrained(m / "misshapen")
    model.config.save_pretrained(m / "misshapen")
    (m / "without_a_shard/model.safetensors").unlink()
    model.save_pretrained(m / "without_a_shard", max_shard_size="20KB")
    next((m / "without_a_shard").glob("model-00002*")).unlink()
    (m / "broken_tokenizer/tokenizer.json").write_text('{"version": ')
    (m / "rows.json").write_text(json.dumps(ROWS))
    (m / "split").mkdir()
    for split in ("train", "test"):
        (m / f"split/{split}.json").write_text(json.dumps(ROWS))
    train_gkd.main(command(m, m / "adapter", "--use_peft --lora_target_modules q_proj"))
    shutil.copytree(m / "adapter", m / "torn_adapter")
    weights = m / "torn_adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, config in (
        ("listed", "[]"),
        ("unknown", {"peft_type": "NO_SUCH"}),
        ("baseless", {"base_model_name_or_path": None}),
    ):
        shutil.copytree(m / "adapter", m / name)
        path = m / name / "adapter_config.json"
        path.write_text(config if name == "listed" else json.dumps(json.loads(path.read_text()) | config))
    for name, text in {
        "null": "beta: null",
        "two": "divergence: tv\nbeta: 0.5",
        "list": "seed: [1]",
        "object": "lmbda: {a: 1}",
    }.items():
        (m / f"{name}.yaml").write_text(text)
    for name, changed in {
        "hub_code": {"attn_implementation": "somebody/kernel"},
        "no_layers": {"num_hidden_layers": 0},
        "odd_rope": {"rope_parameters": {"rope_type": "nope"}},
    }.items():
        shutil.copytree(m / "student", m / name)
        path = m / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    for name, text in {"listed_generation": "[]", "odd_stops": '{"eos_token_id": [2, "a"]}'}.items():
        shutil.copytree(m / "student", m / name)
        (m / name / "generation_config.json").write_text(text)
    return m


def command(m, out, flags: str = "") -> list[str]:
    base = (
        f"--model_name_or_path {m}/student --teacher_model_name_or_path {m}/teacher --dataset_name {m}/rows.json "
        f"--output_dir {out} --max_new_tokens 4 --max_length 64 --max_steps 1 --lmbda 0 --report_to none"
    )
    return base.split() + [word.format(m=m) for word in flags.split()]


REFUSED = {
    "--per_device_train_batch_size 0": "--per_device_train_batch_size must be positive, not 0.",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps must be positive",
    "--learning_rate -1": "--learning_rate must be a number from 0 on, not -1.0.",
    "--max_grad_norm nan": "--max_grad_norm must be a number from 0 on, not nan.",
    "--neftune_noise_alpha inf": "--neftune_noise_alpha must be a number from 0 on, not inf.",
    "--adam_epsilon 0": "--adam_epsilon must be positive",
    "--max_length 1": "No row has a token of its answer left in --max_length 1: there is nothing to train on.",
    "--model_name_or_path {m}/hub_code": "asks for the attention somebody/kernel, which is code from the hub",
    "--teacher_model_name_or_path {m}/hub_code": "asks for the attention somebody/kernel, which is code from the hub",
    "--model_name_or_path {m}/no_layers": "its config has 0 layers",
    "--model_name_or_path {m}/listed_generation": "{m}/listed_generation: its generation config can't be loaded",
    "--teacher_model_name_or_path {m}/odd_stops": "'a' is no id of a token, as eos_token_id",
    "--chat_template_path /nope.jinja": "--chat_template_path /nope.jinja: no such file or folder.",
    "--seed -1": "--seed must lie in [0, 4294967295], not -1.",
    "--adam_beta2 2": "can't be made: Invalid beta parameter at index 1: 2.0",
    "--max_steps 0": "--max_steps 0 trains nothing: give the number of steps",
    "--max_steps -1 --num_train_epochs 0": "--num_train_epochs 0.0 trains nothing",
    "--dataset_name {m}/split --output_dir {m}/split/run": "lies in the dataset's folder {m}/split",
    "--use_peft --lora_r 0": "--lora_r must be at least 1, not 0.",
    "--use_peft --lora_target_modules qproj": "--lora_target_modules qproj: the student has no such module; did you mean q_proj",
    "--use_peft --lora_target_modules q_proj vproj": "vproj: the student has no such module; did you mean v_proj",
    "--use_peft --lora_target_modules .*_projection": "Target modules .*_projection not found",
    "--use_peft --lora_target_modules [": "--lora_target_modules [: no pattern of names",
    "--report_to wandbb": "--report_to wandbb: no such tracker; did you mean wandb?",
    "--report_to comet_ml": "--report_to comet_ml needs a package that is not installed",
    "--optim galore_adamw": "--optim galore_adamw can't be made: You need to install `galore_torch`",
    "--optim sgd --optim_args momentum": "--optim sgd --optim_args momentum can't be made",
    "--lr_scheduler_type cosine_with_min_lr": "--lr_scheduler_type cosine_with_min_lr can't be made",
    "--save_strategy best": "--save_strategy best needs --metric_for_best_model",
    "--eval_on_start": "--eval_on_start needs held-out rows: name some by --eval_dataset_name.",
    "--eval_strategy epoch": "--eval_strategy epoch needs held-out rows",
    EVAL + "--metric_for_best_model eval_dataset/forward_lk": "did you mean dataset/forward_kl",
    EVAL + "--metric_for_best_model teacher/loss": "no evaluation of this run gives that; there are dataset/loss",
    "--push_to_hub": "--push_to_hub can't work while HF_HUB_OFFLINE is set",
    "--fsdp": "--fsdp shards the student over processes, and this is the only one",
    "--teacher_device meta": "--teacher_device meta: no such device",
    "--teacher_adapter {m}/student": "{m}/student: no adapter in this folder, no adapter_config.json.",
    "--student_adapter {m}/torn_adapter": "adapter_model.safetensors is not whole",
    "--teacher_adapter {m}/adapter": "{m}/adapter does not fit the model: base_model.model.model.layers.0",
    "--model_name_or_path {m}/torn": "{m}/torn/model.safetensors is not whole",
    "--teacher_model_name_or_path {m}/torn": "{m}/torn/model.safetensors is not whole",
    "--model_name_or_path {m}/incomplete": "its weights lack model.layers.1.mlp.up_proj.weight, which would be random",
    "--teacher_model_name_or_path {m}/incomplete": "its weights lack model.layers.1.mlp.up_proj.weight",
    "--teacher_model_name_or_path {m}/misshapen": "has the shape [264, 32] in its weights, but [264, 48] by its config",
    "--teacher_model_name_or_path {m}/without_a_shard": "is missing, which model.safetensors.index.json names",
    "--teacher_model_name_or_path {m}/broken_tokenizer": "{m}/broken_tokenizer: its tokenizer can't be loaded: Expecting value",
    "--model_name_or_path {m}/broken_tokenizer": "its tokenizer can't be loaded",
    "--attn_implementation x": '`attn_implementation="x"` is not supported',
    '--teacher_model_init_kwargs {{"flash":1}}': "got an unexpected keyword argument 'flash'",
    "--model_init_kwargs [1]": "--model_init_kwargs must be a JSON object",
    "--activation_checkpointing_kwargs x": "--activation_checkpointing_kwargs is not JSON",
    "--config {m}/null.yaml": "{m}/null.yaml: beta has no value: give it one, or leave it out.",
    "--config {m}/two.yaml": "--beta does not apply to --divergence tv: it is of jsd.",
    "--divergence skew_kl --beta 0.5": "--beta does not apply to --divergence skew_kl: it is of jsd.",
    "--divergence tv --skew_alpha 0.2": "--skew_alpha does not apply to --divergence tv: it is of skew_kl and skew_reverse_kl.",
    "--skew_alpha 0.1": "--skew_alpha does not apply to --divergence jsd",
    "--divergence skew_kl --skew_alpha 0": "--skew_alpha must lie between 0 and 1, not 0.0.",
    "--divergence skew_reverse_kl --skew_alpha 1": "--skew_alpha must lie between 0 and 1, not 1.0.",
    "--divergence skew_kl --skew_alpha nan": "--skew_alpha must lie between 0 and 1, not nan.",
    "--divergence skew": "invalid choice: 'skew'",
    "--config {m}/list.yaml": "{m}/list.yaml: seed takes a single value, not [1].",
    "--config {m}/object.yaml": "{m}/object.yaml: lmbda takes a single value, not {{'a': 1}}.",
    "--eval_temperature inf": "--eval_temperature must be a number from 0 on, not inf.",
    "--push_to_hub True --hub_model_id a/b/c": "--push_to_hub: Repo id must be in the form",
    "--dataloader_drop_last True --per_device_train_batch_size 8": "leaves nothing to train on",
}


@pytest.fixture
def no_weights(monkeypatch):
    real = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, name, *args, **kwargs):
        assert name is None, "weights were loaded"  # a load without weights has no name
        return real(cls, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))


def told(main, argv, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.rpartition("error: ")[2]
    assert "\n" not in said.strip()
    return said


@pytest.mark.parametrize(("flags", "message"), REFUSED.items(), ids=REFUSED)
def test_train_refuses_before_weights_load(m, tmp_path, capsys, no_weights, flags, message):
    said = told(train_gkd.main, command(m, tmp_path / "run", flags), capsys)
    assert message.format(m=m) in said


OTHERS = {
    eval_gkd.main: (
        "--models {m}/student --teacher_model_name_or_path {m}/teacher --dataset_name {m}/rows.json --output_dir {out} "
        "--max_new_tokens 4",
        {
            "--models {m}/torn": "{m}/torn/model.safetensors is not whole",
            "--teacher_model_name_or_path {m}/incomplete": "its weights lack",
            "--teacher_model_name_or_path {m}/broken_tokenizer": "its tokenizer can't be loaded",
            "--models {m}/torn_adapter": "adapter_model.safetensors is not whole",
            "--teacher_adapter {m}/student": "no adapter in this folder",
            "--teacher_model_init_kwargs [1]": "must be a JSON object",
            "--models {m}/hub_code": "asks for the attention somebody/kernel, which is code from the hub",
            "--models {m}/listed_generation": "{m}/listed_generation",
            "--models {m}/odd_stops": "'a' is no id of a token, as eos_token_id",
            "--seed -1": "--seed must lie in [0, 4294967295], not -1.",
            "--eval_temperature nan": "--eval_temperature must be a number from 0 on, not nan.",
            "--models {m}/listed": "{m}/listed: adapter_config.json can't be read",
            "--models {m}/unknown": "{m}/unknown: adapter_config.json can't be read",
            "--models {m}/baseless": "{m}/baseless: adapter_config.json names no base model",
            "--dataset_name {m}/split --output_dir {m}/split": "lies in the dataset's folder",
        },
    ),
    cache_teacher.main: (
        "--model_name_or_path {m}/student --teacher_model_name_or_path {m}/teacher --dataset_name {m}/rows.json "
        "--output_dir {out}",
        {
            "--teacher_model_name_or_path {m}/incomplete": "its weights lack",
            "--teacher_adapter {m}/nothing": "nothing: no such folder",
            "--teacher_adapter {m}/listed": "{m}/listed: adapter_config.json can't be read",
            "--seed -1": "--seed must lie in [0, 4294967295], not -1.",
            "--loss_temperature nan": "--loss_temperature must be positive, not nan.",
            "--temperature inf": "--temperature must be positive, not inf.",
            "--dataset_name {m}/split --output_dir {m}/split/cache": "lies in the dataset's folder",
        },
    ),
    export_model.main: (
        "-o {out}",
        {
            "{m}/torn_adapter": "adapter_model.safetensors is not whole",
            "{m}/listed": "{m}/listed: adapter_config.json can't be read",
            "{m}/unknown": "{m}/unknown: adapter_config.json can't be read",
            "{m}/baseless": "{m}/baseless: adapter_config.json names no base model",
            "{m}/hub_code": "asks for the attention somebody/kernel, which is code from the hub",
            "{m}/student --push_to_hub a/b": "--push_to_hub can't work while HF_HUB_OFFLINE is set",
        },
    ),
    gkd.cli.shrink.main: ("{m}/teacher -o {out}", {"--layers 1": "keep between 2 and 2 of them, not 1."}),
    gkd.cli.chat.main: ("--student {m}/student", {"--student {m}/torn": "{m}/torn/model.safetensors is not whole"}),
}
CASES = [(main, f"{base} {flags}", said) for main, (base, cases) in OTHERS.items() for flags, said in cases.items()]


@pytest.mark.parametrize(("main", "words", "message"), CASES)
def test_other_commands_refuse_before_weights_load(m, tmp_path, capsys, no_weights, main, words, message):
    said = told(main, [word.format(m=m, out=tmp_path / "out") for word in words.split()], capsys)
    assert message.format(m=m) in said


def test_what_only_a_load_shows_is_a_line(m):
    with pytest.raises(ValueError, match="odd_rope can't be loaded: KeyError: 'nope'"):
        load_pretrained(str(m / "odd_rope"))


def test_names_of_metrics_are_known_ahead(m, tmp_path):
    """The best model is chosen by a task metric, and by each figure that results.json then has."""
    mixed = [ROWS[0], {"messages": ROWS[1]["messages"][:1]}]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    flags = EVAL + "--metrics exact_match bleu --scorer json:dumps --metric_for_best_model score/bleu"
    train_gkd.main(command(m, tmp_path / "run", f"{flags} --eval_dataset_name {tmp_path}/mixed.json"))
    after = next(r for r in read_results(tmp_path / "run") if r["model"] == "after")
    known = figures_ahead(True, True, ["exact_match", "bleu", "dumps"])
    assert set(after["metrics"]) == set(known) - {"score/dumps"}  # which gave no number
    assert {k for k in figures_ahead(True, False, []) if k.startswith("teacher")} == set()


@pytest.fixture
def pickled(m, tmp_path):
    """A model that lacks a tensor in pickled weights, whose names are not checked before they load."""
    shutil.copytree(m / "teacher", tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    state = make_model(seed=1, hidden_size=48).state_dict()
    del state["model.norm.weight"]
    torch.save(state, tmp_path / "pickled/pytorch_model.bin")
    return tmp_path / "pickled"


@pytest.mark.parametrize(
    ("main", "flag"),
    [
        (eval_gkd.main, "--models"),
        (eval_gkd.main, "--teacher_model_name_or_path"),
        (cache_teacher.main, "--teacher_model_name_or_path"),
    ],
)
def test_what_shows_only_as_weights_load_is_a_line(m, pickled, tmp_path, capsys, main, flag):
    words = OTHERS[main][0].format(m=m, out=tmp_path / "out").split()
    said = told(main, [*words, flag, str(pickled)], capsys)
    assert "its weights lack model.norm.weight, which would be random" in said


@pytest.mark.parametrize("who", ["model", "teacher_model"])
def test_a_trainer_refuses_a_model_that_lacks_a_tensor(m, pickled, tmp_path, who):
    """Models by name, without a command."""
    args = GKDArguments(output_dir=str(tmp_path / "run"), report_to="none", max_new_tokens=4, max_length=64)
    names = {"model": str(m / "student"), "teacher_model": str(m / "teacher"), who: str(pickled)}
    with pytest.raises(ValueError, match="its weights lack model.norm.weight, which would be random"):
        GKDTrainer(**names, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=make_tokenizer())


SMALL = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 16,
}


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (lambda: make_model(), "lm_head.weight"),
        (lambda: make_model(tie_word_embeddings=True), "model.embed_tokens.weight"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)), "transformer.ln_f.bias"),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)),
            "model.layers.1.mlp.experts.down_proj",
        ),
    ],
    ids=["llama", "tied head", "gpt2", "mixtral: merged experts"],
)
def test_a_rehearsal_agrees_with_the_real_loading(tmp_path, make, lost):
    model = make()
    model.save_pretrained(tmp_path / "whole")
    assert rehearse(str(tmp_path / "whole"), {}) is not None
    load_pretrained(str(tmp_path / "whole"))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != lost}
    state.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    model.save_pretrained(tmp_path / "less", state_dict=state)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "less", output_loading_info=True)
    assert lost in info["missing_keys"]
    for load in (lambda name: rehearse(name, {}), load_pretrained):
        with pytest.raises(ValueError, match="its weights lack"):
            load(str(tmp_path / "less"))


def test_a_single_target_module_is_a_name(m):
    config = json.loads((m / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]  # not a pattern, which would match nothing
