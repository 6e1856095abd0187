"""Who decodes: the flags of generators, which all commands that generate have."""

from dataclasses import dataclass

from gkd.config.values import flag

# What `--generation_backend` chooses from, and what makes it: called as `gkd.generation.generator.new_generator` is.
GENERATION_BACKENDS = dict.fromkeys(("auto", "static", "dynamic"), "gkd.generation.generator:in_process")


@dataclass
class GenerationArguments:
    """A generator's own flags stand here too; `new_generator` hands it all arguments."""

    generation_backend: str = flag(
        "auto",
        "static: one CUDA graph a token, on a static KV cache; dynamic: transformers' generate; auto: static "
        "on a GPU where the model allows it.",
        choices=list(GENERATION_BACKENDS),
    )
