r"""Answers for a teacher, so that students train on other machines: exactly what it would say beside them, for every β.

A teacher for students on this machine, and one of these:

    gkd serve meta-llama/Llama-3.1-8B-Instruct --port 8500
    gkd train --model_name_or_path meta-llama/Llama-3.2-1B-Instruct --teacher_url http://127.0.0.1:8500 \
        --dataset_name data/prompts_train.json --output_dir runs/served --lmbda 0.5 --seq_kd True

For other machines, which give the same secret as GKD_TEACHER_TOKEN:

    GKD_SERVE_TOKEN=... gkd serve meta-llama/Llama-3.1-8B-Instruct --host 0.0.0.0 \
        --ssl_certfile cert.pem --ssl_keyfile key.pem

The teacher is whole on this process's device, or with --teacher_device cuda:0,cuda:1 over several. Several servers of one
teacher share the work: --teacher_url takes all of their addresses. SIGTERM and Ctrl-C let the requests that have come be answered.
"""

import os
import pkgutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn

from gkd.config.serving import TOKEN, ServeArguments, make_parser
from gkd.config.teacher import PlacementArguments
from gkd.generation.generator import new_generator
from gkd.io.errors import one_line_errors, refusals
from gkd.io.terminal import visible
from gkd.models.pairing import Side
from gkd.teachers.placed import NamedTeacher, place_teacher
from gkd.teachers.servers.wire import check_token

if TYPE_CHECKING:
    from gkd.teachers.servers.server import TeacherServer


def parse(argv: list[str], prog: str = "gkd serve") -> ServeArguments:
    """Exits with code 2 and one line for an unknown flag or a bad value."""
    return make_parser(prog=prog, description=__doc__).parse_one(argv, ("--teacher_model_name_or_path",))


def main(argv: list[str] | None = None, prog: str = "gkd serve") -> None:
    with one_line_errors(prog), tempfile.TemporaryDirectory(prefix="gkd-serve-") as folder:
        serve(parse(sys.argv[1:] if argv is None else argv, prog), Path(folder), prog)


def serve(args: ServeArguments, folder: Path, prog: str) -> None:
    """Serves until a signal ends it. `folder` gets the teacher's head."""
    with refusals(prog):
        token = check_token(TOKEN, os.environ.get(TOKEN, ""))
        named = NamedTeacher(args)
        side = named.side(None, args)
        named.rehearse()
        listening = listen(args)
        name = Path(args.teacher_model_name_or_path).name  # no folder above it is told
        server = server_of(args, named.load(), side, name, folder, token)
    about, port = server.identity, listening.getsockname()[1]
    host = f"[{args.host}]" if ":" in args.host else args.host
    scheme = "http" if args.ssl_certfile is None else "https"
    if scheme == "http" and not args.is_loopback:
        print(
            f"{prog}: without --ssl_certfile the token and all text go over the network in the clear.", file=sys.stderr
        )
    print(
        visible(
            f"{prog}: {name}, {about['parameters']:,} parameters in {about['dtype']}, weights {about['weights'][:16]}, at "
            f"{scheme}://{host}:{port}"
        ),
        flush=True,
    )
    uvicorn = pkgutil.resolve_name("uvicorn")
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # a step of its student may take so long
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
    )
    uvicorn.Server(config).run(sockets=[listening])


def server_of(
    args: ServeArguments, model: nn.Module, side: Side, name: str, folder: Path, token: str | None
) -> "TeacherServer":
    """The web application of a frozen teacher, which it places where the flags want it. See `TeacherServer`."""
    # As in training by default, for the same bits.
    placement = PlacementArguments(teacher_device=args.teacher_device)
    pad = getattr(side.tokenizer, "pad_token_id", None) or 0
    teacher = place_teacher(model, Accelerator(), placement, pad)
    generator = new_generator(args)
    teacher.decode_by(generator)
    # Imported last, since its packages are optional: `ServeArguments` checks that they are there.
    make = pkgutil.resolve_name("gkd.teachers.servers.server:TeacherServer")
    most_bytes = int(args.max_request_mib * 2**20)
    return make(teacher, name, side, generator, folder, token, most_bytes, args.host, args.merge_requests)


def listen(args: ServeArguments) -> socket.socket:
    """A socket that has the address, and refuses connections until it serves. Raises ValueError if the address is taken."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # With its protocol named, asyncio sends each part at once; else an answer waits 40 ms for an acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((args.host, args.port))
    except OSError as error:
        bound.close()
        raise ValueError(f"--host {args.host} --port {args.port}: {error.strerror or error}.") from None
    return bound
