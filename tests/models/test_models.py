"""Heads of several architectures, students made of a teacher's layers, and what an output folder holds."""

from types import SimpleNamespace

import pytest
import torch
from families import make_family
from peft import LoraConfig, get_peft_model
from tiny import make_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from gkd.cli.shrink import kept_layers, shrink
from gkd.compat import set_checkpointing_kwargs
from gkd.models.heads import check_projection
from gkd.models.loading import load_pretrained
from gkd.runs.folder import resume_point
from gkd.training.dropout import disable_base_dropout, has_dropout, random_modules, settle_dropout
from gkd.training.trainer import GKDTrainer


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_model(0),
        lambda: make_family("cohere"),
        lambda: make_family("gemma2"),
        lambda: make_family("recurrent_gemma"),
        lambda: make_family("gpt2"),
    ],
    ids=["llama", "cohere: logit scale", "gemma: softcap", "recurrent gemma: its softcap", "gpt2: learned positions"],
)
def test_head_of_hidden_states_equals_the_models_logits(model):
    check_projection(model(), "student")


def test_other_logits_are_refused():
    model = make_model(0)
    model.register_forward_hook(lambda m, args, output: setattr(output, "logits", output.logits * 3))
    with pytest.raises(ValueError, match="The student .* does not compute its logits as head"):
        check_projection(model, "student")


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match="The teacher .BertGenerationDecoder. sees tokens that are yet to come"):
        check_projection(make_family("bert-generation"), "teacher")


def test_architectures_that_cannot_be_trained_are_refused(tmp_path, teacher):
    """By the config before weights load, and in the trainer."""
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5 is an encoder-decoder; gkd trains decoder-only language models."):
        load_pretrained(str(tmp_path))
    student = T5ForConditionalGeneration(
        T5Config(vocab_size=264, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    )
    with pytest.raises(ValueError, match="The student: t5 is an encoder-decoder"):
        GKDTrainer(student, teacher)
    with pytest.raises(ValueError, match="The student: llama4_text .* is not supported yet"):
        GKDTrainer(make_family("llama4_text"), teacher)


def test_shrink_keeps_first_and_last_layer_and_generates():
    assert kept_layers(30, 15)[0] == 0
    assert kept_layers(30, 15)[-1] == 29
    assert len(set(kept_layers(30, 15))) == 15
    with pytest.raises(ValueError, match="keep between 2 and 30"):
        kept_layers(30, 31)
    teacher, model = make_model(0, num_hidden_layers=5), make_model(0, num_hidden_layers=5)
    shrink(model, 3)
    assert model.config.num_hidden_layers == 3
    for mine, his in zip(model.model.layers, (0, 2, 4), strict=True):
        assert torch.equal(mine.mlp.up_proj.weight, teacher.model.layers[his].mlp.up_proj.weight)
    cached = model.generate(torch.tensor([[20, 21]]), max_new_tokens=6, do_sample=False, use_cache=True)
    plain = model.generate(torch.tensor([[20, 21]]), max_new_tokens=6, do_sample=False, use_cache=False)
    assert cached.equal(plain)


def test_output_folder(tmp_path):
    assert resume_point(str(tmp_path / "new"), None) is None
    assert resume_point(str(tmp_path / "new"), "auto") is None
    checkpoint = tmp_path / "run/checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    with pytest.raises(ValueError, match="already holds a run"):
        resume_point(str(tmp_path / "run"), None)
    assert resume_point(str(tmp_path / "run"), "auto") == str(checkpoint)
    assert resume_point(str(tmp_path / "run"), str(checkpoint)) == str(checkpoint)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        resume_point(str(tmp_path / "new"), "True")
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "model.safetensors").touch()
    for resume in (None, "auto", str(checkpoint)):  # a finished model without checkpoints is no start of anything
        with pytest.raises(ValueError, match="already holds a run .model.safetensors.. Choose another --output_dir"):
            resume_point(str(finished), resume)
    with pytest.raises(ValueError, match="not a checkpoint"):
        resume_point(str(tmp_path / "new"), "elsewhere")


@pytest.mark.parametrize(("config", "expected"), [({}, False), ({"attention_dropout": 0.1}, True)])
def test_dropout_that_modules_call_as_a_function_counts(config, expected):
    """Checkpointing must keep the random state for it, though no nn.Dropout tells of it."""
    model = make_model(0, **config)
    assert bool(has_dropout(model)) is expected
    disable_base_dropout(model)
    assert not has_dropout(model)


class Hiss(nn.Module):
    """Dropout under a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.chance = 0.3

    def forward(self, x):
        return nn.functional.dropout(x, self.chance, self.training)


def test_dropout_is_found_by_what_a_forward_draws():
    """Also LoRA's, which stays on."""
    model = make_model(0)
    for layer in model.model.layers:
        layer.mlp.act_fn = Hiss()
    lora = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"]))
    disable_base_dropout(lora)
    noisy = {layer.mlp.act_fn for layer in model.model.layers}
    of_lora = {layer.self_attn.q_proj.lora_dropout["default"] for layer in model.model.layers}
    assert set(random_modules(lora)[0]) == noisy | of_lora
    drawing, evaluating = settle_dropout(lora, disable=True, checkpointed=True, callable_alone=True)
    assert drawing
    assert set(evaluating) == noisy
    assert set(random_modules(lora, evaluating)[0]) == of_lora
    assert settle_dropout(lora, disable=False, checkpointed=True, callable_alone=True) == (True, [])


@pytest.mark.parametrize("callable_alone", [True, False], ids=["by a forward", "by names"])
@pytest.mark.parametrize("kind", ["gpt_bigcode", "mixtral", "phimoe", "seed_oss", "starcoder2"])
def test_no_randomness_is_left(kind, callable_alone):
    model = make_family(kind)
    disable_base_dropout(model)
    drawing, evaluating = settle_dropout(model, disable=True, checkpointed=True, callable_alone=callable_alone)
    assert not drawing
    assert random_modules(model, evaluating)[0] == []


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, False), (0.5, True)])
def test_checkpointing_saves_the_random_state_for_dropout_alone(train, dropout, expected):
    config = LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj"])
    trainer = train(make_model(0, attention_dropout=0.5), peft_config=config, gradient_checkpointing=True)
    options = trainer.model.get_base_model().model.layers[0]._gradient_checkpointing_func.keywords
    assert options.get("preserve_rng_state", True) is expected


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_checkpointing_kwargs": {"preserve_rng_state": True}},
        {
            "activation_checkpointing_kwargs": None,
            "gradient_checkpointing_kwargs": {"preserve_rng_state": True},
        },
        {
            "activation_checkpointing_kwargs": {"preserve_rng_state": True},
            "gradient_checkpointing_kwargs": None,
        },
    ],
    ids=["one name", "TRL's", "the newer one"],
)
def test_checkpointing_options_reach_both_names(given):
    args = SimpleNamespace(**given)
    set_checkpointing_kwargs(args, use_reentrant=False, preserve_rng_state=False)
    assert list(vars(args).values()) == [{"use_reentrant": False, "preserve_rng_state": True}] * len(given)
