"""The flags of the small commands, checked as far as that needs no library. See gkd.cli.start."""

import argparse
from pathlib import Path

from gkd.config.command_line import CommandParser
from gkd.config.generation import VLLM, check_vllm
from gkd.config.values import DTYPES, is_address
from gkd.io.paths import check_model


def export_flags(argv: list[str] | None, doc: str, prog: str = "gkd export") -> argparse.Namespace:
    """The flags of `gkd export`."""
    parser = CommandParser(prog=prog, description=doc)
    flag = parser.add_argument
    flag("run", metavar="RUN", help="folder of a run, a checkpoint, a model or an adapter")
    flag("-o", "--output_dir", required=True, type=Path, metavar="DIR", help="must not exist, or be empty")
    flag(
        "--checkpoint",
        metavar="last|best|N",
        help="a checkpoint in RUN (default: the final model, else the last checkpoint)",
    )
    flag(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of the exported weights (default: that of the base model, or of the whole one)",
    )
    flag("--device", choices=["cpu", "cuda"], help="merges and compares (default: cuda, where there is one)")
    flag("--push_to_hub", metavar="REPO", help="upload DIR there after the check")
    flag("--private", action="store_true", help="with --push_to_hub: a new REPO is private")
    flag("--trust_remote_code", action="store_true", help="run model code that comes with the student")
    flag(
        "--teacher_trust_remote_code",
        action="store_true",
        help="and code that comes with the teacher, whose config is read for its stop tokens",
    )
    args = parser.parse_args(argv)
    if args.checkpoint not in (None, "last", "best") and not args.checkpoint.isdecimal():
        parser.error(f"--checkpoint takes last, best or a step, not {args.checkpoint!r}.")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"{args.output_dir} exists already and is not an empty folder.")
    if args.private and not args.push_to_hub:
        parser.error("--private is about --push_to_hub.")
    return args


def chat_flags(argv: list[str] | None, doc: str, prog: str = "gkd chat") -> argparse.Namespace:
    """The flags of `gkd chat`."""
    parser = CommandParser(prog=prog, description=doc)
    flag = parser.add_argument
    where = "a model's or a run's folder, a LoRA adapter's, or a hub id"
    flag("--student", required=True, metavar="DIR", help=where)
    flag("--teacher", metavar="DIR", help=f"the same: {where}; or the address of a gkd serve, http://HOST:PORT")
    flag("--system", metavar="TEXT", help="system prompt")
    flag("--max_new_tokens", type=int, default=512, metavar="N", help="of an answer")
    flag("--temperature", type=float, default=0.7, metavar="X", help="of sampling; 0 is greedy")
    flag("--dtype", default="auto", choices=DTYPES, help="of both models; auto keeps that of the weights")
    flag("--device", default="auto", metavar="NAME", help="such as cpu or cuda:1; auto is wherever there is room")
    flag("--generation_backend", default="auto", choices=["auto", VLLM], help="vllm: an engine of vLLM for each model")
    flag(
        "--vllm_memory",
        type=float,
        default=0.4,
        metavar="X",
        help="the share of the GPU's memory that an engine takes",
    )
    for role, name in (("student", "--trust_remote_code"), ("teacher", "--teacher_trust_remote_code")):
        flag(name, action="store_true", help=f"run model code that comes with the {role}")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error("--max_new_tokens must be at least 1.")
    if not 0 <= args.temperature < float("inf"):
        parser.error("--temperature must be 0 or more.")
    if not 0 < args.vllm_memory < 1:
        parser.error(f"--vllm_memory is a share of the GPU's memory, between 0 and 1, not {args.vllm_memory}.")
    with parser.refusals():
        if args.generation_backend == VLLM:
            _check_vllm_chat(args)
        check_model("--student", args.student, adapter=True)
        if args.teacher is not None and not is_address(args.teacher):
            check_model("--teacher", args.teacher, adapter=True)
    return args


def _check_vllm_chat(args: argparse.Namespace) -> None:
    """Raises ValueError where vLLM is missing or can't have a model."""
    asked = f"--generation_backend {VLLM}"
    check_vllm(asked)
    if args.device != "auto":
        raise ValueError(f"--device {args.device}: with {asked} CUDA_VISIBLE_DEVICES chooses the GPU.")
    for model in (args.student, args.teacher or ""):
        if Path(model, "adapter_config.json").is_file():
            raise ValueError(
                f"{model} is an adapter, and {asked} takes whole models: gkd export {model} -o DIR merges it."
            )


def report_flags(argv: list[str] | None, doc: str, prog: str = "gkd report") -> argparse.Namespace:
    """The flags of `gkd report`."""
    parser = CommandParser(prog=prog, description=doc)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of an evaluation")
    parser.add_argument(
        "-o", "--output_dir", metavar="DIR", help="where report.md and report.html go (default: a single run's folder)"
    )
    args = parser.parse_args(argv)
    if args.output_dir is None and len(args.runs) > 1:
        parser.error("several runs: say where their report goes, by -o DIR.")
    return args


def shrink_flags(argv: list[str] | None, doc: str, prog: str = "gkd shrink") -> argparse.Namespace:
    """The flags of `gkd shrink`."""
    parser = CommandParser(prog=prog, description=doc)
    flag = parser.add_argument
    flag("teacher", metavar="TEACHER", help="folder or hub id of the teacher")
    flag("--layers", type=int, metavar="N", help="how many to keep (default: all of them with --width)")
    flag("--width", type=float, metavar="SHARE", help="share of each layer's MLP channels to keep, such as 0.8")
    flag("-o", "--output_dir", type=Path, metavar="DIR", help="folder of the student; must not exist")
    flag("--prompts", metavar="FILE", help="rows whose first 6 prompts the teacher answers (default: built in)")
    args = parser.parse_args(argv)
    chosen = [name for name in ("layers", "width") if getattr(args, name) is not None]
    if chosen and args.output_dir is None:
        parser.error(f"--{chosen[0]} needs -o DIR, the folder of the student.")
    if not chosen and args.output_dir is not None:
        parser.error("-o needs --layers N or --width SHARE. Without these, gkd shrink TEACHER shows what each costs.")
    if args.width is not None and not 0 < args.width <= 1:
        parser.error(f"--width is a share above 0, and 1 at most, not {args.width}.")
    if args.output_dir is not None and args.output_dir.exists():
        parser.error(f"{args.output_dir} exists already.")
    with parser.refusals():
        check_model("TEACHER", args.teacher)
    return args
