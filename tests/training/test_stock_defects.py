"""Each measured defect of TRL 1.16's GKDTrainer as a test of ours; the numbers are the order of discovery.

`GKD_TRAINER=stock pytest tests/training/test_stock_defects.py` runs the same tests on TRL's trainer, where they fail.
"""

import os
from unittest.mock import patch

import pytest
import torch
from families import make_family
from peft import LoraConfig, get_peft_model
from tiny import TEMPLATE, make_model, make_tokenizer
from trainers import losses, tiny_trainer

from gkd.compat import GKDConfig, StockGKDTrainer
from gkd.config.training import GKDArguments
from gkd.data.batch import Source
from gkd.generation.generator import generation_mode
from gkd.losses.divergences import jsd
from gkd.training.trainer import GKDTrainer

STOCK = os.environ.get("GKD_TRAINER") == "stock"
NOT_FLAGS = ("peft_config", "processing_class", "teacher_processing_class")
USER = [{"role": "user", "content": "hello?"}]


def chat(answer="four", question="two and two?"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def train(tmp_path, tokenizer):
    """Makes a trainer (ours, or TRL's with GKD_TRAINER=stock) over `rows`; a tiny student and teacher by default."""

    def make(rows, student=None, teacher=None, run=True, **options):
        more = {"processing_class": tokenizer} | {name: options.pop(name) for name in NOT_FLAGS if name in options}
        if STOCK:
            more.pop("teacher_processing_class", None)  # TRL's trainer takes none
        trainer = tiny_trainer(
            tmp_path / "out",
            student if student is not None else make_model(0),
            teacher if teacher is not None else make_model(1),
            rows,
            cls=StockGKDTrainer if STOCK else GKDTrainer,
            arguments=GKDConfig if STOCK else GKDArguments,
            more=more,
            **({"max_new_tokens": 8, "max_length": 64} | options),
        )
        if run:
            trainer.train()
        return trainer

    return make


def test_01_loss_is_divided_by_the_tokens_that_are_scored(train):
    """Empty answers: the count of the dataset's labels has nothing to do with the text that is generated."""
    trainer = train([chat("")] * 4, lmbda=1.0, beta=0.0, gradient_accumulation_steps=2)
    # a forward KL averaged over tokens; sharp random models stay below this, a sum over 8 tokens does not
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        trainer.state.log_history[0]["on_policy/loss"], rel=1e-4
    )


def test_03_bf16_weights_do_not_mean_bf16_softmax(train):
    student = make_model(0, dtype=torch.bfloat16, initializer_range=0.02)
    teacher = make_model(0, dtype=torch.bfloat16, initializer_range=0.02)
    with torch.no_grad():
        teacher.lm_head.weight += 0.01 * torch.randn_like(teacher.lm_head.weight)
    rows = [chat(), chat("well then", "go on")]
    trainer = train(rows, student, teacher, beta=0.5)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        logits = [m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (student, teacher)]
    scored = batch["labels"][:, 1:] != -100
    zs, zt = (z[:, :-1][scored].double() for z in logits)
    expected = jsd(0.5).value(zs.log_softmax(-1), zt.log_softmax(-1)).mean().item()
    assert losses(trainer)[0] == pytest.approx(expected, rel=0.01)


def test_04_nothing_scored_is_zero_not_nan(train):
    trainer = train([chat("")] * 2, lmbda=0.0, logging_nan_inf_filter=False)
    assert losses(trainer) == [0.0]


def test_05_generation_uses_the_cache_under_gradient_checkpointing(train):
    seen = []
    student = make_model(0)
    original = student.forward

    def spy(*args, **kwargs):
        if kwargs.get("input_ids") is not None and kwargs["input_ids"].shape[1] == 1:
            seen.append(any(kwargs.get(name) is not None for name in ("cache", "past_key_values")))
        return original(*args, **kwargs)

    with patch.object(student, "forward", spy):
        train([chat("")] * 2, student, lmbda=1.0, gradient_checkpointing=True)
    assert seen
    assert all(seen)


def test_06_one_generation_a_step(train):
    student = make_model(0)
    with patch.object(student, "generate", wraps=student.generate) as generate:
        train([chat("")] * 8, student, lmbda=1.0, gradient_accumulation_steps=4)
    assert generate.call_count == 1


