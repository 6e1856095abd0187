"""experiments/multinode_zero2.sh on two machines, which are processes here: over gloo, on the loopback, without DeepSpeed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from progress import finish, wait_until
from tiny import REPO, ROWS

import train_gkd

FLAGS = """--lmbda 0 --seq_kd False --per_device_train_batch_size 1 --no_gradient_checkpointing --lora_dropout 0 --bf16 False
    --dtype float32 --learning_rate 1e-2 --lr_scheduler_type constant --train_sampling_strategy sequential --logging_steps 1
    --save_steps 3 --save_total_limit 1 --report_to none --disable_tqdm True --preflight off --max_new_tokens 8
    --max_length 200""".split()


@pytest.fixture
def nodes(saved, tmp_path):
    """Two launchers that train until they are killed, and the lines that each has printed."""
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(ROWS * 4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NODES": "2",
        "GPUS": "1",
        "MASTER": f"127.0.0.1:{port}",
        "DEEPSPEED": "",
        "STUDENT": str(saved / "student"),
        "TEACHER": str(saved / "teacher"),
        "DATA": str(data),
        "OUT": str(tmp_path / "run"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    script = REPO / "experiments/multinode_zero2.sh"
    started = []
    for rank in (0, 1):
        with (tmp_path / f"{rank}.log").open("w") as log:
            command = [script, *FLAGS, "--max_steps", "1000000"]
            env = environment | {"RANK": str(rank)}
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    yield started
    for process in started:
        kill(process)


def kill(process):
    """SIGKILL to a launcher and to all that it has started, at once, as when a machine is lost."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.kill()
        process.wait()


def losses(state):
    return [log["loss"] for log in json.loads(state.read_text())["log_history"] if "loss" in log][:3]


def test_two_machines_train_as_one_and_stop_when_one_is_lost(nodes, saved, tmp_path):
    def logs():
        return "\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))

    def saved_states():
        return sorted((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))

    wait_until(lambda: saved_states() or nodes[1].poll() is not None, nodes[0])
    found = saved_states()
    assert found, logs()
    two = losses(found[0])
    kill(nodes[1])
    finish(nodes[0])
    assert nodes[0].returncode != 0
    said = (tmp_path / "0.log").read_text()
    assert "Connection closed by peer" in said or "Connection reset by peer" in said, said[-3000:]

    alone = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    alone += ["--dataset_name", tmp_path / "rows.json", "--output_dir", tmp_path / "alone", *FLAGS, "--use_peft"]
    alone += ["--lora_r", 8, "--lora_alpha", 16, "--beta", 0.5, "--gradient_accumulation_steps", 4, "--max_steps", 3]
    train_gkd.main([*map(str, alone), "--warmup_steps", "0"])
    assert len(two) == 3
    assert two == pytest.approx(losses(tmp_path / "alone/trainer_state.json"), rel=1e-5)
    assert two[2] != pytest.approx(two[0], rel=1e-2)  # or the comparison would say nothing about the gradient
