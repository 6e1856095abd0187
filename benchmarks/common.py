"""Shared by the benchmarks: random models, a process with a time limit for each variant, and the table of results.

A benchmark starts itself once for each variant, with `--variant NAME` added to its arguments; that process calls `emit`
for each row that it measures. A variant that fails or exceeds its limit gives a row with the reason, and its output is
in OUT/logs. With several GPUs the variants run side by side, one GPU each.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from random_pair import BASE, model_of
from transformers import PreTrainedModel

REPO = Path(__file__).parent.parent
sys.path.append(str(REPO))  # a clone that was never installed works too

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32

# Rates of an H100 80GB, for the floors: of a large bf16 matrix product, and of reading memory. Other GPUs differ.
H100_FLOPS, H100_BYTES = 780e12, 3.0e12

# Variables that name the folders in which compilers and drivers keep what they have built.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "CUDA_CACHE_PATH")

MARK = "RESULT "  # the beginning of a line with a row


class Column(NamedTuple):
    """A column of the Markdown table: the row's key, the title, and a format for numbers."""

    key: str
    title: str
    format: str = ""


def _in_seconds(text: str) -> float:
    """The time so many seconds from now, by `time.perf_counter`."""
    return time.perf_counter() + int(text)


def parser(doc: str, out: str, limit: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, default=Path("runs", out), help="folder of tables and logs")
    result.add_argument("--limit", type=int, default=limit, help="seconds that a variant may take")
    result.add_argument(
        "--total",
        type=_in_seconds,
        metavar="SECONDS",
        help="in which all variants end: later ones are cut or left out",
    )
    result.add_argument("--variant", help="measure this one, in this process")
    return result


def random_model(shape: dict[str, Any], seed: int) -> PreTrainedModel:
    """A model with random weights, created on its device: bf16 on a GPU, fp32 on the CPU."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return model_of(shape)
    finally:
        torch.set_default_dtype(before)


def weights(shape: dict[str, Any]) -> tuple[int, int]:
    """The number of weights that a token is multiplied with: in the layers, and in the head."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    width = shape.get("head_dim", hidden // heads)
    attention = 2 * hidden * width * (heads + shape["num_key_value_heads"])
    layers = shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"])
    return layers, hidden * shape.get("vocab_size", BASE["vocab_size"])


def cache_bytes(shape: dict[str, Any]) -> int:
    """Bytes of a token's keys and values."""
    width = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * width * DTYPE.itemsize


def stop_ids(vocab_size: int, hazard: float) -> list[int]:
    """So many ids that a model with random weights, which samples almost uniformly, stops with probability `hazard` a token."""
    return [BASE["eos_token_id"], *range(1000, 1000 + int(vocab_size * hazard))]


def live_shares(new: int, hazard: float) -> list[float]:
    """The share of rows that have not ended before each of `new` tokens."""
    return [(1 - hazard) ** token for token in range(new)]


def decode_floor(
    shape: dict[str, Any], rows: int, prompt: int, new: int, hazard: float, flops: float, bandwidth: float
) -> float:
    """Seconds: at each token every weight and the cache of the rows that have not ended are read once."""
    read, seconds = sum(weights(shape)), 0.0
    for token, share in enumerate(live_shares(new, hazard)):
        reached = 1 - (1 - share) ** rows  # the probability that a row is left
        live = rows * share
        reading = (
            read * DTYPE.itemsize + live * (prompt + token) * cache_bytes(shape) / max(reached, 1e-9)
        ) / bandwidth
        seconds += reached * max(reading, 2 * live * read / flops)
    return seconds


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> float:
    """Wall seconds of a call, including its work on the GPU."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def matmul_rate() -> float:
    """FLOP/s of a large matrix product on this machine, measured: 8192³ in bf16 on a GPU, 1024³ in fp32 on the CPU."""
    size = 8192 if CUDA else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / sorted(timed(lambda: a @ b) for _ in range(20))[10]


def rates() -> tuple[float, float]:
    """FLOP/s of matrix products and bytes/s of memory: the constants above, or measured on the CPU."""
    if CUDA:
        return H100_FLOPS, H100_BYTES
    block = torch.ones(2**24)  # 64 MiB
    return matmul_rate(), block.nbytes / min(timed(block.sum) for _ in range(5))


def emit(**row: Any) -> None:
    """Prints a row for the process that started this one."""
    device = torch.cuda.get_device_name() if CUDA else f"CPU ({torch.get_num_threads()} threads, {platform.machine()})"
    print(MARK + json.dumps({**row, "device": device}), flush=True)


def leave() -> NoReturn:
    """Ends this process at once: threads of gloo and of vLLM may abort it, or wait for ever, in the interpreter's end."""
    sys.stdout.flush()
    os._exit(0)


def rows_of(lines: list[str]) -> list[dict[str, Any]]:
    """The rows that `emit` printed among other lines."""
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]