def test_07_no_logits_of_prompt_positions(train):
    """The heads see scored positions alone."""
    student, seen = make_model(0), []
    trainer = train([chat("ab", "a long question " * 2)] * 2, student, run=False, lmbda=0.0)
    student.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    trainer.train()
    assert seen == [2 * 3]  # "ab" and the end token, in two rows


def test_08_padded_vocabularies(train, tokenizer):
    trainer = train([chat()] * 2, make_model(0), make_model(1, vocab_size=272), teacher_processing_class=tokenizer, lmbda=0.5, max_steps=4, seq_kd=True)  # fmt: skip
    assert trainer.vocab_size == 264
    assert all(0 < loss < 20 for loss in losses(trainer))


def test_09_tokenizer_end_token_stops_generation(train):
    """The models name <|eos|> (1); the chat template ends turns with the tokenizer's <|end|> (2)."""
    student = make_model(0)
    with torch.no_grad():  # a student that always says <|end|>
        student.lm_head.weight.zero_()
        student.lm_head.weight[2] = student.model.norm.weight * 0
        student.model.norm.weight.fill_(1.0)
    trainer = train([chat("")] * 2, student, run=False, lmbda=1.0)
    config = trainer.generation_config if STOCK else trainer.generation_configs[Source.ON_POLICY]
    stops = config.eos_token_id
    assert set([stops] if isinstance(stops, int) else stops) == {1, 2}


def test_10_the_divergence_has_its_own_temperature(train):
    one, two = (losses(train([chat()] * 2, beta=0.0, loss_temperature=t))[0] for t in (1.0, 3.0))
    assert two < 0.7 * one
    cold, hot = (losses(train([chat()] * 2, beta=0.0, temperature=t))[0] for t in (0.5, 2.0))
    assert cold == hot


def test_11_lora_dropout_is_kept(train):
    trainer = train(
        [chat()] * 2, run=False, peft_config=LoraConfig(r=2, lora_dropout=0.25, target_modules="all-linear")
    )
    rates = {m.p for n, m in trainer.model.named_modules() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


def test_11_base_dropout_is_off(train):
    trainer = train([chat()] * 2, make_model(0, attention_dropout=0.5), run=False)
    assert all(getattr(m, "attention_dropout", 0.0) == 0.0 for m in trainer.model.modules())


def test_12_draws_do_not_depend_on_the_global_generator(train):
    import random

    def sources():
        trainer = train([chat()] * 2, lmbda=0.5, max_steps=6)
        return [
            next(k for k in entry if k.endswith("/loss")) for entry in trainer.state.log_history if "loss" in entry
        ]

    random.seed(1)
    first = sources()
    random.seed(2)
    random.random()
    assert first == sources()
    assert len(set(first)) == 2


@pytest.mark.parametrize(
    "row",
    [
        {**chat(), "prompt": [{"role": "user", "content": "two and two?"}]},
        {"prompt": USER, "completion": [{"role": "assistant", "content": "yes"}]},
        {"prompt": "2+2=", "completion": "4"},
    ],
    ids=["prompt as messages", "prompt and completion", "plain text"],
)
def test_13_row_forms(train, row):
    assert losses(train([row] * 2))[0] > 0


def test_13_user_turn_at_the_end_is_not_trained_on(train):
    assert losses(train([{"messages": USER}] * 2)) == [0.0]


def test_13_long_rows_keep_the_system_prompt(train, tokenizer):
    system = [{"role": "system", "content": "be kind"}]
    row = {"messages": system + chat("yes", "x" * 200)["messages"]}
    trainer = train([row] * 2)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert "be kind" in tokenizer.decode(batch["prompts"][0])
    assert (batch["labels"] != -100).sum() == 4  # "yes" and the end token


def test_13_template_that_moves_tokens_is_refused(train):
    thinking = make_tokenizer(TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think></think>{%"))
    with pytest.raises(ValueError, match="not the beginning"):
        train([chat()] * 2, processing_class=thinking)


def test_14_no_teacher_says_so(tmp_path, tokenizer, student, rows):
    cls, config = (StockGKDTrainer, GKDConfig) if STOCK else (GKDTrainer, GKDArguments)
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="needs a teacher"):
        cls(model=student, args=args, train_dataset=rows, processing_class=tokenizer)


def test_14_teacher_by_path_without_dtype(tmp_path, tokenizer, student, rows, saved):
    cls, config = (StockGKDTrainer, GKDConfig) if STOCK else (GKDTrainer, GKDArguments)
    args = config(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, teacher_model_name_or_path=str(saved / "teacher"),
        teacher_model_init_kwargs={"attn_implementation": "eager"}, max_new_tokens=8, max_length=64,
    )  # fmt: skip
    teacher = str(saved / "teacher") if STOCK else None
    trainer = cls(model=student, teacher_model=teacher, args=args, train_dataset=rows, processing_class=tokenizer)
    assert not trainer.teacher_model.training
    assert not any(p.requires_grad for p in trainer.teacher_model.parameters())


def test_15_state_is_restored_when_generation_raises(train):
    student = make_model(0)
    student.model.layers[0].self_attn.eval()  # a module with a mode of its own
    trainer = train([chat("")] * 2, student, run=False, lmbda=1.0, gradient_checkpointing=True)
    student.gradient_checkpointing_enable()
    student.train()
    student.model.layers[0].self_attn.eval()
    with patch.object(student, "generate", side_effect=RuntimeError("out of memory")), pytest.raises(RuntimeError):
        if STOCK:
            trainer.train()
        else:
            with generation_mode(student, trainer.accelerator) as model:
                model.generate()
    assert student.is_gradient_checkpointing
    assert student.training
    assert STOCK or not student.model.layers[0].self_attn.training


def test_16_lora_on_the_head_trains(train):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    trainer = train([chat()] * 2, peft_config=config, learning_rate=1e-2, max_steps=2)
    head = trainer.model.get_base_model().lm_head
    assert head.lora_B["default"].weight.abs().sum() > 0


def test_16_gradient_of_lora_on_the_head_equals_autograd(train):
    if STOCK:
        pytest.fail("TRL refuses LoRA on the head")
    torch.manual_seed(0)
    student = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    trainer = train([chat(), chat("ok", "hm")], student, run=False, beta=0.5)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.compute_loss(student, batch).backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    scored = batch["labels"][:, 1:] != -100
    zs = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][scored]
    zt = trainer.teacher_model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][scored]
    jsd(0.5).value(zs.log_softmax(-1), zt.detach().log_softmax(-1)).mean().backward()
    assert len(found) == 2
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_17_logs_tell_more_than_the_loss(train):
    log = train([chat()] * 2, lmbda=1.0).state.log_history[0]
    names = [
        "loss",
        "forward_kl",
        "reverse_kl",
        "student_entropy",
        "teacher_entropy",
        "agreement",
        "completion_length",
        "truncated",
    ]
    assert {f"on_policy/{name}" for name in names} <= log.keys()
    assert {"tokens_per_second", "seconds_generating", "seconds_training"} <= log.keys()


