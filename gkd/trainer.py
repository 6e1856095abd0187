"""`GKDTrainer`: TRL's GKDTrainer, with the same arguments, dataset columns and checkpoints, made right.

An optimizer step flows through these methods in this order:

    get_batch_samples   draws the source of the step's text, generates it for all micro-batches, counts the tokens
    training_step       once per micro-batch, transformers' own
    compute_loss        hidden states of teacher and student -> summed divergence over the global token count
    log                 the metrics of all steps since the last log, averaged over tokens and ranks
"""

import time
from dataclasses import fields

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, ProgressCallback, set_seed

from gkd.arguments import GKDArguments
from gkd.collator import GKDCollator, RowEncoder, encode_dataset, stop_token_ids
from gkd.generation import (
    generate_completions,
    generation_mode,
    sampling_noise,
    stack_prompts,
    training_batch,
)
from gkd.heads import LogitHead, base_of, check_projection, last_hidden_states
from gkd.losses import distillation_loss
from gkd.metrics import SourceMetrics
from gkd.models import add_lora, apply_token_flags, disable_base_dropout, freeze, load_pretrained
from gkd.sources import Source, draw_source, sampling_seed
from gkd.trl_compat import (
    GKDConfig,
    SFTTrainer,
    StockGKDTrainer,
    gathered_head,
    head_adapter_hidden,
    prepare_deepspeed,
    prepare_fsdp,
    run_inside_forward,
)
from gkd.vocabulary import shared_vocab_size

logger = get_logger(__name__)


class PhaseClock:
    """Wall seconds spent in each phase since the last `flush`."""

    def __init__(self):
        self.seconds = {"generating": 0.0, "training": 0.0}
        self._phase, self._since = None, 0.0

    def enter(self, phase: str | None) -> None:
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def flush(self) -> dict[str, float]:
        self.enter(self._phase)
        spent, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return spent


