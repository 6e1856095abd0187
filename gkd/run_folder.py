"""What an output folder holds, so that no run overwrites another by accident."""

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_FINISHED = ("trainer_state.json", *_WEIGHTS)


def has_model(folder: str | Path) -> bool:
    """Whether a whole model or an adapter lies in the folder."""
    return any((Path(folder) / name).is_file() for name in _WEIGHTS)


def resume_point(output_dir: str, resume: str | None) -> str | None:
    """The checkpoint that a run starts from, or None for a new run.

    Args:
        output_dir: where the run writes.
        resume: `--resume_from_checkpoint`: a checkpoint's folder; `auto` for the last one in `output_dir`, or a new
            run where there is none; `True` for the last one, which must exist.

    Raises:
        ValueError: `output_dir` holds another run and `resume` doesn't say to go on with it; or no checkpoint is
            where `resume` says.
    """
    folder = Path(output_dir)
    last = get_last_checkpoint(output_dir) if folder.is_dir() else None
    held = [Path(last).name] if last else [name for name in _FINISHED if (folder / name).exists()]
    go_on = "Go on with it by --resume_from_checkpoint auto, or choose" if last else "Choose"
    refusal = f"{output_dir} already holds a run ({', '.join(held[:1])}). {go_on} another --output_dir."
    if resume is None or resume.lower() == "false":
        if held:
            raise ValueError(refusal)
        return None
    if resume.lower() in ("auto", "true"):
        if last is None and resume.lower() == "true":
            raise ValueError(f"--resume_from_checkpoint True: there is no checkpoint in {output_dir}.")
        if last is None and held:
            raise ValueError(refusal)
        return last
    if held and Path(resume).resolve().parent != folder.resolve():
        raise ValueError(f"{refusal} ({resume} is a checkpoint of another run.)")
    if not (Path(resume) / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {resume}: not a checkpoint (no trainer_state.json there).")
    return resume
