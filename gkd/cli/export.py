"""Exports a trained student as a folder that transformers and vLLM load: adapters merged, checked, with a model card.

    gkd export runs/mixed -o exported/mixed
    gkd export runs/mixed -o exported/best --checkpoint best --dtype bfloat16
    gkd export runs/mixed/checkpoint-180 -o exported/step-180 --device cpu
    gkd export runs/mixed -o exported/mixed --push_to_hub NAME/MODEL --private

RUN is what `gkd train` wrote, one of its checkpoints, or any folder with a model or an adapter. The exported model is
read back from disk, and its logits are compared with those of the student before merging: if they differ by more than
the rounding to the dtype explains, nothing is kept. Exit codes: 0 done, 1 nothing exported, 2 wrong usage.
"""

import argparse
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi

from gkd import export
from gkd.cli.checks import check_hub
from gkd.config.command_line import CommandParser
from gkd.config.commands import export_flags
from gkd.export.source import find_model
from gkd.io.errors import one_line_errors, refusals
from gkd.io.terminal import visible


def main(argv: list[str] | None = None, prog: str = "gkd export") -> None:
    with one_line_errors(prog, "If there is a folder, it is whole; else the same command starts again."):
        export_model(export_flags(argv, __doc__, prog), prog)


def export_model(args: argparse.Namespace, prog: str) -> None:
    with CommandParser(prog=prog).refusals():
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no such device here.")
        if args.push_to_hub:
            check_hub(args.push_to_hub)
    out = args.output_dir
    with refusals(prog, NotImplementedError):  # raised by some quantizations
        folder = find_model(args.run, args.checkpoint)
        if folder != Path(args.run):
            why = "" if args.checkpoint else f"{args.run} has no final model: "
            print(visible(f"{why}exporting {folder}."))
        trusted = {name: getattr(args, name) for name in ("trust_remote_code", "teacher_trust_remote_code")}
        exported = export(folder, out, name=args.push_to_hub, dtype=args.dtype, device=args.device, **trusted)
    print(visible(f"Checked on {exported.samples}: {exported.check}"))
    print(f"{out}: {exported.parameters:,} parameters, {exported.dtype}, {exported.gib:.3g} GiB.\n")
    print(f"    vllm serve {out}")
    print(f'    python -c \'from transformers import pipeline; print(pipeline("text-generation", "{out}")("Hello"))\'')
    print(f"    python llama.cpp/convert_hf_to_gguf.py {out} --outtype q8_0    # GGUF, with a clone of llama.cpp")
    if args.push_to_hub:
        try:
            api = HfApi()
            url = api.create_repo(args.push_to_hub, private=args.private or None, exist_ok=True)
            api.upload_folder(repo_id=args.push_to_hub, folder_path=out)
        except Exception as error:  # the network and the hub raise many classes; the folder is complete all the same
            sys.exit(visible(f"{prog}: {out} is exported, but not pushed to {args.push_to_hub}: {error}"))
        print(f"Pushed to {url}.")
