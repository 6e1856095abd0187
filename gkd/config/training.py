"""The flags of `gkd train`: TRL's dataclasses with ours added."""

import math
import os
import re
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from trl import ModelConfig, ScriptArguments

from gkd.compat import GKDConfig
from gkd.config.generation import GenerationArguments
from gkd.config.teacher import CrossTokenizerArguments, PlacementArguments, TextArguments
from gkd.config.values import check_positive, check_room, check_seed, flag, need, number_or, parse_objects
from gkd.io.paths import check_adapter, read_text
from gkd.io.replaced import replaced
from gkd.io.secrets import is_secret, public
from gkd.metrics.divergences import DivergenceArguments
from gkd.metrics.names import METRICS, more_is_better
from gkd.metrics.tasks import TaskMetrics
from gkd.runs.record import is_guarded

# Options of SFT that GKD inherits and that have no effect: setting one is an error, with the reason.
_NOT_FOR_GKD = {
    "packing": "rows are never packed",
    "padding_free": "batches are padded",
    "assistant_only_loss": "only assistant tokens are ever scored; see --train_on",
    "completion_only_loss": "only completions are ever scored; see --train_on",
    "loss_type": "the loss is the divergence; see --divergence and --kd_ratio",
    "truncation_mode": "a long prompt loses its oldest turns but keeps the system prompt; see --max_length",
    "shuffle_dataset": "rows are drawn in random order already; see --train_sampling_strategy",
    "label_smoothing_factor": "the loss has no one-hot target",
}

AUTO = "auto"  # of --lmbda
NEEDS_HELD_OUT = "measures the student on held-out rows"

# The rest of the message for a flag that needs the teacher beside --teacher_cache.
NO_TEACHER = (
    "needs the teacher, and --teacher_cache loads none: evaluate afterwards, by eval_gkd.py RUN --dataset_name ROWS."
)

# Flags that need the teacher's distribution on held-out rows.
OF_EVALUATION = ("eval_on_start", "eval_strategy", "metrics", "scorer", "load_best_model_at_end")

# Flags that take JSON or the path of a JSON file; the others of _VALID_DICT_FIELDS take JSON only.
_OR_A_FILE = {"accelerator_config", "fsdp_config", "deepspeed"}

# Numbers that must be above 0.
_POSITIVE = (
    "temperature loss_temperature max_new_tokens generation_batch_size steps_per_generation max_skipped_steps lmbda_steps "
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps adam_epsilon"
).split()


@dataclass
class DataArguments(ScriptArguments):
    """TRL's ScriptArguments, where `dataset_name` may also be a local file or folder."""

    dataset_name: str | None = flag(
        None, "Training data: a JSON, JSONL, CSV, TSV or Parquet file, a folder, or a hub id."
    )
    eval_dataset_name: str | None = flag(
        None,
        "Held-out rows, in any form of --dataset_name: evaluated before and after training, and between by "
        "--eval_strategy, which without this flag takes the test split of --dataset_name.",
    )


@dataclass
class StudentArguments(ModelConfig):
    """TRL's ModelConfig with an adapter to continue from."""

    student_adapter: str | None = flag(None, "Folder of a LoRA adapter of the student: training goes on from it.")

    def __post_init__(self):
        super().__post_init__()
        if self.use_peft:
            if self.lora_r < 1:
                raise ValueError(f"--lora_r must be at least 1, not {self.lora_r}.")
            if not 0 <= self.lora_dropout < 1:
                raise ValueError(f"--lora_dropout must lie in [0, 1), not {self.lora_dropout}.")
            if self.lora_task_type != "CAUSAL_LM":
                raise ValueError(f"--lora_task_type {self.lora_task_type}: the student is a CAUSAL_LM.")
        if isinstance(self.lora_target_modules, str) and re.fullmatch(r"[\w.]+", self.lora_target_modules):
            # TRL takes a single name for a pattern, which would have to match a module's whole path.
            self.lora_target_modules = [self.lora_target_modules]
        if self.load_in_4bit or self.load_in_8bit:
            flag = "--load_in_4bit" if self.load_in_4bit else "--load_in_8bit"
            if not (self.use_peft or self.student_adapter):
                raise ValueError(f"{flag} trains through LoRA only: add --use_peft.")
            need(flag, "bitsandbytes", "quantization")
        if self.student_adapter is not None:
            if self.use_peft:
                raise ValueError("--student_adapter goes on with an adapter that exists: drop --use_peft.")
            check_adapter("--student_adapter", self.student_adapter)


