"""What only a GPU shows: teams of several programs in the kernel, captured graphs, fp32 products of bf16 inputs."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from families import make_family
from peft import LoraConfig, get_peft_model
from prompts import MASK, PROMPTS, config
from tiny import make_model
from torch import nn

from gkd.data.batch import Batch, scored_positions
from gkd.generation.generator import CompletionGenerator, generation_mode
from gkd.generation.sampling import sampling_noise
from gkd.generation.static import StaticDecoding
from gkd.losses import kernel as divergence_kernel
from gkd.losses.divergences import jsd, statistics_and_gradient
from gkd.losses.objective import distillation_loss
from gkd.losses.targets import HiddenTarget
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead, last_hidden_states
from gkd.models.packing import can_pack
from gkd.runs.choices import Choices
from gkd.teachers.forward import TeacherForward
from gkd.teachers.placed import LocalTeacher, OffloadedTeacher, OwnBase, SpreadTeacher, TeacherElsewhere
from gkd.training.student import StudentForward

PartialState()  # for logs
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocab", [1000, 50257, 128256, 256000])
def test_kernel_equals_the_closed_form(beta, vocab):
    torch.manual_seed(0)
    student, teacher = torch.randn(200, vocab, device="cuda") * 3, torch.randn(200, vocab, device="cuda") * 3
    labels = torch.randint(vocab, (200,), device="cuda")
    for temperature, kd_ratio in ((1.0, 1.0), (0.7, 0.3)):
        statistics, grad = torch.full((6, 200), torch.nan, device="cuda"), torch.full_like(student, torch.nan)
        divergence_kernel.launch(student, teacher, labels, grad, statistics, beta, temperature, kd_ratio)
        expected, wanted = statistics_and_gradient(student.double(), teacher.double(), labels, jsd(beta), temperature, kd_ratio)  # fmt: skip
        torch.testing.assert_close(statistics.double(), torch.stack(expected), rtol=1e-4, atol=5e-5)
        assert (grad.double() - wanted).norm() / wanted.norm() < 2e-5


@pytest.mark.parametrize("trains", [False, True])
def test_loss_of_bf16_states_is_near_float64(trains):
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(256, 50257, bias=False), nn.Linear(384, 50300, bias=False)
    heads = [h.cuda().bfloat16().requires_grad_(trains and h is head) for h in (head, teacher_head)]
    hidden = (torch.randn(3000, 256, device="cuda") * 3).bfloat16().requires_grad_()
    teacher_hidden = (torch.randn(3000, 384, device="cuda") * 3).bfloat16()
    labels = torch.zeros(3000, dtype=torch.long, device="cuda")
    params = (head.weight,) if trains else ()
    loss, _ = distillation_loss(hidden, teacher_hidden, labels, *(LogitHead(h, 1.0, None) for h in heads), 50257, 0.5, head_params=params)  # fmt: skip
    loss.backward()
    weight = head.weight.detach().double()
    z, zt = hidden.detach().double() @ weight.T, teacher_hidden.double() @ teacher_head.weight.detach().double()[:50257].T  # fmt: skip
    expected, slope = statistics_and_gradient(z, zt, labels, jsd(0.5))
    assert abs(loss.item() / expected.loss.sum().item() - 1) < 1e-5
    wanted = slope @ weight
    assert (hidden.grad.double() - wanted).norm() / wanted.norm() < 4e-3  # bf16's own rounding
    if trains:
        wanted = slope.T @ hidden.detach().double()
        assert (head.weight.grad.double() - wanted).norm() / wanted.norm() < 4e-3


@pytest.mark.parametrize("trains", [False, True])
def test_loss_of_a_cached_teacher_is_near_float64(trains):
    """Both of its passes: the teacher's top k of bf16 states, and the student's loss from what was kept of it."""
    torch.manual_seed(0)
    head, teacher_head = (nn.Linear(width, 50300, bias=False).cuda().bfloat16() for width in (256, 384))
    hidden = (torch.randn(3000, 256, device="cuda") * 3).bfloat16().requires_grad_()
    teacher_hidden = (torch.randn(3000, 384, device="cuda") * 3).bfloat16()
    labels, params = torch.zeros(3000, dtype=torch.long, device="cuda"), (head.weight,) if trains else ()
    head.requires_grad_(trains)
    with torch.no_grad():
        target = HiddenTarget(teacher_hidden, LogitHead(teacher_head, 1.0, None))
        known = TopK.of_target(target, len(teacher_hidden), 50257, 64, 1.0, teacher_hidden.device)
    weight = head.weight.detach().double()[:50257]
    z, zt = hidden.detach().double() @ weight.T, teacher_hidden.double() @ teacher_head.weight.double()[:50257].T
    exact = TopK.of_logits(zt, 64)
    assert (known.ids == exact.ids).double().mean() > 0.99  # fp32 may swap equals
    assert (known.tail.double() - exact.tail).abs().max() < 1e-4
    loss, _ = distillation_loss(
        hidden, known, labels, LogitHead(head, 1.0, None), None, 50257, 0.5, head_params=params
    )
    loss.backward()
    expected, slope = known.statistics_and_gradient(z, labels, jsd(0.5))
    assert abs(loss.item() / expected.loss.sum().item() - 1) < 1e-5
    wanted = slope @ weight
    assert (hidden.grad.double() - wanted).norm() / wanted.norm() < 4e-3  # bf16's own rounding
    if trains:
        wanted = slope.T @ hidden.detach().double()
        assert (head.weight.grad.double()[:50257] - wanted).norm() / wanted.norm() < 4e-3


def test_graphs_write_the_text_of_generate():
    torch.manual_seed(0)
    model = make_model(0).cuda().eval()
    prompts, mask = PROMPTS.cuda(), MASK.cuda()
    generator = CompletionGenerator("auto")
    for new in (20, 40):
        for rows in (slice(0, 3), slice(0, 1), slice(0, 3)):
            options = config(max_new_tokens=new)
            found = generator(model, prompts[rows], mask[rows], options)[0]
            expected = CompletionGenerator("dynamic")(model, prompts[rows], mask[rows], options)[0]
            assert found.tolist() == expected.tolist()
    assert generator.captures == 4


FAMILIES = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 gpt2 olmo2 granite smollm3 starcoder2 cohere glm4"


@pytest.mark.parametrize("kind", FAMILIES.split())
def test_greedy_text_of_graphs_is_that_of_each_row_alone(kind):
    model, generator = make_family(kind).cuda().eval(), CompletionGenerator("static")
    prompts, mask = PROMPTS.cuda(), MASK.cuda()
    ids, kept = generator(model, prompts, mask, config(max_new_tokens=24))
    for row in range(len(prompts)):
        prompt = prompts[row][mask[row].bool()][None]
        plain = CompletionGenerator("dynamic")(model, prompt, torch.ones_like(prompt), config(max_new_tokens=24))[0]
        assert ids[row][kept[row].bool()].tolist() == plain[0].tolist()
    assert generator.captures == 1


def test_graphs_draw_by_the_models_probabilities():
    """Chi-square of the second token, which a graph draws, in 16,384 rows."""
    model = make_model(0, initializer_range=0.1).cuda().eval()
    prompt = PROMPTS[1:2].cuda()
    options = config(max_new_tokens=2, do_sample=True, temperature=0.8, eos_token_id=[])
    generator, prompts, counts = CompletionGenerator("static"), prompt.repeat(64, 1), torch.zeros(264, device="cuda")
    for seed in range(256):
        with sampling_noise(seed, prompt.device):
            ids, _ = generator(model, prompts, torch.ones_like(prompts), options)
        counts += torch.bincount(ids[:, 1], minlength=264)
    with torch.no_grad():
        first = torch.softmax(model(prompt).logits[0, -1].double() / 0.8, -1)
        every = torch.cat([prompt.expand(264, -1), torch.arange(264, device="cuda")[:, None]], 1)
        expected = first @ torch.softmax(model(every).logits[:, -1].double() / 0.8, -1) * counts.sum()
    rare = expected.argsort()[:20]  # which are one class
    found, expected = (
        torch.cat([part.index_fill(0, rare, 0.0), part[rare].sum()[None]]) for part in (counts.double(), expected)
    )
    terms = ((found - expected) ** 2 / expected)[expected > 0]
    freedom, chi_square = len(terms) - 1, terms.sum().item()
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_text_of_graphs_does_not_depend_on_the_rows_beside_it():
    model, options = make_model(0).double().cuda().eval(), config(max_new_tokens=40, do_sample=True, temperature=1.0)
    prompts, mask = PROMPTS.repeat(4, 1).cuda(), MASK.repeat(4, 1).cuda()
    texts = []
    for size in (None, 1, 5):
        with sampling_noise(5, prompts.device):
            texts.append(CompletionGenerator("static", batch_size=size)(model, prompts, mask, options)[0])
    assert texts[0].equal(texts[1])
    assert texts[0].equal(texts[2])


def test_few_rows_multiply_by_merged_weights_that_train():
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(make_model(0), lora).cuda().eval()
    prompts, mask, decoding, accelerator = PROMPTS.cuda(), MASK.cuda(), StaticDecoding(), Accelerator()
    for _ in range(3):
        with generation_mode(model, accelerator) as ready:
            found = decoding(ready, prompts, mask, config())
            expected = CompletionGenerator("dynamic")(ready, prompts, mask, config())[0]
        assert found[:, : expected.shape[1]].equal(expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.requires_grad, alpha=0.1)
    (decoder,) = decoding.decoders.values()
    assert decoding.captures == 1
    assert len(decoder.fused.weights) == 2


def test_noise_of_graphs_repeats_whether_captured_before_or_not():
    model = make_model(0).cuda().eval()
    prompts, mask = PROMPTS.cuda(), MASK.cuda()
    generator, texts = CompletionGenerator("auto"), []
    before = torch.cuda.get_rng_state()
    for seed in (1, 1, 2):
        with sampling_noise(seed, prompts.device):
            texts.append(generator(model, prompts, mask, config(do_sample=True, temperature=1.5, eos_token_id=[]))[0])
    assert texts[0].equal(texts[1])
    assert not texts[0].equal(texts[2])
    assert torch.cuda.get_rng_state().equal(before)


def test_graphs_follow_weights_that_train():
    model = get_peft_model(make_model(0), LoraConfig(r=2, target_modules="all-linear")).cuda().eval()
    prompts, mask, generator = PROMPTS.cuda(), MASK.cuda(), CompletionGenerator("auto")
    generator(model, prompts, mask, config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    expected = CompletionGenerator("dynamic")(model, prompts, mask, config())[0]
    assert generator(model, prompts, mask, config())[0].tolist() == expected.tolist()


def test_teachers_graph_is_as_near_float64_as_its_forward():
    model = make_model(1, hidden_size=64).cuda().eval()
    exact = copy.deepcopy(model).double()
    forward = TeacherForward(model, 0, enabled=True)
    for rows, length in ((2, 37), (2, 64), (3, 37), (2, 40), (2, 300)):
        ids = torch.randint(3, 264, (rows, length), device="cuda")
        with torch.no_grad():
            expected = last_hidden_states(exact, ids, None)
            everything = torch.arange(ids.numel(), device="cuda")
            captured, plain = (
                (states.flatten(0, -2) - expected.flatten(0, 1)).abs().max().item()
                for states in (forward(ids, None, everything), last_hidden_states(model, ids, None))
            )
        # A graph has padding, so other kernels: on an H100 0.7 to 1.7 times, of 7e-6 to 3e-5.
        assert captured < 3 * plain
    assert len(forward._graphs._captured) == 3  # 37, 40 and 64 are one length


def placed(kind, model, **options):
    accelerator = SimpleNamespace(device=torch.device("cuda", 0), unwrap_model=lambda model: model)
    return kind(model.eval(), accelerator=accelerator, pad=0, cuda_graph=kind is not SpreadTeacher, **options)


ELSEWHERE = torch.device("cuda", 1) if torch.cuda.device_count() > 1 else torch.device("cpu")


@pytest.mark.parametrize(("kind", "options"), [(TeacherElsewhere, {"device": ELSEWHERE}), (OffloadedTeacher, {})])
def test_a_teacher_that_is_not_on_the_students_gpu_tells_the_same(kind, options):
    plain, other = placed(LocalTeacher, make_model(1)), placed(kind, make_model(1), **options)
    torch.manual_seed(0)
    for length in (20, 30, 20):
        ids = torch.randint(3, 264, (2, length), device="cuda:0")
        scored = torch.arange(5, 2 * length, 3, device="cuda:0")
        logits = []
        for teacher in (plain, other):
            with teacher.head() as head, torch.no_grad():
                logits.append(head(teacher.hidden(Batch(ids, ids, scored))))
        assert logits[1].device == ids.device
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("first", [0, 1])
def test_a_teacher_over_two_gpus_tells_and_writes_the_same(first):
    wide = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4}
    devices = [torch.device("cuda", first), torch.device("cuda", 1 - first)]
    plain, spread = (make_model(1, **wide).bfloat16() for _ in range(2))
    plain, spread = placed(LocalTeacher, plain), placed(SpreadTeacher, spread, devices=devices)
    assert {p.device for p in spread.inner.parameters()} == set(devices)
    assert spread.identity(config()) == plain.identity(config())
    assert plain.packs
    assert spread.packs
    ids = torch.randint(3, 264, (2, 30), device="cuda:0")
    for lengths in (None, torch.tensor([30, 17])):
        scored = torch.arange(5, 47, 3, device="cuda:0")
        logits = []
        for teacher in (plain, spread):
            with teacher.head() as head, torch.no_grad():
                logits.append(head(teacher.hidden(Batch(ids, ids, scored, lengths=lengths))).float())
        assert logits[1].device == ids.device
        torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)
    texts = []
    for teacher in (plain, spread):
        prompts, mask = PROMPTS.to(teacher.device), MASK.to(teacher.device)
        with sampling_noise(3, teacher.device):
            texts.append(CompletionGenerator("auto")(teacher.model, prompts, mask, config())[0].tolist())
    assert texts[0] == texts[1]
    assert torch.cuda.current_device() == 0


def test_an_offloaded_teacher_takes_no_memory_between_visits():
    model = make_model(1, hidden_size=512, vocab_size=8192)
    size = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    teacher = placed(OffloadedTeacher, model)
    head = teacher.inner.lm_head.weight.nbytes
    assert torch.cuda.memory_allocated() - before < head + 2**20
    with teacher.stay():
        for _ in range(2):
            with teacher.visit():
                assert torch.cuda.memory_allocated() - before > size
        assert torch.cuda.memory_allocated() - before > size
    assert torch.cuda.memory_allocated() - before < head + 2**20
    assert all(p.is_pinned() for p in teacher.inner.parameters())


def test_a_teacher_elsewhere_writes_there_and_leaves_the_students_noise():
    teacher = placed(TeacherElsewhere, make_model(1), device=ELSEWHERE)
    prompts, mask = PROMPTS.to(ELSEWHERE), MASK.to(ELSEWHERE)
    before, texts = torch.cuda.get_rng_state(0), []
    for backend in ("auto", "auto", "dynamic"):
        with teacher.visit(), sampling_noise(3, teacher.device):
            texts.append(CompletionGenerator(backend)(teacher.model, prompts, mask, config())[0].tolist())
    assert texts[0] == texts[1] == texts[2]
    assert torch.cuda.get_rng_state(0).equal(before)


@pytest.mark.parametrize("tied", [False, True], ids=["merged", "not merged"])
def test_student_and_its_base_write_by_graphs_of_their_own(tied):
    targets = ["q_proj", "lm_head"] if tied else "all-linear"
    student = make_model(0, tie_word_embeddings=tied)
    student = get_peft_model(student, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).cuda()
    teacher = placed(OwnBase, student)
    accelerator = SimpleNamespace(
        unwrap_model=lambda model: model, deepspeed_plugin=None, distributed_type=None, device=torch.device("cuda", 0)
    )
    prompts, mask = PROMPTS.cuda(), MASK.cuda()
    generators = CompletionGenerator("static"), CompletionGenerator("dynamic")
    for _ in range(2):
        texts = []
        for generator in generators:
            with generation_mode(student, accelerator) as ready:
                mine = generator(ready, prompts, mask, config())[0].tolist()
            with teacher.visit(), generation_mode(teacher.model, accelerator) as ready:
                texts.append((mine, generator(ready, prompts, mask, config())[0].tolist()))
        assert texts[0] == texts[1]
        assert texts[0][0] != texts[0][1]
    for _ in range(3):  # as --bf16 trains: the student under autocast, its base in its own dtype
        with generation_mode(student, accelerator) as ready, torch.autocast("cuda", torch.bfloat16):
            generators[0](ready, prompts, mask, config())
        with teacher.visit(), generation_mode(teacher.model, accelerator) as ready:
            generators[0](ready, prompts, mask, config())
    assert generators[0].captures == 3


@pytest.mark.parametrize("tied", [False, True])
def test_graphs_follow_fp32_weights_that_train_under_autocast(tied, monkeypatch):
    monkeypatch.setattr("gkd.generation.static.FEW_ROWS", 0)  # whose products round otherwise
    torch.manual_seed(0)
    model = make_model(0, tie_word_embeddings=tied).cuda().eval()
    prompts, mask, decoding, plain = PROMPTS.cuda(), MASK.cuda(), StaticDecoding(), StaticDecoding()
    monkeypatch.setattr(plain, "cast_weights", lambda *args: nullcontext())
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            found, expected = (d(model, prompts, mask, config()).tolist() for d in (decoding, plain))
        assert found == expected
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    assert decoding.captures == plain.captures == 1


def ragged(rows, longest, seed=0):
    torch.manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (rows,))
    ids = torch.randint(3, 264, (rows, longest))
    real = torch.arange(longest) < lengths[:, None]
    labels = torch.where(real & (torch.arange(longest) > 0), ids, -100)
    return Batch(ids * real, labels, scored_positions(labels), lengths=lengths).to("cuda")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16 and LoRA", "fp32"])
def test_students_graphs_compute_what_the_plain_forward_does(dtype, checkpointing, dropout):
    """To the bit: weights move between steps, shapes come again, and two micro-batches add their gradients."""
    model = make_model(0, hidden_size=64).cuda().to(dtype)
    if dtype is torch.bfloat16:
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear"))
    elif dropout:
        pytest.skip("dropout is that of an adapter")
    if checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": dropout > 0}
        model.gradient_checkpointing_enable({**options})
        model.enable_input_require_grads()
    model.train()
    accelerator = SimpleNamespace(
        device=torch.device("cuda", 0), autocast=lambda: torch.autocast("cuda", torch.bfloat16)
    )
    found = []
    for graphs in (False, True):
        student = StudentForward(copy.deepcopy(model), accelerator, dropout > 0, sharded=False, choices=Choices())
        student._graphs.enabled &= graphs
        assert student.packs
        torch.manual_seed(1)
        outputs = []
        for step in range(3):
            for batch in (ragged(5, 40), ragged(9, 70), ragged(9, 70, seed=step)):
                with student.step(), accelerator.autocast():
                    states = student(batch)
                    outputs.append(states.detach())
                    (states.float() ** 2).sum().backward()
            trained = [p for p in student.model.parameters() if p.grad is not None]
            outputs += [p.grad.clone() for p in trained]
            with torch.no_grad():
                for p in trained:
                    p -= 1e-2 * p.grad
                    p.grad = None
        assert bool(student._graphs._captured) == graphs
        found.append(outputs)
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))


def test_packed_rows_are_padded_ones_in_half_precision():
    model = make_model(0, hidden_size=64).cuda().bfloat16().eval()
    assert can_pack(model, torch.device("cuda"), "student")
    assert not can_pack(model.float(), torch.device("cuda"), "student")  # the kernel is for half precision
    model.bfloat16()
    batch = ragged(9, 70)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = last_hidden_states(exact, batch.input_ids, None).flatten(0, 1)[batch.scored]
        packed = TeacherForward(model, 0, enabled=False)(*batch.teacher_inputs, batch.lengths)
        padded = last_hidden_states(model, batch.input_ids, None).flatten(0, 1)[batch.scored]
    assert (packed - expected).norm() < 1.5 * (padded - expected).norm()
