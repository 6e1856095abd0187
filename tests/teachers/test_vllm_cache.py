"""`gkd cache --backend vllm`: the cache that our own pass makes, to rounding, and what is refused.

Runs with a stand-in for vLLM and with vLLM where it is installed (tests/vllm_cpu.sh).
"""

import json
import sys

import pytest
import torch
from progress import run
from tiny import REPO, ROWS, make_model
from trainers import losses, tiny_trainer
from vllm_engines import SHAPE, needs_vllm, save_models

import cache_teacher
from gkd.config.caching import CacheArguments
from gkd.teachers.cache import TeacherCache

pytest_plugins = ["vllm_engines"]  # its fixtures
pytestmark = pytest.mark.usefixtures("groups_stay")
K = 7
ON_VLLM = ["--backend", "vllm"]
PROMPTED = [
    row | {"teacher_prompt": [{"role": "system", "content": "Be brief. " * n}, row["messages"][0]]}
    for n, row in enumerate(ROWS, 1)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student, teachers with as many ids and with 24 more, to which they give probability, and rows."""
    folder = tmp_path_factory.mktemp("models")
    wide = make_model(2, vocab_size=288, **SHAPE)
    save_models(folder, student=make_model(0), teacher=make_model(1, **SHAPE), wide=wide)
    (folder / "rows.json").write_text(json.dumps(PROMPTED))
    return folder


def words(folders, out, *flags, teacher="teacher"):
    words = ["--model_name_or_path", folders / "student", "--teacher_model_name_or_path", folders / teacher]
    words += ["--dataset_name", folders / "rows.json", "--output_dir", out, "--top_k", K, "--max_new_tokens", 12]
    return [str(word) for word in (*words, "--max_length", 200, "--rows_per_shard", 3, *flags)]


def cache(*args, **options):
    cache_teacher.main(words(*args, **options))
    return TeacherCache(args[1])


def same(one, other):
    """Texts and ids are equal, log-probabilities to their float16, tails to 1e-6 of the whole mass."""
    for a, b in zip(one.rows(), other.rows(), strict=True):
        for name in ("prompt_ids", "input_ids", "labels", "topk_ids"):
            assert list(a[name]) == list(b[name]), name
        found, wanted = (torch.tensor(row["topk_log_probs"], dtype=torch.float32) for row in (a, b))
        torch.testing.assert_close(found, wanted, rtol=2**-10, atol=1e-4)
        tails = [torch.tensor(row["tail_log_mass"], dtype=torch.float64).exp() for row in (a, b)]
        torch.testing.assert_close(*tails, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("teacher", ["teacher", "wide"])
def test_the_datasets_text_has_the_teacher_of_our_own_pass(engines, folders, tmp_path, teacher):
    """Of a teacher with more ids than the student those ids have no probability, as in our pass."""
    own = cache(folders, tmp_path / "own", teacher=teacher)
    told = cache(folders, tmp_path / "vllm", *ON_VLLM, teacher=teacher)
    same(told, own)
    assert told.settings["teacher"] == {"backend": "vllm"}
    assert own.settings.get("teacher") is None
    assert max(map(max, (row["topk_ids"] for row in told.rows()))) < 264
    assert sum(len(row["tail_log_mass"]) for row in told.rows()) > 15


@pytest.mark.parametrize("teacher", ["teacher", "wide"])
def test_its_greedy_text_is_that_of_our_own_pass(engines, folders, tmp_path, teacher):
    cold = ["--seq_kd", "True", "--temperature", "1e-4"]
    own = cache(folders, tmp_path / "own", *cold, teacher=teacher)
    told = cache(folders, tmp_path / "vllm", *cold, *ON_VLLM, teacher=teacher)
    same(told, own)
    assert {len(row["tail_log_mass"]) for row in told.rows()} != {0}


@needs_vllm
def test_two_processes_share_a_teacher(folders, tmp_path):
    """Its heads, MLPs and vocabulary."""
    own = cache(folders, tmp_path / "own", teacher="wide")
    flags = [*ON_VLLM, "--tensor_parallel_size", 2]
    done = run(
        [sys.executable, str(REPO / "cache_teacher.py"), *words(folders, tmp_path / "vllm", *flags, teacher="wide")]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same(TeacherCache(tmp_path / "vllm"), own)


def test_a_student_trains_on_it_as_on_our_own(engines, folders, tmp_path):
    caches = [cache(folders, tmp_path / name, *flags) for name, flags in (("own", ()), ("vllm", ON_VLLM))]
    runs = []
    for known in caches:
        options = {"max_steps": 3, "learning_rate": 1e-2, "max_new_tokens": 12, "max_length": 200, "beta": 0.0}
        trainer = tiny_trainer(tmp_path / "run", make_model(0), None, None, more={"teacher_cache": known}, **options)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)
    assert min(runs[0]) > 0.05


def test_what_an_engine_is_asked_for(stand_in, folders, tmp_path):
    cache(folders, tmp_path / "cache", *ON_VLLM, "--tensor_parallel_size", 2, "--teacher_dtype", "bfloat16")
    (engine,) = stand_in.made
    expected = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "max_logprobs": K,
        "max_num_seqs": 128,
    }
    assert expected.items() <= engine.options.items()
    assert engine.options["gpu_memory_utilization"] == 0.9
    assert engine.model.dtype is torch.bfloat16


def test_a_caching_that_broke_goes_on(stand_in, folders, tmp_path, capsys):
    whole = cache(folders, tmp_path / "whole", *ON_VLLM)
    stand_in.breaks_after = 2  # shards of three rows and of one
    with pytest.raises(
        SystemExit, match="vLLM broke: RuntimeError: EngineCore encountered an issue. Shards that are done"
    ):
        cache(folders, tmp_path / "broken", *ON_VLLM)
    stand_in.breaks_after = None
    same(cache(folders, tmp_path / "broken", *ON_VLLM), whole)
    assert stand_in.made[-1].calls.count("generate") == 1


def test_an_engine_that_does_not_start_is_one_line(stand_in, folders, tmp_path):
    with pytest.raises(SystemExit, match=r"did not start for \S+teacher: Free memory on device is less. --vllm_mem"):
        cache(folders, tmp_path / "cache", *ON_VLLM, "--vllm_memory", "0.95")


def test_log_probabilities_that_are_no_numbers(stand_in, folders, tmp_path, monkeypatch):
    nothing = torch.full((2, 199, K + 1), torch.nan, dtype=torch.float64)
    monkeypatch.setattr("gkd.teachers.vllm.likeliest", lambda engine, texts, k: [nothing for _ in texts])
    with pytest.raises(SystemExit, match="log-probabilities in vLLM are no numbers"):
        cache(folders, tmp_path / "cache", *ON_VLLM)


def arguments(**flags):
    flags = {"backend": "vllm", "teacher_model_name_or_path": "TEACHER"} | flags
    return CacheArguments(output_dir="o", model_name_or_path="STUDENT", dataset_name="d", **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep": "hidden"}, "--keep does not go with --backend vllm"),
        ({"loss_temperature": 2.0}, "--loss_temperature does not go with --backend vllm"),
        ({"teacher_load_in_4bit": True}, "--teacher_load_in_4bit does not go with"),
        ({"teacher_adapter": "a"}, "--teacher_adapter does not go with"),
        ({"generation_backend": "vllm"}, "--generation_backend does not go with"),
        ({"teacher_url": "http://127.0.0.1:1"}, "--teacher_url does not go with"),
        ({"teacher_model_name_or_path": None}, "needs --teacher_model_name_or_path, a model that it loads"),
        (
            {"backend": None, "tensor_parallel_size": 2},
            "--tensor_parallel_size 2 has no effect without --backend vllm",
        ),
        ({"tensor_parallel_size": 0}, "--tensor_parallel_size must be positive"),
        ({"vllm_memory": 1.5}, "--vllm_memory is a share"),
    ],
)
def test_flags_are_refused(stand_in, flags, message):
    with pytest.raises(ValueError, match=message):
        arguments(**flags)


def test_where_it_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments(tensor_parallel_size=2)
    with pytest.raises(ValueError, match="--tensor_parallel_size 4: there are 2 visible GPUs"):
        arguments(tensor_parallel_size=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--backend vllm starts its own processes: start one"):
        arguments()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("gkd.config.generation.version", lambda name: "0.21.9")
    with pytest.raises(ValueError, match="--backend vllm works with vLLM >=0.22,<0.32, not 0.21.9"):
        arguments()


def test_memory_is_as_the_backend_needs_it(stand_in):
    assert arguments().vllm_memory == 0.9
    assert arguments(generation_backend="vllm", backend=None).vllm_memory == 0.3
    assert (arguments().batch_size, arguments(backend=None).batch_size) == (128, 16)
