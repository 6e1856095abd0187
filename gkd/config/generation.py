"""The flags of generators, shared by all commands that generate text."""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from gkd.config.values import flag, need

# The choices of `--generation_backend`, and the function that creates each: called like `new_generator`.
GENERATION_BACKENDS = dict.fromkeys(("auto", "static", "dynamic"), "gkd.generation.generator:in_process")
VLLM = "vllm"
GENERATION_BACKENDS[VLLM] = "gkd.generation.vllm:VllmGenerator"
VLLM_VERSIONS = ">=0.22,<0.32"  # as TRL, whose tests run with them


def check_vllm(asked: str) -> None:
    """Raises ValueError where the vLLM that the flag `asked` needs is missing, or of another version."""
    need(asked, VLLM, "vllm")
    try:
        installed = version(VLLM)
    except PackageNotFoundError:  # a build of another name
        return
    if not SpecifierSet(VLLM_VERSIONS).contains(installed, prereleases=True):
        raise ValueError(f"{asked} works with vLLM {VLLM_VERSIONS}, not {installed}: pip install -e '.[vllm]'.")


@dataclass
class GenerationArguments:
    """The generator and its settings."""

    generation_backend: str = flag(
        "auto",
        "static: one CUDA graph a token, on a static KV cache; dynamic: transformers' generate; auto: static "
        "on a GPU where the model allows it; vllm: engines of vLLM in this process.",
        choices=list(GENERATION_BACKENDS),
    )
    vllm_memory: float = flag(
        0.3,
        "Of --generation_backend vllm: the share of a GPU's memory that an engine takes while it writes, for its copy of the "
        "model and its cache.",
    )

    def check_generation(self, sharded: bool = False, in_step: bool = False) -> None:
        """Raises ValueError where vLLM is asked for and can't write.

        Args:
            sharded: the student's weights are, over several GPUs.
            in_step: several processes start their engines at the same time, as those of `gkd train` do.
        """
        if not 0 < self.vllm_memory < 1:
            raise ValueError(f"--vllm_memory is a share of the GPU's memory, between 0 and 1, not {self.vllm_memory}.")
        if self.generation_backend != VLLM:
            return
        asked = "--generation_backend vllm"
        check_vllm(asked)
        if sharded:
            raise ValueError(
                f"{asked} needs whole weights on each GPU, not ZeRO-3 or FSDP: use ZeRO-2 or DDP, or auto."
            )
        if not in_step and int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ValueError(f"{asked} works in a single process here: start one, or take auto.")
