"""Seconds per decoded token of all rows: transformers' generate in three ways, and gkd's.

    python benchmarks/decode.py
    python benchmarks/decode.py --models teacher --modes hf_static gkd
    python benchmarks/decode.py --models student --modes gkd vllm --loads 6x64+128 64x256+1024/300 16x512+4096/1200

The student (1B on a GPU) has a LoRA adapter, the teacher (8B) has none. The modes: `dynamic`, a growing cache and
separate products for the adapter at each layer, as in TRL's trainers once caching is on; `dynamic_merged`, the same with
the adapter merged into the weights; `hf_static`, merged, with transformers' static cache, which it compiles on a GPU; and
`gkd`, as in gkd's trainer, including merging and unmerging; `vllm`, if it is installed, the model without an adapter, one
engine for all loads, whose start is in the first one's `one-off s`.

A load is ROWSxPROMPT+NEW; behind a slash, the number of tokens after which a text ends on average: see `stop_ids` in common.py.

Each other mode runs in its own process for each load. All generate `--calls` times. `ms` is the median of all calls but the
first divided by the tokens of a row, so it includes the prompt's forward; `one-off s` is how much longer the first call took.
Sampling is at temperature 0.9 with random weights, so almost all rows reach the maximal length: see `mean length`.

The floor: each weight and the cache of rows that have not ended are read once a token, at the rate in common.py, or as
measured on the CPU.
"""

import statistics
import time
from typing import NamedTuple

import torch
import vllm_peer
from accelerate import Accelerator
from common import (
    CUDA,
    DEVICE,
    Column,
    decode_floor,
    emit,
    leave,
    parser,
    random_model,
    rates,
    run_all,
    stop_ids,
    timed,
    write,
)
from peft import LoraConfig, get_peft_model
from random_pair import BASE, SHAPES
from transformers import GenerationConfig

from gkd.generation.generator import CompletionGenerator, generation_mode


class Load(NamedTuple):
    rows: int
    prompt: int
    new: int
    mean: int = 0  # after so many tokens a text ends on average; 0: only by chance

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.prompt}+{self.new}" + (f"/{self.mean}" if self.mean else "")

    @property
    def hazard(self) -> float:
        return 1 / self.mean if self.mean else 0.0


