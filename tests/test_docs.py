"""The READMEs and docs/ are what they say: commands parse, files exist, both languages hold the same."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from tiny import REPO
from transformers import GenerationConfig

from gkd.cli import convert, diagnose, evaluate, serve
from gkd.config.caching import make_parser as cache_parser
from gkd.config.commands import chat_flags, export_flags, report_flags, shrink_flags
from gkd.config.parser import GKDParser

PAGES = [
    REPO / "README.md",
    REPO / "README.zh-CN.md",
    REPO / "CONTRIBUTING.md",
    *sorted((REPO / "docs").rglob("*.md")),
]
TRANSLATED = [("README.md", "README.zh-CN.md")] + [
    (f"docs/{page.name}", f"docs/zh/{page.name}") for page in sorted((REPO / "docs/zh").glob("*.md"))
]

# The functions that parse the flags of `gkd VERB` and of its script.
PARSERS = {
    "train": lambda argv: GKDParser().parse(argv),
    "convert": lambda argv: convert.parse_arguments(argv, ""),
    "evaluate": evaluate.parse,
    "cache": lambda argv: cache_parser().parse_one(argv),
    "export": lambda argv: export_flags(argv, ""),
    "report": lambda argv: report_flags(argv, ""),
    "chat": lambda argv: chat_flags(argv, ""),
    "shrink": lambda argv: shrink_flags(argv, ""),
    "diagnose": diagnose.parse,
    "serve": serve.parse,
}
VERBS = {
    "train_gkd.py": "train",
    "convert_data.py": "convert",
    "eval_gkd.py": "evaluate",
    "cache_teacher.py": "cache",
    "export_model.py": "export",
}
# Others' programs, and scripts that take no flags here.
ELSEWHERE = {"bash", "pip", "vllm", "lm_eval", "export", "pytest", "python", "mkdocs"}
ELSEWHERE |= {
    ".venv/bin/python",
    ".venv/bin/ruff",
    ".venv/bin/lint-imports",
    "experiments/setup.sh",
    "experiments/multinode_zero2.sh",
}


def text_of(page):
    return (REPO / page).read_text(encoding="utf-8")


def blocks_of(page):
    return re.findall(r"```bash\n(.*?)```", text_of(page), re.S)


def commands_of(page):
    """Words of each command of a page, without variables that are set before it."""
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(blocks_of(page))).splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


def verb_and_flags(words):
    """Of a command of gkd, by any of its names; None for other programs."""
    if words[0] == "gkd":
        return words[1], words[2:]
    if words[:3] == ["python", "-m", "gkd"]:
        return words[3], words[4:]
    script = next((word for word in words if word in VERBS), None)
    return script and (VERBS[script], words[words.index(script) + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_commands_are_understood(page, tmp_path, monkeypatch):
    for module in (
        "training",
        "values",
        "teacher",
        "serving",
        "generation",
    ):  # bitsandbytes and deepspeed may be missing here
        monkeypatch.setattr(f"gkd.config.{module}.need", lambda *a: None)
    monkeypatch.setenv("GKD_SERVE_TOKEN", "as in the commands")  # whose variables are cut
    for folder in ("data", "ds_configs", "experiments"):
        (tmp_path / folder).symlink_to(REPO / folder)
    run = tmp_path / "runs/translation"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"arguments": {"teacher_model_name_or_path": "TEACHER"}}))
    monkeypatch.chdir(tmp_path)
    for words in commands_of(page):
        command = verb_and_flags(words)
        if command is None:
            assert words[0] in ELSEWHERE, words
            continue
        verb, flags = command
        if verb == "train" and "--accelerate_config" in flags:
            i = flags.index("--accelerate_config")
            assert (REPO / "ds_configs" / f"{flags[i + 1]}.yaml").is_file()
            del flags[i : i + 2]
        PARSERS[verb](flags)


def test_a_wrong_command_fails():
    assert verb_and_flags(shlex.split("accelerate launch --config_file x.yaml train_gkd.py --lmbda 1"))[0] == "train"
    verb, flags = verb_and_flags(["gkd", "report", "--no_such_flag", "x"])
    with pytest.raises(SystemExit):
        PARSERS[verb](flags)


@pytest.fixture(scope="module")
def all_flags():
    """Every flag of every command, from its help."""
    with contextlib.redirect_stdout(io.StringIO()) as helps:
        for verb, parse in PARSERS.items():
            with pytest.raises(SystemExit):
                parse(["--help_all" if verb == "train" else "--help"])
    return set(re.findall(r"--\w[\w-]*", helps.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_flags_exist(page, all_flags):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    removed = {"--torch_dtype", "--dataset_batch_size", "--max_seq_length", "--evaluation_strategy"}
    others = {"--signal", "--strict", "--accelerate_config", "--logprobs-mode"}  # of sbatch, mkdocs, `gkd train`, vLLM
    assert set(re.findall(r"(?<![\w-])--\w[\w-]*", text)) <= all_flags | removed | others


@pytest.mark.parametrize("page", [*PAGES, REPO / "data/README.md"], ids=lambda path: str(path.relative_to(REPO)))
def test_files_and_extras_exist(page):
    text = text_of(page)
    for path in re.findall(r"(?:experiments|ds_configs|data|gkd|tests|benchmarks|docs)/[\w./-]+\.\w+", text):
        assert (REPO / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    project = text_of("pyproject.toml")
    for extras in re.findall(r"\.\[([\w,]+)\]", text):
        assert all(f"\n{extra} = [" in project for extra in extras.split(",")), extras


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_is_short_and_starts_with_the_quickstart_and_the_test_command_of_ci(page):
    assert len(text_of(page).split()) <= 1200
    first, second = blocks_of(page)[:2]
    assert first.strip() == "bash experiments/quickstart_cpu.sh"
    assert second.strip() == ".venv/bin/python -m pytest -n 2 --dist loadfile"
    assert second.strip() in text_of(".ci/run")


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED)
def test_both_languages_hold_the_same_commands_and_flags(english, chinese):
    assert blocks_of(english) == blocks_of(chinese)
    if english != "docs/data.md":  # in Chinese it points to the English page for rows
        flags = [set(re.findall(r"--\w+", text_of(page))) for page in (english, chinese)]
        assert flags[0] == flags[1]
        columns = [re.findall(r"(?m)^\|.*\|$", text_of(page)) for page in (english, chinese)]
        assert [row.count("|") for row in columns[0]] == [row.count("|") for row in columns[1]]


@pytest.mark.parametrize(("readme", "page"), [("README.md", "docs/trl.md"), ("README.zh-CN.md", "docs/zh/trl.md")])
def test_the_readmes_speeds_are_those_of_the_docs(readme, page):
    rows = re.findall(r"(?m)^\|.* \*\*[\d.]+\*\*.*\|$", text_of(readme))
    assert len(rows) == 7
    assert set(rows) <= set(text_of(page).splitlines())


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "zh/troubleshooting/index.html").is_file()


def test_the_recipes_for_contributors_run(train, student):
    names = {"__name__": "recipes"}
    for recipe in re.findall(r"```python\n(.*?)```", text_of("CONTRIBUTING.md"), re.S):
        exec(recipe, names)
    log_probs = torch.randn(2, 3, 7).log_softmax(-1)
    expected = 1 - log_probs.exp().prod(0).sqrt().sum(-1)
    torch.testing.assert_close(names["Hellinger"]().value(*log_probs), expected)

    prompts = torch.tensor([[5, 6], [7, 8]])
    ids, mask = names["FirstStop"](None)(
        student, prompts, torch.ones_like(prompts), GenerationConfig(eos_token_id=[2])
    )
    assert ids.tolist() == [[2], [2]]
    assert mask.tolist() == [[1], [1]]

    trainer = train(student, names["Elsewhere"](None), learning_rate=1e-2)
    assert trainer.state.log_history[0]["dataset/forward_kl"] > 0
