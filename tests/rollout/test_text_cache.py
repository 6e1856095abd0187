"""The teacher's text on disk: found again, told apart, and never in the way of a run."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from tiny import make_model
from trainers import make_trainer
from transformers import GenerationConfig

from gkd.generation.sampling import writer_fingerprint
from gkd.rollout.cache import TextCache

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
        return cache.works

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


def change(folder, statement, *values):
    with closing(sqlite3.connect(folder / "completions.sqlite")) as connection, connection:
        connection.execute(statement, values)


@pytest.mark.parametrize("checked", [True, False], ids=["at the start", "when it is read"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("tokens", np.asarray([9, 3], np.int32).tobytes()),  # a flipped token
        ("tokens", b"\x09\x00"),
        ("tokens", b""),
        ("tokens", "text"),
        ("checksum", 5),
    ],
)
def test_a_damaged_text_is_told_and_written_anew(tmp_path, caplog, column, value, checked):
    TextCache(tmp_path, b"t").store([[1], [2]], [[9, 2], [8, 2]])
    change(tmp_path, f"UPDATE texts SET {column} = ? WHERE tokens = ?", value, np.asarray([9, 2], np.int32).tobytes())
    cache = TextCache(tmp_path, b"t")
    if checked:
        cache.check()
        assert "completions.sqlite: 1 damaged texts, which the teacher writes anew" in caplog.text
    assert cache.lookup([[1], [2]]) == [None, [8, 2]]
    assert caplog.text.count("damaged texts") == 1
    cache.store([[1]], [[7, 2]])
    assert TextCache(tmp_path, b"t").lookup([[1], [2]]) == [[7, 2], [8, 2]]


def test_a_file_without_checksums_is_read_where_its_ids_exist(tmp_path, caplog):
    cache = TextCache(tmp_path, b"t")
    change(tmp_path, "CREATE TABLE texts (prompt BLOB PRIMARY KEY, tokens BLOB, run TEXT, step INTEGER, rank INTEGER)")
    for prompt, token in ([1], 9), ([2], 300), ([3], -1):
        text = np.asarray([token, 2], np.int32).tobytes()
        change(tmp_path, "INSERT INTO texts VALUES (?, ?, '', 0, 0)", cache.key_of(prompt), text)
    for _ in range(2):
        cache = TextCache(tmp_path, b"t", vocab_size=262)
        cache.check()
        assert cache.lookup([[1], [2], [3]]) == [[9, 2], None, None]
    assert "2 damaged texts" in caplog.text
    cache.store([[2]], [[8, 2]])
    change(tmp_path, "UPDATE texts SET tokens = ? WHERE prompt = ?", b"\x07\x00\x00\x00", cache.key_of([2]))
    assert cache.lookup([[2]]) == [None]  # it has a checksum


@pytest.mark.parametrize("harm", ["deleted", "no database", "one text", "none"])
def test_a_resumed_run_tells_of_text_that_is_gone(tmp_path, caplog, harm):
    options = {"seq_kd": True, "generation_batch_size": 4, "learning_rate": 0.0}
    make_trainer(tmp_path, max_steps=2, **options).train()
    path = tmp_path / "run/_teacher_text/completions.sqlite"
    if harm == "deleted":
        path.unlink()
    elif harm == "no database":
        path.write_bytes(b"not a database" * 100)
    elif harm == "one text":
        change(path.parent, "DELETE FROM texts WHERE prompt = (SELECT MIN(prompt) FROM texts)")
    again = make_trainer(tmp_path, num_train_epochs=2, max_steps=-1, **options)
    again.train(resume_from_checkpoint=True)
    said = f"{path} has {7 if harm == 'one text' else 0} of the 8 texts that the teacher had written by checkpoint-2."
    assert (said in caplog.text) == (harm != "none")
    assert (f"{path} is damaged (file is not a database) and is now {path.name}.damaged" in caplog.text) == (
        harm == "no database"
    )
    assert again.rollout.cache.written(again.rollout.cache.run)["entries"] == 12


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
