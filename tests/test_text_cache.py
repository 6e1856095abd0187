"""The teacher's text on disk: found again, told apart, and never in the way of a run."""

from concurrent.futures import ThreadPoolExecutor

import torch
from tiny import make_model
from transformers import GenerationConfig

from gkd.text_cache import TextCache, writer_fingerprint

CONFIG = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9, "top_k": 0, "eos_token_id": [1, 2]}


def test_text_is_found_again_by_its_prompt(tmp_path):
    cache = TextCache(tmp_path, b"teacher")
    prompts, texts = [[5, 6], [5, 6, 7], [1 << 20]], [[9, 2], [8], [3, 1 << 20]]
    assert cache.lookup(prompts) == [None] * 3
    cache.store(prompts, texts)
    again = TextCache(tmp_path, b"teacher")
    assert again.lookup([*prompts, [6, 5]]) == [*texts, None]
    again.store([[5, 6]], [[7, 7]])
    assert cache.lookup([[5, 6]]) == [[9, 2]]  # the first stays
    assert TextCache(tmp_path, b"another teacher").lookup(prompts) == [None] * 3


def test_fingerprint_tells_teachers_and_sampling_apart():
    model, config = make_model(0), GenerationConfig(**CONFIG)
    own = writer_fingerprint(model, config)
    assert own == writer_fingerprint(make_model(0), GenerationConfig(**CONFIG))
    assert own != writer_fingerprint(make_model(1), config)
    for change in ({"temperature": 0.8}, {"max_new_tokens": 9}, {"eos_token_id": [1]}, {"do_sample": False}):
        assert own != writer_fingerprint(model, GenerationConfig(**(CONFIG | change)))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    assert own != writer_fingerprint(model, config)


def test_ranks_may_share_the_file(tmp_path):
    def work(rank):
        cache = TextCache(tmp_path, b"t")
        for i in range(20):
            cache.store([[rank, i]], [[i]])
        return cache._works

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    found = TextCache(tmp_path, b"t").lookup([[rank, i] for rank in range(4) for i in range(20)])
    assert found == [[i] for _ in range(4) for i in range(20)]


def test_a_damaged_file_costs_no_result(tmp_path):
    (tmp_path / "completions.sqlite").write_bytes(b"not a database" * 100)
    cache = TextCache(tmp_path, b"t")
    assert cache.lookup([[1]]) == [None]
    cache.store([[1]], [[2]])
    assert cache.lookup([[1]]) == [None]


def test_a_copy_of_another_runs_text(tmp_path):
    TextCache(tmp_path / "a", b"t").store([[1]], [[2]])
    cache = TextCache(tmp_path / "b", b"t")
    cache.take_from(tmp_path / "a")
    assert cache.lookup([[1]]) == [[2]]
    cache.store([[5]], [[6]])
    cache.take_from(tmp_path / "a")  # has text of its own now
    assert cache.lookup([[5]]) == [[6]]
    assert not list((tmp_path / "b").glob("*.partial"))


def test_a_source_that_cant_be_copied_costs_no_result(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "completions.sqlite").write_bytes(b"not a database" * 100)
    cache = TextCache(tmp_path / "b", b"t")
    cache.take_from(tmp_path / "a")
    assert list((tmp_path / "b").iterdir()) == []
    cache.store([[1]], [[2]])
    assert cache.lookup([[1]]) == [[2]]
    (tmp_path / "file").write_text("")
    TextCache(tmp_path / "file" / "below", b"t").take_from(tmp_path / "b")  # no folder can be made there
