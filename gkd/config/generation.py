"""The flags of generators, shared by all commands that generate text."""

from dataclasses import dataclass

from gkd.config.values import flag

# The choices of `--generation_backend`, and the function that creates each: called like `new_generator`.
GENERATION_BACKENDS = dict.fromkeys(("auto", "static", "dynamic"), "gkd.generation.generator:in_process")


@dataclass
class GenerationArguments:
    """The generator and its settings."""

    generation_backend: str = flag(
        "auto",
        "static: one CUDA graph a token, on a static KV cache; dynamic: transformers' generate; auto: static "
        "on a GPU where the model allows it.",
        choices=list(GENERATION_BACKENDS),
    )
