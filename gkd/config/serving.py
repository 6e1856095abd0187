"""The flags of `gkd serve`."""

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from functools import partial

from gkd.config.generation import VLLM, GenerationArguments
from gkd.config.parser import FlagParser
from gkd.config.teacher import TeacherArguments
from gkd.config.values import check_positive, flag, need, parse_objects

TOKEN = "GKD_SERVE_TOKEN"


@dataclass
class ServeArguments(GenerationArguments, TeacherArguments):
    """The flags of `gkd serve`. The token that clients must have comes from the environment, `GKD_SERVE_TOKEN`."""

    host: str = flag(
        "127.0.0.1", "Address to listen on. Any but this machine's own (127.0.0.1) needs GKD_SERVE_TOKEN."
    )
    port: int = flag(8500, "Port to listen on; 0 takes a free one.")
    ssl_certfile: str | None = flag(None, "Serve https with this certificate.")
    ssl_keyfile: str | None = flag(None, "The certificate's private key.")
    max_request_mib: float = flag(16.0, "A larger request is refused. Ids take 8 bytes a token, twice with a mask.")
    merge_requests: bool = flag(
        False,
        "Read what waits from several clients in one forward. Faster for many; answers are then equal to rounding, not to the "
        "bit.",
    )
    teachers: list[str] | None = field(default=None, init=False)
    teacher_url: str | None = field(default=None, init=False)
    teacher_timeout: float = field(default=600.0, init=False)
    teacher_logprobs_url: str | None = field(default=None, init=False)
    teacher_top_k: int = field(default=20, init=False)
    teacher_logprobs_requests: int = field(default=32, init=False)

    def __post_init__(self):
        if self.teacher_model_name_or_path is None:
            raise ValueError("gkd serve TEACHER --port PORT: name the teacher.")
        parse_objects(self, ["teacher_model_init_kwargs"])
        check_positive(self, ["max_request_mib"])
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: a port is a number up to 65535.")
        if not self.is_loopback and not os.environ.get(TOKEN):
            raise ValueError(
                f"--host {self.host} can be reached from other machines: set {TOKEN} to a secret, which clients give as "
                "GKD_TEACHER_TOKEN, or leave --host out."
            )
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("--ssl_keyfile is the key of --ssl_certfile: give both.")
        if self.ssl_certfile is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.ssl_certfile, self.ssl_keyfile, "")
            except OSError as error:  # of ssl too
                raise ValueError(f"--ssl_certfile {self.ssl_certfile}: {error.strerror or error}.") from None
        if self.generation_backend == VLLM:
            raise ValueError(
                "gkd serve writes by its own decoder: leave --generation_backend vllm out, or serve the teacher by vllm serve "
                "(--teacher_logprobs_url, --teacher_text_url of gkd train)."
            )
        self.check_teacher()
        for package in ("fastapi", "uvicorn", "prometheus_client"):
            need("gkd serve", package, "serve")

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach the host."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False


make_parser = partial(FlagParser, ServeArguments)
