"""A real vLLM, where one is installed: log-probabilities and text are those of transformers.

It may stand in an environment of its own, whose `vllm` is in PATH. Of a CPU without VLLM_TARGET_DEVICE it takes itself for
a broken GPU.
"""

import os
import shutil
import signal
import socket
import subprocess
import time

import httpx
import pytest
import torch
from inference_servers import InferenceServer, batch_of, ready, stopped, target_of, top_k_here
from tiny import make_model, make_tokenizer
from transformers import GenerationConfig

pytestmark = pytest.mark.skipif(shutil.which("vllm") is None, reason="needs vllm in PATH")

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
if not torch.cuda.is_available():
    ENVIRONMENT |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of vLLM, and the model that it serves, as `InferenceServer` has it."""
    folder = tmp_path_factory.mktemp("vllm")
    model = make_model(
        1, hidden_size=128, num_attention_heads=2, num_key_value_heads=1
    )  # it has kernels for 64 a head
    model.save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["vllm", "serve", folder / "teacher", "--port", port, "--host", "127.0.0.1", "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", "512"]
    # It imports its own libraries, not those of this process.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, words)), env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                httpx.get(f"{url}/v1/models")
                break
            except httpx.HTTPError:
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                time.sleep(1)
        yield f"{url}/v1", InferenceServer(model)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_log_probabilities_are_those_of_transformers(served):
    url, here = served
    teacher = ready(url, k=20, timeout=60.0)
    batches = [batch_of(seed) for seed in range(4)]
    teacher.prepare(batches)
    for batch in batches:
        one, other = target_of(teacher, batch), top_k_here(here, batch, 20)
        assert torch.equal(one.ids, other.ids)
        for a, b in ((one.log_probs, other.log_probs), (one.tail, other.tail), (one.following, other.following)):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-4)


def test_text_is_that_of_transformers(served):
    url, here = served
    teacher = ready(url, timeout=60.0)
    prompts = torch.randint(6, 262, (6, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    stops = [1, 2, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]
    config = GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=stops, pad_token_id=0)
    ids, kept = teacher.write(prompts, mask, config, 5)
    ended = []
    for row, (prompt, keep) in enumerate(zip(prompts, mask.bool(), strict=True)):
        expected, reason = here.write(prompt[keep].tolist(), 40, 0.0, stops)
        assert ids[row][kept[row].bool()].tolist() == expected
        ended.append(reason)
    assert set(ended) == {"stop", "length"}
    sampled = GenerationConfig(max_new_tokens=30, do_sample=True, temperature=1.0, eos_token_id=[2], pad_token_id=0)
    assert torch.equal(teacher.write(prompts, mask, sampled, 5)[0], teacher.write(prompts, mask, sampled, 5)[0])


def test_it_says_how_many_it_tells(served):
    message = stopped(lambda: ready(served[0], k=21, timeout=60.0))
    assert message.endswith("Lower --teacher_top_k, or start it with more: vllm serve --max-logprobs N.")
