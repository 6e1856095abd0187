"""Exports a trained student as a folder that transformers and vLLM load: adapters merged, checked, with a model card.

    python export_model.py runs/mixed -o exported/mixed
    python export_model.py runs/mixed -o exported/best --checkpoint best --dtype bfloat16
    python export_model.py runs/mixed/checkpoint-180 -o exported/step-180 --device cpu
    python export_model.py runs/mixed -o exported/mixed --push_to_hub NAME/MODEL --private

RUN is what train_gkd.py wrote, one of its checkpoints, or any folder with a model or an adapter. The exported model is
read back from disk, and its logits are compared with those of the student before merging: if they differ by more than
the rounding to the dtype explains, nothing is kept. Exit codes: 0 done, 1 nothing exported, 2 wrong usage.
"""

import argparse
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from gkd.export import Source, export, find_model
from gkd.fallback import one_line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, a checkpoint, a model or an adapter")
    parser.add_argument(
        "-o", "--output_dir", required=True, type=Path, metavar="DIR", help="must not exist, or be empty"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="last|best|N",
        help="a checkpoint in RUN (default: the final model, else the last checkpoint)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="of the exported weights (default: that of the base model, or of the whole one)",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=device, choices=["cpu", "cuda"], help="merges and compares (default: %(default)s)"
    )
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload DIR there after the check")
    parser.add_argument("--private", action="store_true", help="with --push_to_hub: a new REPO is private")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the student")
    parser.add_argument(
        "--teacher_trust_remote_code",
        action="store_true",
        help="and code that comes with the teacher, whose config is read for its stop tokens",
    )
    args = parser.parse_args(argv)
    if args.checkpoint not in (None, "last", "best") and not args.checkpoint.isdecimal():
        parser.error(f"--checkpoint takes last, best or a step, not {args.checkpoint!r}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no such device here.")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"{args.output_dir} exists already and is not an empty folder.")
    if args.private and not args.push_to_hub:
        parser.error("--private is about --push_to_hub.")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except ValueError as error:
            parser.error(f"--push_to_hub: {error}")
        if get_token() is None:
            parser.error("--push_to_hub needs a token of the hub: hf auth login, or HF_TOKEN.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    out = args.output_dir
    try:
        folder = find_model(args.run, args.checkpoint)
        if folder != Path(args.run):
            why = "" if args.checkpoint else f"{args.run} has no final model: "
            print(f"{why}exporting {folder}.")
        source = Source.open(folder, args.trust_remote_code, args.teacher_trust_remote_code)
        made = export(source, out, args.push_to_hub or out.resolve().name, args.dtype, args.device)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:  # the last two: of a way to quantize
        sys.exit(f"export_model.py: {one_line(error)}")
    print(f"Checked on {made.samples}: {made.check}")
    print(f"{out}: {made.parameters:,} parameters, {made.dtype}, {made.gib:.3g} GiB.\n")
    print(f"    vllm serve {out}")
    print(f'    python -c \'from transformers import pipeline; print(pipeline("text-generation", "{out}")("Hello"))\'')
    print(f"    python llama.cpp/convert_hf_to_gguf.py {out} --outtype q8_0    # GGUF, with a clone of llama.cpp")
    if args.push_to_hub:
        try:
            api = HfApi()
            url = api.create_repo(args.push_to_hub, private=args.private or None, exist_ok=True)
            api.upload_folder(repo_id=args.push_to_hub, folder_path=out)
        except Exception as error:  # of the network or the hub, of many classes; the folder is good all the same
            sys.exit(f"export_model.py: {out} is exported, but not pushed to {args.push_to_hub}: {error}")
        print(f"Pushed to {url}.")


if __name__ == "__main__":
    main()
