"""A divergence by its flag: in the record, on resume, in evaluation, in the reports; and what stays of the default one."""

import json
from types import SimpleNamespace

import pytest
from commands import flags, write_rows

import eval_gkd
import train_gkd
from gkd.evaluation.evaluator import Evaluation, _digest
from gkd.losses.divergences import jsd
from gkd.losses.skew import SkewKL
from gkd.losses.total_variation import TotalVariation
from gkd.runs.record import changes_in, read_record
from gkd.runs.results import read_results


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


def skewed(saved, data, out, *more):
    words = flags(saved, data, out, "--lmbda", 0, "--save_steps", 1, *more)
    place = words.index("--beta")
    del words[place : place + 2]
    train_gkd.main(words)


def test_skew_kl_from_the_flag_to_the_report(saved, data, tmp_path, capsys):
    out, again, apart = tmp_path / "run", tmp_path / "again", tmp_path / "apart"
    skewed(saved, data, out, "--divergence", "skew_kl", "--skew_alpha", 0.3)
    assert "loss (skew KL at the run's α)" in " ".join(capsys.readouterr().out.split())
    record = read_record(out)["arguments"]
    assert (record["divergence"], record["skew_alpha"]) == ("skew_kl", 0.3)
    results = read_results(out)
    assert {(r["divergence"], r["beta"]) for r in results} == {("skew_kl skew_alpha=0.3", None)}
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "skew KL at the run's α" in page
    assert "JSD" not in page
    assert "| `--skew_alpha` | 0.3 |" in page
    assert "`--beta`" not in page

    # Without a flag eval_gkd.py takes the run's: the same figures, of which none is computed anew.
    eval_gkd.main([str(out)])
    after = {r["model"]: r for r in read_results(out)}["after"]
    assert after["settings"] == results[0]["settings"]
    assert after["metrics"]["dataset/loss"]["value"] == pytest.approx(results[-1]["metrics"]["dataset/loss"]["value"])
    eval_gkd.main([str(out), "--divergence", "tv", "--output_dir", str(apart)])
    assert {(r["divergence"], r["beta"]) for r in read_results(apart)} == {("tv", None)}
    assert "total variation" in (apart / "report.md").read_text(encoding="utf-8")

    capsys.readouterr()
    skewed(saved, data, again, "--divergence", "tv", "--resume_from_checkpoint", out / "checkpoint-1")
    assert "divergence skew_kl -> tv from step 1" in capsys.readouterr().out
    assert [1, "divergence", "skew_kl", "tv"] in [list(change) for change in changes_in(read_record(again))]


def test_another_divergence_is_told_where_the_record_is_older_than_the_flag(saved, data, tmp_path, capsys):
    out = tmp_path / "run"
    skewed(saved, data, out)
    record = json.loads((out / "run.json").read_text())
    for arguments in (record["arguments"], record["history"][0]["arguments"]):
        del arguments["divergence"], arguments["skew_alpha"]
    (out / "run.json").write_text(json.dumps(record))
    assert {"divergence"} & set(read_results(out)[0]) == set()
    skewed(
        saved, data, tmp_path / "again", "--divergence", "skew_kl", "--resume_from_checkpoint", out / "checkpoint-1"
    )
    assert "divergence jsd -> skew_kl from step 1" in capsys.readouterr().out


def test_what_results_are_compared_by():
    """Of the generalized JSD it is what it was before there were others: its β among the settings."""

    def settings(divergence):
        rest = dict.fromkeys("data against metrics scorer batch_size output_dir seconds_apart reader".split())
        rows = [{"row": "{}", "prompt_ids": [1]}]
        evaluation = Evaluation(SimpleNamespace(), None, rows, stop_ids=[2], divergence=divergence, seed=3, **rest)
        return evaluation._settings

    assert settings(jsd(0.25)) == _digest(1, [{"row": "{}", "prompt_ids": [1]}], 0.25, 3, [2])
    kinds = [jsd(0.25), jsd(0.5), jsd(1.0), SkewKL(0.25), SkewKL(0.5), TotalVariation()]
    assert len({settings(kind) for kind in kinds}) == len(kinds)