def test_17_evaluation_is_on_policy_too(train):
    trainer = train([chat()] * 4, lmbda=0.5, run=False)
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_on_policy/loss"] > 0
    assert metrics["eval_dataset/loss"] == pytest.approx(metrics["eval_loss"])
    assert metrics == trainer.evaluate(trainer.train_dataset) | {
        k: v for k, v in metrics.items() if "second" in k or "runtime" in k
    }


def test_18_resume_reproduces_the_draws_and_the_text(train, tmp_path):
    options = {
        "lmbda": 0.5,
        "seq_kd": True,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    rows = [chat("", f"{n} and {n}?") for n in range(12)]
    whole = train(rows, **options, output_dir=str(tmp_path / "whole"))
    resumed = train(rows, **options, output_dir=str(tmp_path / "resumed"), run=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(whole) == losses(resumed)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_19_models_own_generation_defaults_do_not_leak(train):
    """A repetition penalty in the student's generation config would sample from another distribution."""
    student, seen = make_model(0), []
    student.generation_config.repetition_penalty = 1.7
    with patch.object(student, "_get_logits_processor", wraps=student._get_logits_processor) as processors:
        train([chat("")] * 2, student, lmbda=1.0)
        seen = [call.kwargs["generation_config"].repetition_penalty for call in processors.call_args_list]
    assert seen
    assert all(penalty in (None, 1.0) for penalty in seen)
    assert student.generation_config.repetition_penalty == 1.7


def test_20_a_mixture_of_experts_generates_and_keeps_its_config(train):
    """TRL turns `output_router_logits` on: padded prompts fail to generate, also for whoever loads the saved student."""
    student = make_family("mixtral")
    trainer = train([chat(""), chat("", "hm?")], student, make_family("mixtral", 1), lmbda=1.0)
    assert losses(trainer)[0] > 0
    assert not student.config.output_router_logits