class GKDTrainer(StockGKDTrainer):
    """Trains a student on its own text, the teacher's or the dataset's, towards the teacher's distribution.

    Takes the arguments of TRL's GKDTrainer and, if the two models' vocabularies differ in padding,
    `teacher_processing_class`, the teacher's tokenizer. `args` may be a TRL GKDConfig. Datasets hold raw rows (see
    gkd.rows) or rows encoded by `gkd.collator.encode_dataset`.

    Raises:
        ValueError: no teacher; vocabularies that differ (`gkd.vocabulary.VocabularyMismatch`); a row that can't be
            used (`gkd.rows.DataError`); an architecture whose logits are not head(hidden states).
    """

    def __init__(
        self,
        model=None,
        teacher_model=None,
        args: GKDArguments | GKDConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        peft_config=None,
        formatting_func=None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
    ):
        args = _with_our_fields(args)
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None:
            raise ValueError("GKD needs a teacher: pass teacher_model= or --teacher_model_name_or_path.")
        if isinstance(model, str):
            model = load_pretrained(
                model, **{"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            )
        if isinstance(teacher_model, str):
            extra = {"trust_remote_code": args.trust_remote_code, "dtype": args.teacher_dtype}
            teacher_model = load_pretrained(teacher_model, **{**extra, **(args.teacher_model_init_kwargs or {})})
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(base_of(model).config._name_or_path)
        apply_token_flags(processing_class, args)
        if args.n_gpu > 1:  # transformers would wrap the model in nn.DataParallel, whose replicas share no loss
            logger.warning("Started without a launcher: one GPU of several is used. `accelerate launch` uses all.")
            args._n_gpu = 1
        freeze(teacher_model)
        if args.disable_dropout:
            disable_base_dropout(model)
        if peft_config is not None:
            set_seed(args.seed)  # a fresh adapter is random
            model = add_lora(model, peft_config, args)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError("Prompt-learning adapters (prefix tuning, prompt tuning) are not supported; use LoRA.")

        sizes = [base_of(m).config.get_text_config().vocab_size for m in (model, teacher_model)]
        self.vocab_size = shared_vocab_size(processing_class, teacher_processing_class, *sizes)
        holders = [c for m in (model, teacher_model) for c in (base_of(m).config, base_of(m).generation_config)]
        self.stop_ids = [i for i in stop_token_ids(processing_class, *holders) if i < self.vocab_size]
        if data_collator is None:
            data_collator = GKDCollator(processing_class.pad_token_id)
            encoder = RowEncoder.of(args, processing_class, self.stop_ids)
            train_dataset = encode_dataset(train_dataset, encoder, args.dataset_num_proc)
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: encode_dataset(part, encoder) for name, part in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = encode_dataset(eval_dataset, encoder)
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}

        # Past TRL's own GKDTrainer.__init__, to the SFTTrainer below it: between the two lie the vocabulary check, the
        # dropout switch and the teacher's preparation that we replace.
        with head_adapter_hidden(model):
            SFTTrainer.__init__(
                self,
                model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                formatting_func=formatting_func,
            )
        # Our loss is a sum over the step's tokens divided by their global count: accumulation must not divide it again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        self._zero3 = self.is_deepspeed_enabled and self.accelerator.deepspeed_plugin.zero_stage == 3
        if self._zero3 and LogitHead.of(self.model).trainable_params():
            raise ValueError(
                "ZeRO-3 with an output head that trains (full fine-tuning, or LoRA on lm_head) is not supported yet: "
                "use --use_peft with other targets, or ds_configs/zero2.yaml."
            )
        self.teacher_model = self._place_teacher(teacher_model)
        if sizes[0] != sizes[1]:
            logger.warning(
                f"Vocabularies of {sizes[0]} (student) and {sizes[1]} (teacher) differ in padding alone: training over "
                f"the {self.vocab_size} ids that both have."
            )
        if not (self._zero3 or self.is_fsdp_enabled):  # sharded parameters can't be called outside their wrapper yet
            check_projection(self.model, "student")
            check_projection(self.teacher_model, "teacher")
        self.generation_configs = {
            Source.ON_POLICY: self._generation_config(self.model),
            Source.TEACHER: self._generation_config(teacher_model),
        }
        self._source = Source.DATASET
        self._clock = PhaseClock()
        self._source_metrics = {
            "train": SourceMetrics(self.accelerator),
            "eval": SourceMetrics(self.accelerator),
        }

    def _place_teacher(self, teacher: nn.Module) -> nn.Module:
        """Sharded where the student is sharded; else whole on the device, in its own dtype, with no wrapper."""
        if self._zero3:
            return prepare_deepspeed(teacher, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(teacher, self.accelerator)
        if not getattr(teacher, "is_quantized", False):
            teacher.to(self.accelerator.device)
        return teacher

    def _generation_config(self, model: nn.Module) -> GenerationConfig:
        size = base_of(model).config.get_text_config().vocab_size
        return GenerationConfig(
            max_new_tokens=self.args.max_new_tokens,
            do_sample=True,
            temperature=self.args.temperature,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            pad_token_id=self.processing_class.pad_token_id,
            eos_token_id=self.stop_ids or None,
            # Padding ids that the other model lacks: never sampled, and no part of the divergence either.
            suppress_tokens=list(range(self.vocab_size, size)) or None,
        )

    # ------------------------------------------------------------------ the step's text

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """All micro-batches of an optimizer step, with their text, and the number of tokens they score on all ranks.

        transformers restores the random state of a checkpoint only after the first call of this method, so nothing
        here may draw from, or leave a trace in, the global generators: see gkd.sources and `sampling_noise`.
        """
        self._clock.enter("generating")
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        step = self.state.global_step
        self._source = draw_source(self.args.seed, step, self.lmbda, self.seq_kd)
        seed = sampling_seed(self.args.seed, step, self.accelerator.process_index)
        batches = self._with_text(batches, self._source, seed, self._source_metrics["train"])
        scored = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        self._clock.enter("training")
        self._show_phase("training")
        return batches, self.accelerator.reduce(scored.to(device), reduction="sum")

    def _with_text(self, batches, source: Source, seed: int, metrics: SourceMetrics) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of `input_ids`, `attention_mask` and `labels` (B, L), written by `source`."""
        batches = [self._prepare_inputs(batch) for batch in batches]
        if source is Source.DATASET:
            for batch in batches:
                answered = (batch["labels"] != -100).any(1).sum()
                cut = batch["answer_cut"].sum() if "answer_cut" in batch else 0
                metrics.add_completions(source, answered, cut)
            return [{k: batch[k] for k in ("input_ids", "attention_mask", "labels")} for batch in batches]
        self._show_phase(f"generating ({'student' if source is Source.ON_POLICY else 'teacher'})")
        pad = self.processing_class.pad_token_id
        prompts, prompt_mask = stack_prompts(batches, pad)
        writer = self.model_wrapped if source is Source.ON_POLICY else self.teacher_model
        autocast = self.accelerator.autocast() if source is Source.ON_POLICY else torch.no_grad()
        with generation_mode(writer, self.accelerator) as model, sampling_noise(seed, prompts.device), autocast:
            completions, mask = generate_completions(
                model, prompts, prompt_mask, self.generation_configs[source], self.args.generation_batch_size
            )
        ended = torch.isin(completions, torch.tensor(self.stop_ids, device=mask.device)) & mask.bool()
        metrics.add_completions(source, len(prompts), (~ended.any(1)).sum())
        sizes = [len(batch["prompts"]) for batch in batches]
        parts = zip(*(tensor.split(sizes) for tensor in (prompts, prompt_mask, completions, mask)), strict=True)
        return [training_batch(*part, pad=pad) for part in parts]

    # ------------------------------------------------------------------ the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The summed divergence of a micro-batch over `num_items_in_batch`, the step's tokens on all ranks.

        DDP, DeepSpeed and FSDP average gradients over ranks, so the sum is multiplied by their number: one rank with
        accumulation 4 and four ranks with accumulation 1 get the same loss and gradient.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            batch = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
            loss, sums, tokens = run_inside_forward(model, unwrapped, self._summed_loss, unwrapped, *batch)
        self._source_metrics["train" if model.training else "eval"].add_tokens(self._source, sums, tokens)
        if num_items_in_batch is None:
            loss = loss / max(tokens, 1)
        else:
            count = torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
            loss = loss * self.accelerator.num_processes / count
        if not return_outputs:
            return loss
        with torch.no_grad():  # the loss builds no logits; whoever wants the outputs pays for a forward of their own
            return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    def _summed_loss(self, student, input_ids, attention_mask, labels) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Runs inside the student wrapper's forward. ids, mask, labels: (B, L)."""
        scored = labels[:, 1:] != -100  # (B, L - 1); position i predicts token i + 1
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
            teacher_hidden = run_inside_forward(
                self.teacher_model, teacher, last_hidden_states, teacher, input_ids, attention_mask
            )[:, :-1][scored]  # (N, Ht)
        hidden = last_hidden_states(student, input_ids, attention_mask)[:, :-1][scored]  # (N, Hs)
        student_head, teacher_head = LogitHead.of(student), LogitHead.of(teacher)
        with gathered_head(student_head.head, self._zero3), gathered_head(teacher_head.head, self._zero3):
            loss, sums = distillation_loss(
                hidden,
                teacher_hidden,
                labels[:, 1:][scored],
                student_head,
                teacher_head,
                self.vocab_size,
                beta=self.beta,
                temperature=self.args.loss_temperature,
                # Cross-entropy pulls towards the text, which makes sense where somebody better wrote it.
                kd_ratio=1.0 if self._source is Source.ON_POLICY else self.args.kd_ratio,
                head_params=student_head.trainable_params(),
            )
        return loss, sums, hidden.shape[0]

    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, *args, **kwargs):
        """TRL's function of whole logits, in fp32 whatever their dtype. Training uses gkd.losses instead."""
        return StockGKDTrainer.generalized_jsd_loss(student_logits.float(), teacher_logits.float(), *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # TRL's own would draw the source and generate here, for each micro-batch.
        return SFTTrainer.training_step(self, model, inputs, num_items_in_batch)

    # ------------------------------------------------------------------ evaluation and logs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Scores the dataset's answers where there are any and, if λ > 0 or there are none, the student's own text."""
        metrics = self._source_metrics["eval"]
        answered = (inputs["labels"] != -100).any().long().to(self.accelerator.device)
        answered = self.accelerator.reduce(answered, reduction="sum") > 0  # sharded models run in step on all ranks
        sources = [Source.DATASET] if answered else []
        if self.lmbda > 0 or not answered:
            sources.append(Source.ON_POLICY)
        losses = []
        for source in sources:
            self._eval_batches += 1
            rank = self.accelerator.process_index
            seed = sampling_seed(self.args.seed, self._eval_batches, rank, evaluation=True)
            (batch,) = self._with_text([inputs], source, seed, metrics)
            self._source = source
            with torch.no_grad(), self.compute_loss_context_manager():
                losses.append(self.compute_loss(model, batch).detach())
        return losses[0], None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._eval_batches = 0  # every evaluation of a run samples with the same noise
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics, _ = self._source_metrics["eval"].flush()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        for source in (Source.DATASET, Source.ON_POLICY):  # the mean over tokens, not over batches
            if f"{source.label}/loss" in metrics:
                output.metrics[f"{metric_key_prefix}_loss"] = metrics[f"{source.label}/loss"]
                break
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # of training; the closing log holds the steps since the last one
            metrics, tokens = self._source_metrics["train"].flush()
            seconds = self._clock.flush()
            logs |= metrics
            logs["seconds_generating"], logs["seconds_training"] = seconds["generating"], seconds["training"]
            if tokens:
                logs["tokens_per_second"] = tokens / sum(seconds.values())  # scored tokens of all ranks
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        super().log(logs, start_time)

    def _show_phase(self, phase: str) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(phase)


def _with_our_fields(args: GKDArguments | GKDConfig | None) -> GKDArguments:
    """A TRL GKDConfig as GKDArguments, so that a script written for TRL's trainer works."""
    if isinstance(args, GKDArguments):
        return args
    if args is None:
        return GKDArguments()
    return GKDArguments(**{f.name: getattr(args, f.name) for f in fields(args) if f.init})
