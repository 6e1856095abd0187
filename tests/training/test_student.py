"""The student's forward in training: which layers are checkpointed, what is given up when memory is short, and that the
kernels put in place for it leave no trace. What CUDA graphs compute: tests/test_gpu.py."""

import sys
from contextlib import nullcontext
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from tiny import make_model
from trainers import TWELVE_ROWS, losses, make_trainer, tiny_trainer, weights

from gkd.models import kernels
from gkd.models.heads import base_of
from gkd.runs.choices import SPARE_MEMORY, Choices
from gkd.teachers.forward import TeacherForward
from gkd.training.student import KeptActivations


def kept(layers=4, budget=1000.0, per_token=1.0):
    model = make_model(0, num_hidden_layers=layers)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    chosen = KeptActivations(model, torch.device("cuda"), may_choose=True)
    chosen._budget, chosen._per_token = budget, per_token
    return model, chosen


def flags(model):
    return [layer.gradient_checkpointing for layer in model.model.layers]


def test_as_many_layers_keep_their_activations_as_fit():
    model, chosen = kept()
    for tokens, checkpointed in ((250, 0), (251, 1), (500, 2), (1000, 3), (1001, 4), (100, 0)):
        assert chosen.checkpointed(tokens) == checkpointed
        assert flags(model) == [True] * checkpointed + [False] * (4 - checkpointed)
    assert chosen.give_up()
    assert chosen.checkpointed(1) == 4
    assert not chosen.give_up()


def test_without_the_flag_no_layer_is_checkpointed():
    model = make_model(0)
    chosen = KeptActivations(model, torch.device("cuda"), may_choose=True)
    assert chosen.checkpointed(10**9) == 0
    assert not chosen.give_up()
    assert not any(flags(model))


def test_a_forward_before_training_decides_nothing():
    """transformers switches checkpointing on when training begins."""
    model, chosen = kept()
    model.gradient_checkpointing_disable()
    assert chosen.checkpointed(1001) == 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert chosen.checkpointed(500) == 2
    assert chosen.checkpointed(1) == 0
    assert chosen.checkpointed(500) == 2


