"""Rows that begin alike have their beginning read once, and get the hidden states that whole rows have."""

import pytest
import torch
from accelerate import PartialState
from families import make_family
from tiny import make_model

from gkd.teachers import prefix
from gkd.teachers.forward import TeacherForward
from gkd.teachers.prefix import SharedPrefix

PartialState()  # the log reads the number of this process from it


def batch_of(shared=130, rows=3, size=264, seed=0):
    """Right-padded rows with a beginning of `shared` tokens, a mask, and positions that are scored behind it."""
    torch.manual_seed(seed)
    ids = torch.randint(4, size, (rows, shared + 20))
    ids[:, :shared] = ids[0, :shared]
    ids[:, shared] = torch.arange(4, 4 + rows)  # here they part
    lengths = shared + torch.tensor([20, 9, 14])[:rows]
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    scored = [i * ids.shape[1] + at for i, n in enumerate(lengths.tolist()) for at in range(shared + 4, n - 1)]
    return torch.where(mask.bool(), ids, 0), mask, torch.tensor(scored)


def counted(teacher):
    """The teacher's forward, and the tokens of each call of its body."""
    calls = []
    teacher.base_model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return TeacherForward(teacher.eval(), pad=0, enabled=False), calls


@pytest.mark.parametrize("masked", [True, False])
def test_states_are_those_of_whole_rows_and_the_beginning_is_read_once(masked):
    (forward, calls), reads = counted(make_model(1)), []
    for seed in (0, 0, 1):  # the beginning comes again, then another
        ids, mask, scored = batch_of(seed=seed)
        mask = mask if masked else None
        expected = forward(ids, mask, scored)
        calls.clear()
        found = forward(ids, mask, scored, prompted=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        reads.append(list(calls))
    rest = 3 * (150 - 128)
    assert reads == [[3 * 150, 128, rest], [rest], [128, rest]]  # at first whole rows too; then another beginning


def test_bits_do_not_depend_on_what_was_read_before():
    ids, mask, scored = batch_of()
    fresh, used = (counted(make_model(1))[0] for _ in range(2))
    for seed in (3, 4, 5):
        used(*batch_of(seed=seed), prompted=True)
    assert torch.equal(fresh(ids, mask, scored, prompted=True), used(ids, mask, scored, prompted=True))


def test_what_is_shared_ends_before_the_first_scored_position():
    prefix = SharedPrefix(make_model(1))
    ids, _, scored = batch_of()
    assert prefix.length(ids, scored) == 128
    assert prefix.length(ids, torch.tensor([100, 400])) == 64
    assert prefix.length(ids, torch.tensor([60])) == 0
    ids[1, 70] += 1
    assert prefix.length(ids, scored) == 64
    ids[2, 3] += 1
    assert prefix.length(ids, scored) == 0


def test_a_single_row_shares_nothing():
    ids, _, scored = batch_of()
    assert SharedPrefix(make_model(1)).length(ids[:1], scored[scored < ids.shape[1]]) == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_keys_that_depend_on_the_length_of_the_row_are_not_kept(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 140}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    forward, _ = counted(make_model(1, rope_parameters=rope))
    for shared in (66, 130):  # within the original window, and beyond
        ids, mask, scored = batch_of(shared)
        assert torch.equal(forward(ids, mask, scored, prompted=True), forward(ids, mask, scored))


def test_states_that_are_no_numbers_are_not_taken():
    prefix, states = SharedPrefix(make_model(1)), torch.ones(2, 3)
    assert not prefix.check(states * torch.nan, states)


def test_a_teacher_for_which_it_differs_reads_whole_rows(monkeypatch):
    forward, calls = counted(make_model(1))
    ids, mask, scored = batch_of()
    expected = forward(ids, mask, scored)
    run = prefix.last_hidden_states
    monkeypatch.setattr(prefix, "last_hidden_states", lambda *args: 1.2 * run(*args))
    assert torch.equal(forward(ids, mask, scored, prompted=True), expected)
    assert forward._prefix.works is False
    calls.clear()
    assert torch.equal(forward(ids, mask, scored, prompted=True), expected)
    assert calls == [ids.numel()]


# Those that keep more than keys and values, such as a state that the beginning has left, may be read whole.
USED = "cohere2 gemma2 gemma3_text glm4 gpt2 gpt_neox llama mistral mixtral phi3 qwen2 qwen3 qwen3_moe smollm3".split()
EITHER = "bloom deepseek_v3 falcon_h1 gpt_neo jamba lfm2 mamba2 minicpm3 opt qwen3_next recurrent_gemma rwkv".split()


@pytest.mark.parametrize("family", [*USED, *EITHER])
def test_families_have_the_states_of_whole_rows(family):
    forward = TeacherForward(make_family(family).eval(), pad=0, enabled=False)
    ids, mask, scored = batch_of()
    expected = forward(ids, mask, scored)
    for _ in range(2):
        found = forward(ids, mask, scored, prompted=True)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert forward._prefix.works or family in EITHER
