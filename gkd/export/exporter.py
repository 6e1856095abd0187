"""Exports a trained student as a folder that needs neither gkd nor peft: merged, saved, read back, compared."""

import gc
from contextlib import suppress
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from gkd.export.card import model_card
from gkd.export.check import Check, Exported, centred_logits, rms, sample_tokens
from gkd.export.source import Source, cast, find_model
from gkd.io.files import appearing
from gkd.models.tokenizers import stop_token_ids

# transformers refuses to save these along with do_sample=False.
_SAMPLING = "temperature top_p top_k min_p top_h typical_p epsilon_cutoff eta_cutoff".split()


def merge(model: PeftModel) -> nn.Module:
    """Adds the adapter to the base's weights, in place, and returns the base."""
    base = model.get_base_model()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in (inputs, outputs)):
        # A head tied to the embeddings holds the same tensor: what is added to one would be added to both.
        shared = {id(parameter) for parameter in inputs.parameters()}
        for module in outputs.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in shared:
                    setattr(module, name, nn.Parameter(parameter.detach().clone()))
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    return model.merge_and_unload()


def _complete_generation_config(model: nn.Module, source: Source, teacher_trust_remote_code: bool) -> None:
    """Sets every stop token of student and teacher and a pad token, and clears what can't be saved."""
    holders = [source.tokenizer, model.config, model.generation_config]
    teacher = source.arguments.get("teacher_model_name_or_path")
    load_config = partial(AutoConfig.from_pretrained, trust_remote_code=teacher_trust_remote_code)
    for load in (load_config, GenerationConfig.from_pretrained) if teacher else ():
        with suppress(OSError, ValueError):  # the teacher may be gone; its stop tokens are helpful, not needed
            holders.append(load(teacher, local_files_only=True))
    config = model.generation_config
    config._from_model_config = False  # or transformers 4 would take the stop tokens of config.json instead
    config.eos_token_id = stop_token_ids(*holders)
    pad = source.tokenizer.pad_token_id
    config.pad_token_id = config.eos_token_id[0] if pad is None else pad
    if not config.do_sample:
        for name in _SAMPLING:
            setattr(config, name, None)


def export(
    run: str | PathLike,
    output_dir: str | PathLike,
    *,
    checkpoint: str | None = None,
    name: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    teacher_trust_remote_code: bool = False,
) -> Exported:
    """Merges the adapter, saves, reads back, compares and describes, as `gkd export` does. Holds one model at a time.

    Args:
        run: folder of a run, a checkpoint, a model or an adapter.
        output_dir: must not exist, or be empty; it appears once everything has succeeded.
        checkpoint: of the run, `last`, `best` or a step; None: the final model, else the last checkpoint.
        name: what the card calls the model; None: the folder's name.
        dtype: of the exported weights, such as `bfloat16`; `auto`: as the base model, or the whole one, is stored.
        device: where the model is merged and compared; None: `cuda` where there is one.

    Raises:
        ValueError: no model there; `output_dir` holds something; the exported model does not compute what was trained.
    """
    out = Path(output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not an empty folder.")
    source = Source.open(find_model(str(run), checkpoint), trust_remote_code)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    stored = source.config.dtype or source.config.get_text_config().dtype or torch.float32
    target = stored if dtype == "auto" else getattr(torch, dtype)
    samples, where = sample_tokens(source)
    with appearing(out) as folder:
        # The merge is computed in fp32, so weights are rounded once.
        model = source.load(torch.float32, device)
        reference, base = centred_logits(model, samples), None
        if source.base is not None:
            with model.disable_adapter():
                base = centred_logits(model, samples)
            model = merge(model)
        cast(model, target)
        _complete_generation_config(model, source, teacher_trust_remote_code)
        model.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        parameters = model.num_parameters()
        del model
        gc.collect()  # peft's wrappers refer to each other

        unit, noise = rms(reference), 0.0
        if target != torch.float32:
            noise = rms(centred_logits(source.load(target, device), samples), reference) / unit
            gc.collect()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
        exported_logits = centred_logits(model.to(device).eval(), samples)
        to_base = () if base is None else (rms(base, reference) / unit, rms(exported_logits, base) / unit)
        check = Check(rms(exported_logits, reference) / unit, noise, *to_base)
        check.raise_if_bad()

        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
        exported = Exported(parameters, size, str(target).removeprefix("torch."), check, where)
        card = str(model_card(source, name or out.resolve().name, exported))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return exported