@pytest.mark.parametrize("positions", [2048, 256])
def test_memory_is_measured_once_weights_are_cast_within_the_models_positions(monkeypatch, positions):
    """100 bytes of a layer's token; under autocast the first forward also casts 10,000,000 bytes of weights."""
    model, chosen = kept(budget=None, per_token=0.0)
    model.config.max_position_embeddings = positions
    monkeypatch.setattr(chosen, "device", torch.device("cpu"))
    held, lengths = [0], []

    def forward(student, ids, mask):
        assert torch.is_grad_enabled()
        assert not any(flags(model))
        lengths.append(ids.shape[1])
        held[0] = 10_000_000 + 4 * 100 * ids.shape[1]

    def allocated(device):
        if held[0] > 10_000_000:  # read after a forward, then its states go
            now, held[0] = held[0], 10_000_000
            return now
        return held[0]

    monkeypatch.setattr("gkd.training.student.last_hidden_states", forward)
    for name, value in {
        "memory_allocated": allocated,
        "current_device": lambda: 0,
        "mem_get_info": lambda gpu: (10**9, 2 * 10**9),
        "get_per_process_memory_fraction": lambda gpu: 1.0,
        "memory_reserved": lambda gpu: 10_000_000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    PartialState()  # for the log
    with torch.no_grad():
        chosen.checkpointed(1)
    assert chosen._per_token == 100
    assert max(lengths) == min(1024, positions)
    pending = sum(3 * p.nbytes for p in model.parameters())
    assert chosen._budget == pytest.approx(10**9 - pending - 0.3 * 2 * 10**9)


@pytest.mark.parametrize("where", [{"may_choose": False, "device": "cuda"}, {"may_choose": True, "device": "cpu"}])
def test_otherwise_the_flag_is_for_all_layers(where):
    model, _ = kept()
    chosen = KeptActivations(model, torch.device(where["device"]), where["may_choose"])
    assert chosen.checkpointed(1) == 4
    assert flags(model) == [True] * 4


def test_what_only_speed_needs_is_given_up_first(tmp_path, caplog):
    """Memory runs out in the second micro-batch: the step begins anew, the choice is kept, no micro-batch is split."""
    plain = make_trainer(tmp_path / "plain", max_steps=2, gradient_accumulation_steps=2)
    plain.train()
    trainer = make_trainer(tmp_path / "short", max_steps=2, gradient_accumulation_steps=2)
    calls, states, released = [], trainer.student.padded, []

    def short(batch):
        calls.append(batch.rows)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return states(batch)

    def release():
        released.append(len(calls))
        return len(released) == 1

    trainer.student.padded, trainer.student.release = short, release
    trainer.train()
    assert released[0] == 2
    assert "from here on the student's forward has no CUDA graphs" in caplog.text
    assert Choices(trainer.args.output_dir).get(SPARE_MEMORY) == 0
    assert trainer.choices.get("micro_rows") is None
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name


@pytest.mark.skipif(kernels.apply_liger is None, reason="liger-kernel is for Linux")
def test_kernels_are_in_place_inside_their_context_alone():
    model, home = make_model(0), sys.modules["transformers.models.llama.modeling_llama"]
    places = [vars(module) for module in model.modules()] + [vars(home)]
    before = [dict(place) for place in places]
    chosen = kernels.LayerKernels(model, "student")
    assert chosen._patches == []  # on a CPU
    chosen._patches = kernels._recorded(base_of(model))
    assert [dict(place) for place in places] == before
    with chosen.applied():
        names = {"forward"} & vars(model.model.layers[0].mlp).keys() & vars(model.model.norm).keys()
        assert names == {"forward"}
        assert home.apply_rotary_pos_emb is not before[-1]["apply_rotary_pos_emb"]
        assert "forward" not in vars(model)  # the loss is ours
    assert [dict(place) for place in places] == before


@pytest.mark.skipif(kernels.apply_liger is None, reason="liger-kernel is for Linux")
def test_a_teacher_is_asked_without_the_students_kernels():
    """Both are Llamas, whose rotary embedding stands once in Python, and the teacher may be on a CPU."""
    home = sys.modules["transformers.models.llama.modeling_llama"]
    student, teacher, seen = make_model(0), make_model(1).eval(), []
    teacher.model.norm.register_forward_hook(lambda *_: seen.append(home.apply_rotary_pos_emb))
    plain, chosen = home.apply_rotary_pos_emb, kernels.LayerKernels(student, "student")
    chosen._patches = kernels._recorded(base_of(student))
    ids = torch.arange(5, 45)[None]
    with chosen.applied():
        kernel = home.apply_rotary_pos_emb
        TeacherForward(teacher, 0, enabled=False)(ids, None, ids[0, :30])
        with chosen.applied():
            seen.append(home.apply_rotary_pos_emb)
        seen.append(home.apply_rotary_pos_emb)
    assert kernel is not plain
    assert seen == [plain, kernel, kernel]
    assert home.apply_rotary_pos_emb is plain


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_loras_products_are_those_of_peft(dropout, bias):
    model = make_model(0, attention_bias=bias).double()
    model = get_peft_model(
        model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    )
    chosen = kernels.LayerKernels(model, "student")
    chosen._patches = kernels._lora_patches(model)
    assert len(chosen._patches) == 14  # seven of each layer
    ids, found = torch.arange(20, 50).view(2, 15), []
    for context in (nullcontext(), chosen.applied()):
        torch.manual_seed(0)
        with context:
            states = base_of(model).model(ids)[0]
        (states**3).sum().backward()
        found.append([states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))
    model.eval()
    own, plain = base_of(model).model(ids)[0], base_of(make_model(0, attention_bias=bias).double()).model(ids)[0]
    with chosen.applied():
        with model.disable_adapter():
            torch.testing.assert_close(base_of(model).model(ids)[0], plain)
        model.merge_adapter()
        torch.testing.assert_close(base_of(model).model(ids)[0], own)


def test_loras_products_round_no_more_than_pefts():
    """Half precision under autocast, adapters in fp32: distance from float64."""
    model = make_model(0, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    chosen = kernels.LayerKernels(model, "student")
    chosen._patches = kernels._lora_patches(model)
    ids = torch.arange(20, 50).view(2, 15)
    off = []
    with torch.no_grad():
        exact = base_of(deepcopy(model).double()).model(ids)[0]
        for context in (nullcontext(), chosen.applied()):
            with context, torch.autocast("cpu", torch.bfloat16):
                states = base_of(model).model(ids)[0]
            assert states.dtype == torch.bfloat16
            off.append(float((states.double() - exact).norm()))
    assert off[1] < 1.1 * off[0]


@pytest.mark.parametrize("seq_kd", [False, True])
def test_cross_entropy_alone_asks_no_teacher(tmp_path, seq_kd):
    """SFT by --lmbda 0 --kd_ratio 0: the loss and the weights are those with a share of the divergence of next to nothing."""
    found = {}
    for kd_ratio in (0.0, 1e-12):
        flags = {
            "kd_ratio": kd_ratio,
            "seq_kd": seq_kd,
            "learning_rate": 1e-2,
            "max_steps": 3,
            "loss_temperature": 2.0,
        }
        trainer = tiny_trainer(tmp_path / str(kd_ratio), make_model(0), make_model(1), TWELVE_ROWS, **flags)
        with patch.object(trainer.teacher, "target", wraps=trainer.teacher.target) as asked:
            trainer.train()
        assert asked.called == (kd_ratio > 0)
        found[kd_ratio] = losses(trainer), weights(trainer)
        known = {name.rpartition("/")[2] for log in trainer.state.log_history for name in log if "/" in name}
        assert ("forward_kl" in known) == (kd_ratio > 0)
        assert "student_entropy" in known
    assert found[0.0][0] == pytest.approx(found[1e-12][0], rel=1e-5)
    for name, weight in found[0.0][1].items():
        torch.testing.assert_close(weight, found[1e-12][1][name], rtol=1e-3, atol=1e-5)