VLLM_MEMORY = 0.6  # the share of the GPU that it takes
TINY = SHAPES["tiny"] | {"vocab_size": 2048}
MODELS = {"student": SHAPES["1b"], "teacher": SHAPES["8b"]} if CUDA else {"student": TINY, "teacher": TINY}
LOADS = [Load(6, 64, 128), Load(32, 256, 512)] if CUDA else [Load(2, 16, 8)]
TAILS = [Load(64, 256, 1024, 300), Load(256, 256, 1024, 300), Load(16, 512, 4096, 1200), Load(64, 512, 4096, 1200)]
MODES = ("dynamic", "dynamic_merged", "hf_static", "gkd")
COLUMNS = [
    Column("run", "run"),
    Column("ms", "ms", ".2f"),
    Column("seconds", "s a call", ".3f"),
    Column("floor", "floor s", ".3f"),
    Column("above_floor", "s / floor", ".1f"),
    Column("one_off", "one-off s", ".2f"),
    Column("tokens_per_second", "tokens/s", ".0f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("mean_length", "mean length", ".1f"),
    Column("captures", "graphs", "d"),
]


def prompts_of(load: Load, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts and their mask (rows, prompt)."""
    prompts = torch.randint(5, min(vocab_size, 1000), (load.rows, load.prompt), device=DEVICE)
    mask = torch.ones_like(prompts)
    mask[::2, : load.prompt // 3] = 0  # every other prompt is shorter
    return prompts, mask


def vocab_size_of(name: str) -> int:
    return MODELS[name].get("vocab_size", BASE["vocab_size"])


def measure_vllm(name: str, loads: list[Load], count: int) -> None:
    """All loads by one engine, whose start is the first one's."""
    if vllm_peer.MISSING:
        emit(run=f"{name}:vllm", failed=vllm_peer.MISSING)
        return
    started = time.perf_counter()
    longest, most = max(load.prompt + load.new for load in loads), max(load.rows for load in loads)
    engine = vllm_peer.engine(MODELS[name], longest, most, VLLM_MEMORY)
    start_up = time.perf_counter() - started
    for load in loads:
        prompts, mask = prompts_of(load, vocab_size_of(name))
        stops = stop_ids(vocab_size_of(name), load.hazard)
        lengths = []

        def generate() -> None:
            written = engine(prompts, mask, load.new, stops)  # noqa: B023
            lengths.append((max(written), statistics.mean(written)))  # noqa: B023

        report(name, "vllm", load, [timed(generate) for _ in range(count)], lengths, start_up)
        start_up = 0.0


def measure(name: str, mode: str, load: Load, count: int) -> None:
    model = random_model(MODELS[name], seed=0).eval()
    if name == "student":
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora).eval()
        if mode in ("dynamic_merged", "hf_static"):
            model.merge_adapter()
    stops = stop_ids(vocab_size_of(name), load.hazard)
    config = GenerationConfig(
        max_new_tokens=load.new,
        do_sample=True,
        temperature=0.9,
        top_k=0,
        top_p=1.0,
        pad_token_id=BASE["pad_token_id"],
        eos_token_id=stops,
        cache_implementation="static" if mode == "hf_static" else None,
    )
    prompts, mask = prompts_of(load, vocab_size_of(name))
    accelerator = Accelerator(mixed_precision="bf16" if CUDA else "no", cpu=not CUDA)
    generator = CompletionGenerator(backend="auto")
    lengths = []

    def generate() -> None:
        if mode == "gkd":
            autocast = accelerator.autocast() if name == "student" else torch.no_grad()  # as in gkd's trainer
            with generation_mode(model, accelerator) as ready, autocast:
                ids, kept = generator(ready, prompts, mask, config)
        else:
            with torch.no_grad():
                ids = model.generate(input_ids=prompts, attention_mask=mask, generation_config=config)[
                    :, load.prompt :
                ]
            stopped = torch.isin(ids, torch.tensor(stops, device=DEVICE)).long()
            kept = stopped.cumsum(1) - stopped == 0
        lengths.append((ids.shape[1], kept.sum(1).float().mean().item()))

    calls = [timed(generate) for _ in range(count)]
    report(name, mode, load, calls, lengths, captures=generator.captures if mode == "gkd" else None)


def report(
    name: str,
    mode: str,
    load: Load,
    calls: list[float],
    lengths: list[tuple[int, float]],
    start_up: float = 0.0,
    captures: int | None = None,
) -> None:
    """Emits the row of a load: seconds of each call, the longest and the mean length of its completions."""
    seconds = statistics.median(calls[1:])
    steps, mean_length = (statistics.mean(column) for column in zip(*lengths[1:], strict=True))
    row = {
        "run": f"{name}:{mode}:{load.name}",
        "model": name,
        "mode": mode,
        "load": load.name,
        "seconds": seconds,
        "ms": 1000 * seconds / steps,
        "one_off": start_up + calls[0] - seconds,
        "calls": calls,
        "tokens_per_second": load.rows * mean_length / statistics.mean(calls[1:]),
        "mean_length": mean_length,
    }
    if captures is not None:
        row["captures"] = captures
    if CUDA:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    emit(**row)


def main() -> None:
    arguments = parser(__doc__, "decode", limit=300)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--modes", nargs="+", choices=(*MODES, "vllm"), default=list(MODES))
    every = {load.name: load for load in (*LOADS, *(TAILS if CUDA else ()))}
    arguments.add_argument("--loads", nargs="+", choices=every, default=[load.name for load in LOADS])
    arguments.add_argument("--calls", type=int, default=5)
    args = arguments.parse_args()
    if args.variant:
        name, mode, *loads = args.variant.split(":")
        if mode == "vllm":
            measure_vllm(name, [every[load] for load in args.loads], args.calls)
            if not vllm_peer.MISSING:
                leave()
        else:
            measure(name, mode, every[loads[0]], args.calls)
        return
    runs = [
        f"{name}:{mode}:{load}"
        for name in args.models
        for load in args.loads
        for mode in args.modes
        if mode != "vllm" and not (name == "teacher" and mode == "dynamic_merged")  # it has no adapter
    ]
    runs += [f"{name}:vllm" for name in args.models if "vllm" in args.modes]
    rows = run_all(runs, args, COLUMNS)
    speeds = rates()
    for row in rows:
        if "failed" not in row:
            load = every[row["load"]]
            row["floor"] = decode_floor(MODELS[row["model"]], *load[:3], load.hazard, *speeds)
            row["above_floor"] = row["seconds"] / row["floor"]
    write(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
