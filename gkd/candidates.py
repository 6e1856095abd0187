"""The models of an evaluation by eval_gkd.py: which they are, whether they fit together, and each ready to be asked."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from trl import get_quantization_config

from gkd.collator import stop_token_ids
from gkd.eval_arguments import EvalArguments
from gkd.evaluation import Candidate, evaluation_config
from gkd.generation import CompletionGenerator, generation_mode, sampling_noise
from gkd.heads import LogitHead, last_hidden_states
from gkd.models import load_trained
from gkd.run_folder import has_model
from gkd.scoring import evaluation_statistics
from gkd.text_cache import writer_fingerprint
from gkd.vocabulary import shared_vocab_size


@dataclass
class Entry:
    """A model to evaluate: where it is, and what tables call it."""

    label: str
    path: str
    step: int | None = None
    of_run: bool = False  # loaded as the run trained it


def entries(args: EvalArguments) -> list[Entry]:
    """The run's student before and after, its checkpoints if asked for, and further models.

    Raises:
        ValueError: the run holds no checkpoint, or no model at all; two models would have one name.
    """
    found = []
    if args.run is not None:
        folder = Path(args.run)
        steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if has_model(path))
        if args.checkpoints and not steps:
            raise ValueError(f"{args.run} holds no checkpoints (--save_strategy no?). Leave --checkpoints out.")
        if not has_model(folder) and not steps:
            raise ValueError(f"{args.run} holds neither a trained model nor a checkpoint: nothing was saved yet.")
        found.append(
            Entry("before", args.trained.get("student_adapter") or args.trained["model_name_or_path"], 0, True)
        )
        if args.checkpoints or not has_model(folder):
            kept = steps if args.checkpoints else steps[-1:]
            found += [Entry(f"step {step}", str(folder / f"checkpoint-{step}"), step, True) for step in kept]
        if has_model(folder):
            found.append(Entry("after", args.run, steps[-1] if steps else None, True))
    names = [Path(model).name if Path(model).is_dir() else model for model in args.models]
    labels = names if len(set(names)) == len(names) else args.models
    found += [Entry(label, model) for label, model in zip(labels, args.models, strict=True)]
    if len({entry.label for entry in found}) < len(found):
        raise ValueError(f"--models {' '.join(args.models)}: one is named twice, or like a part of the run.")
    return found


class Models:
    """Checks tokenizers and configs of teacher and students at once, before weights load; then loads them one by one.

    Raises:
        ValueError: a model that is not there; a student whose tokenizer is not the teacher's
            (`gkd.vocabulary.VocabularyMismatch`).
    """

    def __init__(self, args: EvalArguments, students: list[Entry]):
        self.args = args
        options = {"trust_remote_code": args.trust_remote_code}
        teacher, revision = args.teacher_model_name_or_path, args.teacher_revision
        config, teacher_tokenizer, self._stops = _open(teacher, {**options, "revision": revision})
        self._teacher_size = config.get_text_config().vocab_size
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.sizes: dict[str, int] = {}  # how many ids each student shares with the teacher
        for entry in students:
            config, tokenizer, stops = _open(entry.path, options)
            tokenizer = tokenizer or teacher_tokenizer
            if tokenizer is None:
                raise ValueError(f"{entry.path}: neither it nor its teacher has a tokenizer.")
            size = config.get_text_config().vocab_size
            self.sizes[entry.path] = shared_vocab_size(tokenizer, teacher_tokenizer, size, self._teacher_size)
            self._stops += stops
            self.tokenizer = tokenizer  # the last one's: the trained model's, whose template the run set
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        smallest = min(self.sizes.values())
        self.stop_ids = [i for i in stop_token_ids(self.tokenizer, *self._stops) if i < smallest]
        self.generator = CompletionGenerator(args.generation_backend)

    def candidate(
        self,
        accelerator: Accelerator,
        label: str,
        model: nn.Module,
        shared: int,
        teacher: nn.Module | None,
        **more: Any,
    ) -> Candidate:
        """A model as `gkd.evaluation` takes it; a student is scored against `teacher`."""
        size = model.config.get_text_config().vocab_size
        config = evaluation_config(
            self.args.max_new_tokens,
            self.args.eval_temperature,
            self.tokenizer.pad_token_id,
            self.stop_ids,
            range(shared, size),
        )

        def write(prompts: torch.Tensor, mask: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            with generation_mode(model, accelerator) as ready, sampling_noise(seed, prompts.device):
                return self.generator(ready, prompts, mask, config)

        @torch.no_grad()
        def score(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            ids, mask, scored = batch["input_ids"], batch["attention_mask"], batch["scored"]
            states = [last_hidden_states(m, ids, mask).flatten(0, 1).index_select(0, scored) for m in (model, teacher)]
            targets = batch["labels"].flatten().index_select(0, scored + 1)
            heads = LogitHead.of(model), LogitHead.of(teacher)
            return evaluation_statistics(*states, targets, *heads, shared, self.args.beta)

        identity = writer_fingerprint(model, config).hex()
        return Candidate(label, model, identity, write, None if teacher is None else score, **more)

    def student(self, entry: Entry, device: torch.device) -> nn.Module:
        """A student in its own quantization and dtype, with its adapter beside the base."""
        quantization, dtype = None, self.args.dtype or "auto"
        if entry.of_run:
            quantization = get_quantization_config(SimpleNamespace(**self.args.trained))
            dtype = self.args.dtype or self.args.trained["dtype"]
        model = load_trained(entry.path, dtype, quantization, trust_remote_code=self.args.trust_remote_code)
        return model if quantization is not None else model.to(device)


def _open(name: str, options: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase | None, list[Any]]:
    """Config, tokenizer (None if there is none) and what names stop tokens, of a model or of an adapter's base."""
    places = [name]
    if (Path(name) / "adapter_config.json").is_file():
        places.append(PeftConfig.from_pretrained(name).base_model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(places[-1], **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no model there, on disk or on the hub: {error}") from error
    tokenizer = next(_tokenizers(places, options), None)
    stops = [config]
    with suppress(OSError):  # it is optional
        stops.append(GenerationConfig.from_pretrained(places[-1]))
    return config, tokenizer, stops


def _tokenizers(places: list[str], options: dict[str, Any]) -> Iterator[PreTrainedTokenizerBase]:
    for place in places:
        try:
            yield AutoTokenizer.from_pretrained(place, **options)
        except (OSError, ValueError):
            continue