@dataclass
class EvaluationArguments:
    """Flags for evaluations, in training and in `gkd evaluate`."""

    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Task metrics on held-out rows, against their answers or, where they have none, the teacher's: "
            f"{', '.join(METRICS)}."
        },
    )
    scorer: str | None = flag(
        None, "A metric of your own, MODULE:FUNCTION of (completion, row) that returns a number."
    )
    eval_temperature: float = flag(0.0, "Of the completions in evaluation; 0 is greedy.")

    def check_evaluation(self) -> None:
        """Raises ValueError for a metric, scorer or temperature that can't be used."""
        TaskMetrics(self.metrics, self.scorer)
        if not 0 <= self.eval_temperature < math.inf:
            raise ValueError(f"--eval_temperature must be a number from 0 on, not {self.eval_temperature}.")


@dataclass
class GKDArguments(
    DivergenceArguments,
    GenerationArguments,
    TextArguments,
    CrossTokenizerArguments,
    PlacementArguments,
    EvaluationArguments,
    GKDConfig,
):
    """TRL's GKDConfig (lmbda, beta, seq_kd, temperature, max_new_tokens, ...) with ours."""

    teacher_model_name_or_path: str | None = flag(
        None, "The teacher: a folder, a hub id, or `self`, a LoRA student's own base without the adapter."
    )
    lmbda: float | str = flag(
        0.5,
        "Share of optimizer steps whose text the student writes (on-policy). auto: none while held-out divergence falls "
        "faster per second on given text, half from then on; needs --eval_dataset_name.",
        parse=number_or(AUTO),
    )
    lmbda_schedule: str = flag(
        "constant",
        "linear: λ grows from 0 at the first step to --lmbda at the last, or over --lmbda_steps. step: λ is 0 for "
        "--lmbda_steps, then --lmbda.",
        choices=["constant", "linear", "step"],
    )
    lmbda_steps: float | None = flag(None, "Of --lmbda_schedule: a number of steps, or below 1 a share of the run's.")
    lmbda_probe_steps: int = flag(
        50, "--lmbda auto tries a few on-policy steps each so many steps, and compares them with the others."
    )
    rollout_guard: str = flag(
        AUTO,
        "on: where much more of the student's text than before is cut off by the limit or repeats itself, its text is "
        "cut to a prefix for some steps, and every second on-policy step takes the other text. auto: unless λ is 0 or 1 all "
        "the time; with 1 a warning tells of it.",
        choices=[AUTO, "on", "off"],
    )
    loss_temperature: float = flag(
        1.0, "Temperature of both distributions inside the divergence (--temperature: of sampling)."
    )
    kd_ratio: float = flag(
        1.0,
        "Share of the divergence in the loss on dataset or teacher text; the rest is cross-entropy. 0.1 "
        "with --lmbda 0 --beta 0 is torchtune's KD loss. The student's own text is never a target.",
    )
    train_on: str = flag(
        "last_turn", "Which assistant turns of a dataset conversation are scored.", choices=["last_turn", "all_turns"]
    )
    chat_template_kwargs: dict[str, Any] | str | None = flag(
        None, "JSON with variables for the chat template, e.g. '{\"enable_thinking\": false}'."
    )
    system_as_user: bool = flag(
        False, "Put a system prompt before the first question, for templates that take no system turn."
    )
    preflight: str = flag(
        "on",
        "Show an example, lengths, stop tokens and the memory a run will need before weights load; `only` stops there.",
        choices=["on", "off", "only"],
    )
    generation_batch_size: int | None = flag(
        None,
        "At most this many prompts of an optimizer step generate together on a device; 256 on a GPU, 64 on a CPU. "
        "Fewer do if the cache of their keys and values would take more than a fifth of the GPU's memory, and half as "
        "many from where memory runs out.",
    )
    steps_per_generation: int = flag(
        1,
        "Generate the student's text of this many optimizer steps at once. 1 is exactly on-policy; more is "
        "faster, with text up to N - 1 steps old. The "
        "teacher's text is written ahead as much as --generation_batch_size holds, if it is cached and weights are whole.",
    )
    teacher_text_cache: str = flag(
        "auto",
        "Where --seq_kd keeps the teacher's text, so that later epochs and restarts reuse it: a folder, which "
        "runs may share; auto: OUTPUT_DIR/_teacher_text; off: sample anew each time.",
    )
    teacher_cache: str | None = flag(
        None,
        "Folder that cache_teacher.py made: rows, and what the teacher says of them, come from there and no "
        "teacher loads. For λ = 0; from the teacher's top k for small β or a skew KL, since the reverse ones need more, "
        "from its hidden states (--keep hidden) for any.",
    )
    log_completions: int = flag(
        0, "Print this many completions of each writer at each log, and send them to --report_to."
    )
    # In TRL this flag is for both models.
    trust_remote_code: bool = flag(
        False, "Run model code that comes with the student. The teacher's has a flag of its own."
    )

    # In TRL the default is that of the student's config, mostly 0.001.
    router_aux_loss_coef: float = flag(
        0.0,
        "Weight of the load-balancing loss of a student that is a mixture of experts, as transformers computes "
        "it for each micro-batch; logged as aux_loss.",
    )

    max_skipped_steps: int = flag(
        5,
        "An optimizer step with a NaN or infinite loss or gradient is skipped; so many in a row stop the run (with "
        "--fp16 at least 40, since its scale is found by skipping).",
    )
    auto_micro_batch: bool = flag(
        False,
        "Where memory is too short, halve the micro-batch and keep the global batch: at once in a single "
        "process, on the next start with several.",
    )

    # transformers' default replaces NaN losses in the log, and checks each micro-batch for them, which waits for the GPU.
    logging_nan_inf_filter: bool = flag(False, "Hide NaN and inf losses from the log.")

    _VALID_DICT_FIELDS = [*GKDConfig._VALID_DICT_FIELDS, "chat_template_kwargs", "teacher_text_options"]

    def __post_init__(self):
        if self.generation_batch_size is None:
            self.generation_batch_size = 256 if torch.cuda.is_available() and not self.use_cpu else 64
        self._check_ranges()
        parse_objects(self, sorted(set(self._VALID_DICT_FIELDS) - _OR_A_FILE))
        if self.generates:
            check_room(self)
        self.check_teacher()
        self.check_text()
        self.check_cross_tokenizer()
        self.check_evaluation()
        if self.router_aux_loss_coef and self.uses_fsdp:
            # The model's own forward, which the term comes from, crashes on GPUs under FSDP2.
            raise ValueError("--router_aux_loss_coef is not supported under FSDP: use DDP, ZeRO-2 or ZeRO-3.")
        for name in ("deepspeed", "fsdp_config", "accelerator_config"):
            if isinstance(path := getattr(self, name), str) and os.path.isfile(path):
                read_text(path)  # the libraries' decode error would not name the file
        if self.teacher_cache is not None:
            for name in OF_EVALUATION:
                if getattr(self, name) not in (None, False, [], "no"):
                    raise ValueError(f"--{name} {NO_TEACHER}")
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes more as better for every name that does not end in "loss".
            self.greater_is_better = more_is_better(self.metric_for_best_model)
        if self.deepspeed is not None:
            need("--deepspeed", "deepspeed", "deepspeed")
        self.use_liger_kernel = (
            False  # gkd.models.kernels has them in place while it trains; transformers would for good
        )
        defaults = {f.name: f.default for f in fields(self)}
        for name, why in _NOT_FOR_GKD.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name} does not apply to GKD: {why}.")
        if not torch.accelerator.is_available():  # no need for --use_cpu on a machine without accelerator
            self.use_cpu = True
            self.bf16 = bool(self.bf16)  # TRL's default is bf16, which is slower than fp32 on most CPUs
        with warnings.catch_warnings():
            # TRL 1.16 sets the old name itself, so users can't act on the warning.
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            with replaced(self, "lmbda", 0.5 if self.lmbda == AUTO else self.lmbda):  # TRL's compares it with numbers
                super().__post_init__()
        self.check_placement()
        self.check_generation(self.student_is_sharded, in_step=True)
        if (
            self.torch_compile
        ):  # accelerate would wrap the model; gkd.models.loading.compile_layers compiles each layer
            for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
                os.environ.pop(name, None)

    @property
    def generates(self) -> bool:
        """Whether a model writes text under these flags, leaving --eval_dataset_name aside."""
        evaluates = self.eval_on_start or self.eval_strategy != "no"
        return self.student_writes or (self.seq_kd and self.teacher_cache is None) or evaluates

    @property
    def student_writes(self) -> bool:
        """Whether a step may be on-policy."""
        return self.lmbda == AUTO or self.lmbda > 0

    @property
    def compares(self) -> bool:
        """Whether the loss of a step may have a divergence: else it is the cross-entropy of given text, and SFT."""
        return self.student_writes or self.kd_ratio > 0

    @property
    def is_supervised(self) -> bool:
        """Whether a step may be on text of the dataset or the teacher."""
        varies = self.lmbda == AUTO or self.lmbda_schedule != "constant" or self.rollout_guard == "on"
        return varies or self.lmbda < 1

    @property
    def guarded(self) -> bool:
        """Whether `--rollout_guard` acts."""
        return is_guarded(vars(self))

    @property
    def probe_length(self) -> int:
        """Steps of a probe of --lmbda auto: about an eighth of all, and whole generations."""
        least = max(self.lmbda_probe_steps // 8, 1)
        return -(-least // self.steps_per_generation) * self.steps_per_generation

    @property
    def needs_length(self) -> bool:
        """Whether λ depends on the number of the run's steps."""
        share = self.lmbda_steps is None or self.lmbda_steps < 1
        return self.lmbda_schedule != "constant" and share

    @property
    def caches_teacher_text(self) -> bool:
        """Whether the teacher writes text that --teacher_text_cache keeps."""
        return self.seq_kd and self.is_supervised and self.teacher_text_cache != "off"

    def _check_ranges(self) -> None:
        """Raises ValueError for a number out of its range."""
        for name in ("lmbda", "beta", "kd_ratio"):
            value = getattr(self, name)
            if (name, value) != ("lmbda", AUTO) and not (isinstance(value, int | float) and 0.0 <= value <= 1.0):
                raise ValueError(f"--{name} must lie in [0, 1], not {value}.")
        check_positive(self, _POSITIVE)
        self._check_lmbda()
        self.check_divergence()
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "neftune_noise_alpha"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"--{name} must be a number from 0 on, not {getattr(self, name)}.")
        check_seed(self, "seed", "data_seed")
        if self.max_steps == 0:
            raise ValueError(
                "--max_steps 0 trains nothing: give the number of steps, or leave it out for whole epochs."
            )
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"--num_train_epochs {self.num_train_epochs} trains nothing that ends: give a positive number, or --max_steps."
            )
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError("--activation_offloading moves activations from a GPU to the CPU: there is no GPU.")
        if self.save_strategy == "best" and (self.metric_for_best_model is None or self.eval_strategy == "no"):
            raise ValueError("--save_strategy best needs --metric_for_best_model and --eval_strategy steps or epoch.")

    def _check_lmbda(self) -> None:
        """Raises ValueError for flags of λ that do not go together."""
        scheduled = self.lmbda_schedule != "constant"
        if scheduled and not (self.lmbda != AUTO and self.lmbda > 0):
            raise ValueError(
                f"--lmbda_schedule {self.lmbda_schedule} grows to --lmbda, which must be a number above 0."
            )
        if self.lmbda_schedule == "step" and self.lmbda_steps is None:
            raise ValueError("--lmbda_schedule step needs --lmbda_steps: after how many steps λ is --lmbda.")
        if self.lmbda_steps is not None and not scheduled:
            raise ValueError("--lmbda_steps has no effect without --lmbda_schedule linear or step.")
        if self.lmbda_steps is not None and self.lmbda_steps >= 1 and self.lmbda_steps % 1:
            raise ValueError(f"--lmbda_steps {self.lmbda_steps}: from 1 on it is a whole number of steps.")
        if self.lmbda == AUTO and self.lmbda_probe_steps < 2 * self.probe_length:
            raise ValueError(
                f"--lmbda_probe_steps {self.lmbda_probe_steps} has no room for a probe, of {self.probe_length} steps with "
                f" --steps_per_generation {self.steps_per_generation}."
            )
        earliest = 3 * self.lmbda_probe_steps - self.probe_length
        if self.lmbda == AUTO and 0 < self.max_steps <= earliest:
            raise ValueError(
                f"--lmbda auto decides after two probes at the earliest, at step {earliest}, and the run has "
                f"{self.max_steps}: lower --lmbda_probe_steps."
            )
        if self.rollout_guard == "on" and not self.student_writes:
            raise ValueError("--rollout_guard on watches the student's own text, which --lmbda 0 never trains on.")

    # Secrets are masked on all ways out of the process: training_args.bin in checkpoints, trackers, and printing.

    def __getstate__(self) -> dict[str, Any]:
        return {name: None if is_secret(name) else public(value) for name, value in vars(self).items()}

    def to_dict(self) -> dict[str, Any]:
        return public(super().to_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"

    __str__ = __repr__
