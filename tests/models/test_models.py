"""Heads of several architectures."""

import pytest
from families import make_family
from tiny import make_model
from transformers import T5Config, T5ForConditionalGeneration

from gkd.models.heads import check_projection
from gkd.models.loading import load_pretrained
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
    """Refused by the config before weights load, and in the trainer."""
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