def run_all(
    variants: Sequence[str],
    args: argparse.Namespace,
    columns: Sequence[Column],
    gpus_each: int = 1,
    launcher: Callable[[int], list[str]] = lambda port: [],
    limits: Mapping[str, int | None] = MappingProxyType({}),
    starts: int = 1,
    done: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Runs each variant in its own process and returns their rows in order.

    Args:
        gpus_each: visible GPUs of a variant; as many variants run at once as that allows.
        launcher: words between the interpreter and the script (`-m accelerate.commands.launch ...`). Launched processes
            find each other by the port that it gets, a different one for each variant that runs at once.
        limits: seconds of single variants, in place of `--limit`.
        starts: of each variant, one after the other. With several, the first finds all compilers' caches empty and the
            others find them as it left them; `start` numbers their rows.
        done: gets the rows so far each time that a variant ends.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    places: SimpleQueue[tuple[int, str]] = SimpleQueue()
    workers = max(1, len(gpus) // gpus_each)
    for i in range(workers):
        places.put((i, ",".join(gpus[i * gpus_each : (i + 1) * gpus_each])))
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    running: set[subprocess.Popen] = set()

    def run(variant: str) -> list[dict[str, Any]]:
        number, devices = places.get()
        script = Path(sys.argv[0]).resolve()
        command = [sys.executable, *launcher(29500 + number), str(script), *sys.argv[1:], "--variant", variant]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})
        result = []
        with tempfile.TemporaryDirectory() as caches:
            if starts > 1:
                environment |= {name: str(Path(caches, name)) for name in CACHES}
            for start in range(1, starts + 1):
                name = f"{Path(sys.argv[0]).stem}-{variant}" + (f"-{start}" if starts > 1 else "")
                log = logs / (re.sub(r"[^\w.-]+", "-", name) + ".log")
                limit = limits.get(variant) or args.limit
                if args.total is not None:
                    limit = min(limit, round(args.total - time.perf_counter()))
                started = time.perf_counter()
                rows = _rows_of_process(variant, command, environment, log, limit, running)
                for row in rows:
                    row |= {"start": start} if starts > 1 else {}
                    cells = [f"{c.title} {_cell(row, c)}" for c in columns[1:] if row.get(c.key) is not None]
                    print(f"{row['run']}: {row.get('failed') or ', '.join(cells)}", flush=True)
                print(f"  ({variant} took {time.perf_counter() - started:.0f} s)", flush=True)
                result += rows
        places.put((number, devices))
        return result

    rows = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for of_variant in pool.map(run, variants):
                rows += of_variant
                done(rows)
            return rows
        finally:  # Ctrl-C reaches only this process: the others run in sessions of their own
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                _kill(process)


def _rows_of_process(
    variant: str,
    command: list[str],
    environment: dict[str, str],
    log: Path,
    limit: int,
    running: set[subprocess.Popen],
) -> list[dict[str, Any]]:
    """The rows of a variant's process, and one that says what went wrong; it is in `running` meanwhile."""
    if limit <= 0:
        return [{"run": variant, "failed": "not started: the time of all variants is over"}]
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as stream:
        # Shared by all ranks, deleted even if they are killed, without a compiler's old cache.
        environment = environment | {"TMPDIR": scratch}
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=REPO, start_new_session=True
        )
        running.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        _kill(process)
    running.discard(process)
    lines = log.read_text(errors="replace").splitlines()
    rows = rows_of(lines)
    if code != 0:
        why = f"not finished in {limit} s" if code is None else reason_of(lines, code)
        rows.append({"run": variant, "failed": why, "log": str(log)})
    return rows


def _kill(process: subprocess.Popen) -> None:
    """Kills a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reason_of(lines: list[str], code: int) -> str:
    """The last line of a log that looks like an error, else the last line."""
    lines = [line for line in lines if line.strip() and not line.startswith(MARK)]
    errors = [m[0] for line in lines if (m := re.search(r"^(?:\[\w+\]: ?)?[\w.]*(?:Error|Exception|Exit)\b.*", line))]
    errors = [line for line in errors if not re.search("CalledProcessError|ChildFailedError", line)]
    return (errors or lines or [f"exit code {code}"])[-1][:300]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cell(row: dict[str, Any], column: Column) -> str:
    value = row.get(column.key)
    return "" if value is None else format(value, "" if isinstance(value, str) else column.format)


def write(
    args: argparse.Namespace,
    columns: Sequence[Column],
    rows: list[dict[str, Any]],
    notes: Sequence[str] = (),
    show: bool = True,
) -> None:
    """Writes OUT/NAME.json (all numbers) and OUT/NAME.md (the columns), NAME being the script's; prints it if it `show`s.

    The text of `failed` goes into the second column.
    """
    packages = ("torch", "transformers", "trl", "peft", "liger-kernel", "vllm", "gkd")
    header = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": ", ".join(sorted({row["device"] for row in rows if "device" in row})) or "unknown",
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in packages},
    }
    name = Path(sys.argv[0]).stem
    everything = header | {"rows": rows, "notes": list(notes)}
    (args.out / f"{name}.json").write_text(json.dumps(everything, indent=1) + "\n")
    lines = [f"`{header['command']}`", "", f"{header['device']}, {header['date']}", ""]
    lines += [", ".join(f"{package} {version}" for package, version in header["versions"].items()), ""]
    lines += ["| " + " | ".join(c.title for c in columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [_cell(row, c) for c in columns]
        if "failed" in row:
            cells[1] = row["failed"].replace("|", "/")
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join([*lines, "", *(f"* {note}" for note in notes)]).rstrip() + "\n"
    (args.out / f"{name}.md").write_text(text)
    if show:
        print("\n" + text)
