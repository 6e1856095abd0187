"""`GKDTrainer`: TRL's GKDTrainer, with the same arguments, dataset columns and checkpoints, made right.

An optimizer step flows through these methods in this order:

    get_batch_samples   draws the source of the step's text, generates it for all micro-batches, counts the tokens
    training_step       once per micro-batch, transformers' own
    compute_loss        hidden states of teacher and student -> summed divergence over the global token count
    log                 the metrics of all steps since the last log, averaged over tokens and ranks

and an evaluation through gkd.trainer_evaluation. What a run must outlive is in gkd.trainer_survival.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.logging import get_logger
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, ProgressCallback, set_seed

from gkd.arguments import GKDArguments, check_room
from gkd.collator import IGNORE, GKDCollator, RowEncoder, encode_dataset, never_stops, stop_token_ids
from gkd.dropout import disable_base_dropout, settle_dropout
from gkd.evaluation import Evaluation
from gkd.generation import CompletionGenerator
from gkd.heads import (
    LogitHead,
    base_of,
    check_projection,
    hidden_states_and_balance,
    is_plain_linear,
    last_hidden_states,
)
from gkd.live import Completions, Progress
from gkd.losses import distillation_loss
from gkd.metrics import SourceMetrics
from gkd.models import (
    add_lora,
    apply_token_flags,
    check_architecture,
    compile_layers,
    freeze,
    load_pretrained,
)
from gkd.placement import SELF
from gkd.sharding import check_fsdp
from gkd.sources import Source, draw_source, sampling_seed
from gkd.step_text import PlannedStep, StepText, TextWriter, scored_positions
from gkd.teacher import NoTeacher, place_teacher
from gkd.teacher_cache import TeacherCache
from gkd.text_cache import TextCache, writer_fingerprint
from gkd.trainer_evaluation import EvaluatesHeldOut
from gkd.trainer_survival import Survives
from gkd.trl_compat import (
    GKDConfig,
    SFTTrainer,
    StockGKDTrainer,
    forward_kept,
    head_adapter_hidden,
    moe_config_kept,
    run_inside_forward,
    set_checkpointing_kwargs,
)
from gkd.vocabulary import shared_vocab_size

logger = get_logger(__name__)

# In the output folder: what the teacher wrote (--teacher_text_cache auto).
TEXT_FOLDER = "_teacher_text"  # --push_to_hub leaves out what begins with _


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


class GKDTrainer(EvaluatesHeldOut, Survives, StockGKDTrainer):
    """Trains a student on its own text, the teacher's or the dataset's, towards the teacher's distribution.

    Takes the arguments of TRL's GKDTrainer and, if the two models' vocabularies differ in padding,
    `teacher_processing_class`, the teacher's tokenizer. With `teacher_cache` there is no teacher: rows, unless given,
    and what it says of them come from the cache. `args` may be a TRL GKDConfig. Datasets hold raw rows (see
    gkd.rows) or rows encoded by `gkd.collator.encode_dataset`. Where the teacher is: see gkd.placement.

    Raises:
        ValueError: no teacher; a cache that is not for this student, or is asked for more than it holds; vocabularies
            that differ (`gkd.vocabulary.VocabularyMismatch`); a row that can't be used (`gkd.rows.DataError`); an
            architecture whose logits are not head(hidden states).
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
        teacher_cache: TeacherCache | None = None,
    ):
        args = _with_our_fields(args)
        if eval_dataset is not None:
            check_room(args)
        if teacher_cache is not None:
            if teacher_model is not None or eval_dataset is not None:
                raise ValueError("With teacher_cache= there is no teacher: no teacher_model= and no eval_dataset=.")
            train_dataset = teacher_cache.rows() if train_dataset is None else train_dataset
        else:
            teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None and teacher_cache is None:
            raise ValueError("GKD needs a teacher: pass teacher_model= or --teacher_model_name_or_path.")
        for who, given in (("student", model), ("teacher", teacher_model)):
            if isinstance(given, nn.Module):
                check_architecture(base_of(given).config, f"The {who}")
        if isinstance(model, str):
            model = load_pretrained(
                model, **{"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            )
        if isinstance(teacher_model, str) and not args.teacher_is_student:
            extra = {"trust_remote_code": args.teacher_trust_remote_code, "dtype": args.teacher_dtype}
            teacher_model = load_pretrained(teacher_model, **{**extra, **(args.teacher_model_init_kwargs or {})})
        if processing_class is None:
            name = base_of(model).config._name_or_path
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        apply_token_flags(processing_class, args)
        if args.n_gpu > 1:  # transformers would wrap the model in nn.DataParallel, whose replicas share no loss
            if args.teacher_device is None:
                logger.warning("Started without a launcher: one GPU of several is used. `accelerate launch` uses all.")
            args._n_gpu = 1
        if compute_metrics is not None:
            logger.warning("compute_metrics is not called: no logits are kept. See --metrics and --scorer.")
        if teacher_model is not None and not args.teacher_is_student:
            freeze(teacher_model)
        if args.disable_dropout:
            disable_base_dropout(model)
        if peft_config is not None:
            set_seed(args.seed)  # a fresh adapter is random
            model = add_lora(model, peft_config, args)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError("Prompt-learning adapters (prefix tuning, prompt tuning) are not supported; use LoRA.")
        if args.teacher_is_student:
            if not isinstance(model, PeftModel):
                raise ValueError(f"A teacher {SELF!r} is the student without its adapter: pass peft_config=.")
            teacher_model = model
        self._teacher_name = args.teacher_model_name_or_path
        if self._teacher_name in (None, SELF) and teacher_model is not None:
            self._teacher_name = base_of(teacher_model).config._name_or_path

        both = [m for m in (model, teacher_model) if m is not None]
        sizes = [base_of(m).config.get_text_config().vocab_size for m in both]
        holders = [c for m in both for c in (base_of(m).config, base_of(m).generation_config)]
        if teacher_cache is None:
            self.vocab_size = shared_vocab_size(processing_class, teacher_processing_class, *sizes)
        else:
            teacher_cache.check(processing_class, sizes[0], args)
            self.vocab_size = teacher_cache.vocab_size
            holders.append(teacher_cache)
        self.stop_ids = [i for i in stop_token_ids(processing_class, *holders) if i < self.vocab_size]
        self._encoder = RowEncoder.of(args, processing_class, self.stop_ids)
        if data_collator is None:
            data_collator = GKDCollator(processing_class.pad_token_id)
            given = train_dataset
            train_dataset = encode_dataset(given, self._encoder, args.dataset_num_proc)
            own = train_dataset is not given and args.lmbda < 1 and not args.seq_kd  # else train_gkd.py has told
            if own and (warning := never_stops(train_dataset, self.stop_ids)):
                logger.warning("Warning: %s.", warning)
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: self.held_out(part) for name, part in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = self.held_out(eval_dataset)
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}

        if args.router_aux_loss_coef is None:  # of a TRL GKDConfig
            args.router_aux_loss_coef = 0.0

        # Past TRL's own GKDTrainer.__init__, to the SFTTrainer below it: between the two lie the vocabulary check, the
        # dropout switch and the teacher's preparation that we replace.
        with head_adapter_hidden(model), moe_config_kept(model), forward_kept(args):
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
        progress = [c for c in self.callback_handler.callbacks if type(c) is ProgressCallback]
        if progress:  # not in a notebook, nor with --disable_tqdm
            self.remove_callback(progress[0])
            self.add_callback(Progress)
        self._completions = Completions(args.log_completions) if args.log_completions > 0 else None
        if self._completions is not None:
            self._completions.attach(self.callback_handler)
            self.add_callback(self._completions)
        # Our loss is a sum over the step's tokens divided by their global count: accumulation must not divide it again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.lmbda, self.beta, self.temperature = args.lmbda, args.beta, args.temperature
        self.seq_kd = args.seq_kd and teacher_model is not None  # a cache holds its text
        self._zero3 = self.is_deepspeed_enabled and self.accelerator.deepspeed_plugin.zero_stage == 3
        if self._zero3 and not all(is_plain_linear(LogitHead.of(m).head) for m in (self.model, *both[1:])):
            raise ValueError(
                "ZeRO-3 with an output head that is not a plain linear layer (LoRA on lm_head, 4-bit weights) is not "
                "supported: use --use_peft with other targets, ds_configs/zero2.yaml or ds_configs/fsdp2.yaml."
            )
        if self.is_fsdp_enabled:
            check_fsdp(self.accelerator)
        self._sharded = self._zero3 or self.is_fsdp_enabled
        cache = None
        if self.seq_kd and args.lmbda < 1 and args.teacher_text_cache != "off":
            if any(p.numel() == 0 for p in teacher_model.parameters()):
                logger.warning("The teacher's text is not cached: ZeRO-3 spread its weights, by which it is known.")
            else:
                folder = args.teacher_text_cache
                folder = Path(args.output_dir, TEXT_FOLDER) if folder == "auto" else folder
                own = self._generation_config(teacher_model), args.teacher_is_student
                cache = TextCache(folder, writer_fingerprint(teacher_model, *own), vocab_size=self.vocab_size)
        self._teacher = (
            NoTeacher()
            if teacher_model is None
            else place_teacher(
                teacher_model, self.accelerator, args, processing_class.pad_token_id, self._zero3, self.is_fsdp_enabled
            )
        )
        self.teacher_model = self._teacher.model
        if len(set(sizes)) > 1:
            logger.warning(
                f"Vocabularies of {sizes[0]} (student) and {sizes[1]} (teacher) differ in padding alone: training over "
                f"the {self.vocab_size} ids that both have."
            )
        if not self._sharded:  # sharded parameters can't be called outside their wrapper yet
            check_projection(self.model, "student")
        self._dropout, self._evaluating = settle_dropout(
            self.model, args.disable_dropout, args.gradient_checkpointing, callable_alone=not self._sharded
        )
        # Recomputing a layer without dropout gives the same result whatever the random state.
        set_checkpointing_kwargs(
            args, **({} if self._dropout else {"use_reentrant": False, "preserve_rng_state": False})
        )
        if (
            self.aux_loss_enabled
            and args.gradient_checkpointing
            and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        ):
            raise ValueError("--router_aux_loss_coef: reentrant checkpointing drops the gradient of the routers.")
        self.generation_configs = {
            source: self._generation_config(m)
            for source, m in zip((Source.ON_POLICY, Source.TEACHER), both, strict=False)
        }
        self._generator = CompletionGenerator(
            self._generation_backend(),
            args.generation_batch_size,
            shrinks=args.auto_micro_batch
            and not (self._sharded or self._teacher.sharded),  # those ranks generate in step
        )
        if not self._teacher.stays:
            self._generator.keep_dynamic(self._teacher.inner)
        self._writer = TextWriter(
            self.accelerator,
            self._generator,
            writers=lambda source: (
                self._teacher.writing()
                if source is Source.TEACHER
                else nullcontext((self.model_wrapped, self.accelerator.device))
            ),
            configs=self.generation_configs,
            prepare=self._prepare_inputs,
            show_phase=self._show_phase,
            pad=processing_class.pad_token_id,
            cache=cache,
            sharded=self._teacher.sharded,
            keep_mask=self.aux_loss_enabled,
        )
        if args.torch_compile:
            for m in {
                id(m): m for m in (self.model, *both[1:])
            }.values():  # one, where the teacher is the student's base
                compile_layers(m, args.torch_compile_backend, args.torch_compile_mode)
        self._inner_models: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._parameters: int | None = None
        self._source = Source.DATASET
        self._step_rows = 0  # of this rank, in the optimizer step
        self._planned: deque[PlannedStep] = deque()  # the next step, and others whose rows have been read
        self._captured = (0.0, 0.0)  # seconds of capture that a log has told, in generation and training
        self._clock = PhaseClock()
        self._source_metrics = SourceMetrics(self.accelerator)
        self._evaluations: dict[str, Evaluation] = {}  # by the prefix of their metrics
        self.eval_data_name = "held out"  # what results call the rows
        self._init_survival()

    def _generation_backend(self) -> str:
        backend = self.args.generation_backend
        if not self._sharded:
            return backend
        if backend == "static":
            raise ValueError(
                "--generation_backend static needs whole weights on each GPU: use ZeRO-2 or DDP, or auto."
            )
        logger.warning("Sharded weights (ZeRO-3, FSDP) generate with a dynamic cache, which is slower than ZeRO-2.")
        return "dynamic"

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

    @property
    def generation_config(self) -> GenerationConfig:
        """How the student samples its own text, by TRL's name."""
        return self.generation_configs[Source.ON_POLICY]

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.generation_configs[Source.ON_POLICY] = config

    def get_train_dataloader(self):
        """transformers' own; called for each attempt to train. Batches stay on the CPU, where counting is no wait."""
        self._planned.clear()  # what an earlier attempt read ahead and did not come to
        loader = super().get_train_dataloader()
        if isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    # ------------------------------------------------------------------ the step's text

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """All micro-batches of an optimizer step, with their text, and the number of tokens they score on all ranks.

        transformers restores the random state of a checkpoint only after the first call of this method, so nothing
        here may draw from, or leave a trace in, the global generators: see gkd.sources and `sampling_noise`.
        """
        self._clock.enter("generating")
        if self._planned or self._plan(epoch_iterator, num_batches, device):
            with self._teacher.stay():
                self._write(epoch_iterator, num_batches, device)
                self._doing = "the teacher's forward"
                self._teacher.prepare(self._planned[0].text.batches)
        self._clock.enter("training")
        if not self._planned:
            return [], None
        text = self._planned.popleft().text
        self._source = text.source
        self._step_rows = sum(len(batch["input_ids"]) for batch in text.batches)
        self._source_metrics.add_completions(text.source, text.completions, text.truncated, text.empty)
        self._show_phase("training")
        if self._completions is not None and text.source is not Source.DATASET and self.is_world_process_zero():
            self._keep_completions(text)
        self._begin_step(text.batches)
        return text.batches, self._count_tokens(text.scored_tokens, device)

    def _keep_completions(self, text: StepText) -> None:
        decode = partial(self.processing_class.decode, skip_special_tokens=True)
        batch = text.batches[0]
        count = self.args.log_completions
        prompts, completions = [], []
        for ids, labels in zip(batch["input_ids"][:count].cpu(), batch["labels"][:count].cpu(), strict=True):
            start = int((labels == IGNORE).int().argmin())  # the completion is what is scored, behind the prompt
            prompts.append(decode(ids[:start]))
            completions.append(decode(ids[labels != IGNORE]))
        self._completions.keep(text.source.label, self.state.global_step + 1, prompts, completions)

    def _plan(self, epoch_iterator, num_batches: int, device) -> bool:
        """Reads the rows of one more step and draws its source; False where the epoch or the run has no more."""
        step = self.state.global_step + len(self._planned)
        if step >= self.state.max_steps > 0:
            return False
        batches = list(islice(epoch_iterator, num_batches))
        if batches:
            planned = PlannedStep(draw_source(self.args.seed, step, self.lmbda, self.seq_kd), batches)
            planned.text = self._pending.pop(step, None)
            self._planned.append(planned)
        return bool(batches)

    def _look_up(self, planned: PlannedStep, device) -> int:
        """Asks the cache for a step's text by the teacher; how many of its prompts, on all ranks, it has yet to answer.

        Whatever the ranks store, they store after all of them have looked up all steps of a generation: none depends on
        how fast another is. The sum over the ranks is what they compare, since reading ahead may itself be collective.
        """
        planned.found = self._writer.found(planned.batches)
        lacking = torch.tensor(planned.found.count(None), device=device)
        return int(
            self.accelerator.reduce(lacking, reduction="sum") if self.accelerator.num_processes > 1 else lacking
        )

    def _write(self, epoch_iterator, num_batches: int, device) -> None:
        """Sees to it that the next step has its text, and writes what later ones need where that may be done early.

        The student's text goes stale, so it is written `steps_per_generation` steps at a time. The teacher's does not:
        as many prompts as a generation holds are written at once, since more rows hardly make it slower. They go
        through the cache, so that a run that is resumed between finds the same text.
        """
        source = self._planned[0].source
        if self._planned[0].text is not None:
            return
        full = self.args.generation_batch_size
        ahead = self.args.steps_per_generation
        if source is Source.DATASET:
            ahead = 1
        elif source is Source.TEACHER and self._writer.cache is not None and not self._teacher.sharded:
            # From the front, whatever has been read already: so a resumed run, which has read less, writes the same.
            every = full * self.accelerator.num_processes
            lacking = ahead = 0
            while lacking < every and ahead < full:
                if ahead == len(self._planned) and not self._plan(epoch_iterator, num_batches, device):
                    break
                planned = self._planned[ahead]
                if planned.source is Source.TEACHER and planned.text is None:
                    lacking += self._look_up(planned, device)
                ahead += 1
        while len(self._planned) < ahead and self._plan(epoch_iterator, num_batches, device):
            pass
        mine = [p for p in islice(self._planned, ahead) if p.source is source and p.text is None]
        if source is Source.TEACHER and self._teacher.sharded:
            for planned in mine:
                self._look_up(planned, device)
        seed = sampling_seed(self.args.seed, self.state.global_step, self.accelerator.process_index)
        texts = self._writer.write(mine, seed, self.state.global_step)
        for planned, text in zip(mine, texts, strict=True):
            planned.text = text

    # ------------------------------------------------------------------ the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The summed divergence of a micro-batch over `num_items_in_batch`, the step's tokens on all ranks.

        DDP, DeepSpeed and FSDP average gradients over ranks, so the sum is multiplied by their number: one rank with
        accumulation 4 and four ranks with accumulation 1 get the same loss and gradient.
        """
        unwrapped = self._unwrapped(model)
        for module in self._evaluating:
            module.training = False
        with self.accelerator.autocast():
            batch = [inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"]]
            batch.append(inputs["scored"] if "scored" in inputs else scored_positions(inputs["labels"]))
            batch.append(next((inputs[name] for name in ("topk", "teacher_hidden") if name in inputs), None))
            loss, sums, tokens, balance = run_inside_forward(model, unwrapped, self._summed_loss, unwrapped, *batch)
        self._source_metrics.add_tokens(self._source, sums, tokens)
        if num_items_in_batch is None:
            loss = loss / max(tokens, 1)
        else:
            count = torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
            loss = loss * self.accelerator.num_processes / count
        if balance is not None:  # of this micro-batch: the step has the mean of them, over ranks too
            rows = len(inputs["input_ids"])
            self._source_metrics.add_balance(balance, rows)
            share = 1.0 if num_items_in_batch is None else rows / self._step_rows
            loss = loss + self.args.router_aux_loss_coef * share * balance
        # A loss that is not finite makes the gradient of all ranks so, by which the step is known and skipped.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self._doing = "the student's backward"
        if not return_outputs:
            return loss
        with torch.no_grad():  # the loss builds no logits; whoever wants the outputs pays for a forward of their own
            return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))

    def _summed_loss(
        self, student, input_ids, attention_mask, labels, scored, known=None
    ) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor | None]:
        """Runs inside the student wrapper's forward. ids, mask, labels: (B, L); scored: (N,), see StepText.

        known: of the teacher, where that is known ahead: its hidden states (N, Ht), or a TopK of N positions.

        Returns:
            The summed loss, its statistics, the number of scored tokens, and the load-balancing loss if it is asked for.
        """
        balance = None

        def forward(*inputs):
            nonlocal balance
            if not self.aux_loss_enabled:
                return last_hidden_states(*inputs)
            hidden, balance = hidden_states_and_balance(*inputs)
            return hidden

        def divergence(hidden, teacher_hidden, targets, student_head, teacher_head):
            return distillation_loss(
                hidden,
                teacher_hidden,
                targets,
                student_head,
                teacher_head,
                self.vocab_size,
                beta=self.beta,
                temperature=self.args.loss_temperature,
                # Cross-entropy pulls towards the text, which makes sense where somebody better wrote it.
                kd_ratio=1.0 if self._source is Source.ON_POLICY else self.args.kd_ratio,
                head_params=student_head.trainable_params(),
            )

        batch = (input_ids, attention_mask, labels, scored, known)
        loss, statistics = self._at_scored(divergence, student, *batch, forward=forward)
        return loss, statistics.sum(1), len(scored), balance

    def _at_scored(
        self,
        function: Callable,
        student,
        input_ids,
        attention_mask,
        labels,
        scored,
        known=None,
        forward: Callable = last_hidden_states,
    ):
        """function(student's states (N, Hs), teacher's (N, Ht), their next tokens (N,), student's head, teacher's).

        Given a TopK, that stands for the teacher's states, and its head is None.
        """
        if known is None:
            self._doing = "the teacher's forward"
            known = self._teacher.hidden(input_ids, attention_mask, scored)  # (N, Ht)
        self._doing = "the student's forward and the divergence"
        hidden = forward(student, input_ids, attention_mask).flatten(0, 1).index_select(0, scored)  # (N, Hs)
        targets = labels.flatten().index_select(0, scored + 1)
        student_head = LogitHead.of(student, gathered=self._sharded)
        with self._teacher.head() as teacher_head:

            def compute(hidden: torch.Tensor):
                return function(hidden, known, targets, student_head, teacher_head)

            if not self._sharded:
                return compute(hidden)
            # Inside the head's own forward, ZeRO-3 and FSDP2 gather it once for all chunks of logits, of which ranks
            # have different numbers, and once more before its gradient arrives.
            return run_inside_forward(student_head.head, student_head.head, compute, hidden)

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        """`accelerator.unwrap_model` searches all modules of a model, which takes as long as some of its layers."""
        found = self._inner_models.get(model)
        if found is None:
            found = self._inner_models[model] = self.accelerator.unwrap_model(model)
        return found

    def floating_point_ops(self, inputs) -> int:
        # transformers counts the parameters anew for each micro-batch.
        if self._parameters is None:
            self._parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameters

    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, *args, **kwargs):
        """TRL's function of whole logits, in fp32 whatever their dtype. Training uses gkd.losses instead."""
        return StockGKDTrainer.generalized_jsd_loss(student_logits.float(), teacher_logits.float(), *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Under autocast, peft casts the bf16 input of each adapter to the adapter's fp32, and the linear layer casts it
        # back. Leaving that out changes no bit; dropout alone would notice.
        inner = self._unwrapped(model)
        needless = isinstance(inner, PeftModel) and self.accelerator.native_amp and not self._dropout
        with disable_input_dtype_casting(inner, active=needless):
            return super().training_step(model, inputs, num_items_in_batch)

    # ------------------------------------------------------------------ logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # of training; the closing log holds the steps since the last one
            metrics, tokens = self._source_metrics.flush()
            seconds = self._clock.flush()
            logs |= metrics
            # Capturing CUDA graphs, once a shape, is told apart.
            before, self._captured = self._captured, self._capture_seconds()
            for phase, total, earlier in zip(("generating", "training"), self._captured, before, strict=True):
                logs[f"seconds_{phase}"] = seconds[phase] - (total - earlier)
            if captured := sum(self._captured) - sum(before):
                logs["seconds_capturing"] = captured
            if tokens:
                logs["tokens_per_second"] = tokens / sum(seconds.values())  # scored tokens of all ranks
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self._tell_skipped(logs)
        super().log(logs, start_time)

    def _capture_seconds(self) -> tuple[float, float]:
        """Spent so far on capturing CUDA graphs, of generation and of the teacher's forward."""
        return self._generator.capture_seconds, self._teacher.capture_seconds

    def _show_phase(self, phase: str) -> None:
        self._doing = phase
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.show_phase(phase)


def _with_our_fields(args: GKDArguments | GKDConfig | None) -> GKDArguments:
    """A TRL GKDConfig as GKDArguments, so that a script written for TRL's trainer works."""
    if isinstance(args, GKDArguments):
        return args
    if args is None:
        return GKDArguments()
    values = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
    if values["loss_type"] == "chunked_nll":  # TRL before 1.15 writes it over its default
        values["loss_type"] = None
    return GKDArguments(**values)
