"""Heads of several architectures, students made of a teacher's layers, and what an output folder holds."""

import pytest
import torch
from tiny import make_model
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from gkd.dropout import disable_base_dropout, has_dropout
from gkd.heads import check_projection
from gkd.run_folder import resume_point
from gkd.shrink import kept_layers, shrink

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_model(0),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3, pad_token_id=0)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, pad_token_id=0)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    ],
    ids=["llama", "cohere: logit scale", "gemma: softcap", "gpt2: learned positions"],
)
def test_head_of_hidden_states_equals_the_models_logits(model):
    check_projection(model(), "student")


def test_other_logits_are_refused():
    model = make_model(0)
    model.register_forward_hook(lambda m, args, output: setattr(output, "logits", output.logits * 3))
    with pytest.raises(ValueError, match="The student .* does not compute its logits as head"):
        check_projection(model, "student")


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
