"""Answers of commands before torch loads: no arguments, help, a misspelt flag; and paths on a command line."""

import json
import os
import re
import subprocess
import sys

import pytest
from tiny import REPO, ROWS, make_model, make_tokenizer

import cache_teacher
import convert_data
import eval_gkd
import export_model
import train_gkd
from gkd.cli import chat, report, shrink, start
from gkd.cli.launch import launch
from gkd.config import commands as parsers
from gkd.config.parser import GKDParser
from gkd.runs.typed import LAUNCHED_BY, typed_command

CACHED = {"train_gkd.py": ["train_gkd.py"], "eval_gkd.py": ["eval_gkd.py"], "cache_teacher.py": ["cache_teacher.py"]}
CACHED |= {f"gkd {verb}": ["-m", "gkd", verb] for verb in ("diagnose", "serve")}
OWN = {
    "export_model.py": ["export_model.py"],
    "convert_data.py": ["convert_data.py"],
    "experiments/quickstart.py": ["experiments/quickstart.py"],
    "experiments/self_prompts.py": ["experiments/self_prompts.py"],
    **{f"gkd {verb}": ["-m", "gkd", verb] for verb in start.VERBS if f"gkd {verb}" not in CACHED},
}
# A misspelt flag of each command, and the right one.
TYPOS = {
    "train_gkd.py": ("--lmbd", "--lmbda"),
    "eval_gkd.py": ("--chekpoints", "--checkpoints"),
    "cache_teacher.py": ("--top-", "--top_k"),
    "export_model.py": ("--checkpont", "--checkpoint"),
    "convert_data.py": ("--source_fild", "--source-field"),
    "gkd report": ("--output-dr", "--output_dir"),
    "gkd chat": ("--temperatur", "--temperature"),
    "gkd shrink": ("--layer", "--layers"),
    "gkd diagnose": ("--max_row", "--max_rows"),
    "gkd serve": ("--prot", "--port"),
    "experiments/quickstart.py": ("--gp", "--gpu"),
    "experiments/self_prompts.py": ("--sed", "--seed"),
}
SHELLS = {"train": "train_gkd.py", "evaluate": "eval_gkd.py", "cache": "cache_teacher.py"}
SHELLS |= {"export": "export_model.py", "convert": "convert_data.py"}
TYPOS |= {f"gkd {verb}": TYPOS[shell] for verb, shell in SHELLS.items()}


def run(cache, *words):
    """Exit code, stdout, stderr and imported modules of the real command."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=REPO, capture_output=True, text=True, env=environment
    )
    lines = done.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = "".join(f"{line}\n" for line in lines if not line.startswith("import time:"))
    return done.returncode, done.stdout, said, modules


# In one process, which imports torch once; each command is as if alone, since none has what a later one must not import.
FIRST = """
import runpy, sys
here = list(sys.path)
for words in {commands}:
    sys.argv, sys.path[:] = words[words[0] == "-m" :], here
    try:
        runpy.run_module("gkd", run_name="__main__", alter_sys=True) if words[0] == "-m" else runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 2
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with the cached flags of all commands, which the first misspelt flag of each has written."""
    folder = tmp_path_factory.mktemp("cache")
    typed = [[*words, f"{TYPOS[name][0]}=secret"] for name, words in CACHED.items()]
    code, _, said, modules = run(folder, "-c", FIRST.format(commands=typed))
    unknown = [f"{name}: error: unknown flag {TYPOS[name][0]}. Did you mean {TYPOS[name][1]}?" for name in CACHED]
    assert (code, said.splitlines()) == (0, unknown)
    assert "torch" in modules
    assert (
        not {
            "gkd.training.trainer",
            "gkd.generation.generator",
            "gkd.models.loading",
            "deepspeed",
        }
        & modules
    )
    assert len(list((folder / "gkd").iterdir())) == len(CACHED)
    return folder


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["typo", "0.5"]], ids=["nothing", "help", "h", "typo"])
@pytest.mark.parametrize("name", [*CACHED, *OWN])
def test_answered_before_torch_is_imported(cache, tmp_path, name, words):
    command = CACHED.get(name) or OWN[name]
    if name == "experiments/quickstart.py" and not words:
        pytest.skip("it needs no flag")
    typo, meant = TYPOS[name]
    words = [typo if word == "typo" else word for word in words]
    # Answers that need no list of flags need no cache either.
    code, out, said, modules = run(cache if words else tmp_path, *command, *words)
    assert not {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "matplotlib"} & modules
    if not words:
        assert code == 2
        assert said.startswith("usage: ")
        assert re.search(r"\n    (python )?" + re.escape(name.removeprefix("python ")), said)
        assert said.endswith("--help shows the flags.\n")
    elif words[0] == typo:
        assert (code, said) == (2, f"{name}: error: unknown flag {typo}. Did you mean {meant}?\n")
    else:
        assert code == 0
        assert out.startswith("usage: ")


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        ([], 2, "usage: gkd VERB "),
        (["--help"], 0, "usage: gkd VERB "),
        (["trian", "--lmbda", "1"], 2, "gkd: error: unknown command trian. Did you mean train?\n"),
        (["\x1b[2J"], 2, "gkd: error: unknown command \\x1b[2J. It is one of convert, cache, "),
    ],
)
def test_the_command_names_its_verbs(tmp_path, words, code, answer):
    ended, out, said, modules = run(tmp_path, "-m", "gkd", *words)
    assert ended == code
    assert (said if code else out).startswith(answer)
    assert (out if code else said) == ""
    assert not {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "rich"} & modules


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            "--accelerate_config zer2",
            "--accelerate_config zer2: no such file, and none of ours, which are cpu, .*zero2",
        ),
        ("--accelerate_config=cpu --num_proceses 2", "unknown flag --num_proceses. Did you mean --num_processes?"),
        ("--num_processes 2", "--num_processes is of accelerate's launcher: give --accelerate_config too."),
        ("--accelerate_config cpu --module", "unknown flag --module."),
    ],
)
def test_a_launch_is_checked_before_torch_is_imported(cache, words, answer):
    code, _, said, modules = run(cache, "-m", "gkd", "evaluate", "runs/x", *words.split())
    assert code == 2
    assert re.match("gkd evaluate: error: " + answer, said)
    assert "torch" not in modules
    code, out, _, _ = run(cache, "-m", "gkd", "evaluate", "--help")
    assert "--accelerate_config NAME|FILE" in out
    assert "--accelerate_config" not in run(cache, "eval_gkd.py", "--help")[1]


def test_a_launch_is_accelerates(monkeypatch, tmp_path):
    """Our configuration is found by name from any folder; launcher and command get their own flags."""
    monkeypatch.chdir(tmp_path)
    launched = []
    monkeypatch.setattr("gkd.cli.launch.launch_command", launched.append)
    monkeypatch.setattr("gkd.cli.launch.signal.signal", lambda *_: None)  # leaves pytest's Ctrl-C alone
    words = (
        "--lmbda=1 --accelerate_config zero2 --num_processes 2 --debug underflow_overflow --gpu_ids=0,1 --bf16".split()
    )
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/gkd", "train", *words, "--output_dir", "out"])
    monkeypatch.setenv(LAUNCHED_BY, "null")  # so that monkeypatch restores it
    flags = start.describe(GKDParser(prog="gkd train"))
    launch("train", [*words, "--output_dir", "out"], start.rebuild(flags, "gkd train", ""))
    (args,) = launched
    assert (args.num_processes, args.gpu_ids) == (2, "0,1")
    assert args.config_file == str(REPO / "ds_configs/zero2.yaml")
    assert args.deepspeed_config_file == str(REPO / "ds_configs/zero2.json")
    assert args.training_script == str(REPO / "gkd/__main__.py")
    own = "train --lmbda=1 --debug underflow_overflow --bf16 --output_dir out"  # --debug, which both have
    assert args.training_script_args == own.split()
    # The processes that it starts report the command as it was typed.
    assert typed_command() == ["/somewhere/bin/gkd", "train", *words, "--output_dir", "out"]


def test_a_command_is_repeated_as_it_was_typed(monkeypatch, tmp_path):
    script = tmp_path / "gkd"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    started = {
        str(script): ["gkd"],
        "/elsewhere/gkd": ["/elsewhere/gkd"],
        "/library/gkd/__main__.py": [sys.executable, "-m", "gkd"],
        "train_gkd.py": [sys.executable, "train_gkd.py"],
    }
    for program, words in started.items():
        monkeypatch.setattr(sys, "argv", [program, "--lmbda", "1", "--resume_from_checkpoint", "auto"])
        assert typed_command() == [*words, "--lmbda", "1"]


def test_all_help_is_fast_too_and_what_is_no_flag_is_named(cache):
    code, out, _, modules = run(cache, "train_gkd.py", "--help_all")
    assert code == 0
    assert "--adam_beta1" in out
    assert "torch" not in modules
    code, _, said, modules = run(cache, "train_gkd.py", "train", "--lmbda", "0.5")
    assert (code, said) == (2, "train_gkd.py: error: not understood: train. Flags begin with --; see --help.\n")
    assert "torch" not in modules


def test_a_run_may_stand_first(cache):
    code, _, said, modules = run(cache, "eval_gkd.py", "runs/nowhere", "--chekpoints")
    assert (code, said) == (2, "eval_gkd.py: error: unknown flag --chekpoints. Did you mean --checkpoints?\n")
    assert "torch" not in modules
    code, _, said, _ = run(cache, "eval_gkd.py", "runs/nowhere", "--checkpoints")
    assert (code, said) == (2, "eval_gkd.py: error: RUN runs/nowhere: no such folder.\n")


def test_help_on_a_terminal_with_few_letters(cache, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    for name in ("train_gkd.py", "convert_data.py"):
        code, out, said, _ = run(cache, name, "--help")
        assert (code, said) == (0, "")
        assert "?" in out


def parser_of(name):
    module, _, attribute = start.COMMANDS[name][1].partition(":")
    return getattr(__import__(module, fromlist=[attribute]), attribute)(prog=name, description="What it does.")


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("show_all", [False, True])
def test_help_from_the_cache_is_the_parsers_and_names_each_flag_once(name, show_all, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    parser = parser_of(name)
    kept = start.rebuild(json.loads(json.dumps(start.describe(parser))), name, "What it does.")
    parser.show_all = kept.show_all = show_all
    text = parser.format_help()
    assert kept.format_help() == text
    flags = re.findall(r"^  (?:-\w, )?--([\w-]+)", text, re.M)
    assert len(flags) == len(set(flags))
    assert not [flag for flag in flags if "-" in flag or (flag.startswith("no_") and flag[3:] in flags)]
    for entry in re.split(r"\n(?=  --|\n)", text):
        assert entry.count("(default") <= 1, entry
        assert "default: None" not in entry
    assert "SUPPRESS" not in text


def unknown(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_gkd.py", "--lmbd", "0"])
    with pytest.raises(SystemExit) as stop:
        start.answer("train_gkd.py", "What it does.")
    assert (stop.value.code, capsys.readouterr().err[-12:]) == (2, "an --lmbda?\n")


DAMAGE = {
    "empty": lambda text: "",
    "torn": lambda text: text[: len(text) // 2],
    "other": lambda text: "[1, 2]",
    "deep": lambda text: "[" * 100_000,
    "a flag less": lambda text: text.replace('"--lmbda"', '"--lmbd"'),
    "no flags": lambda text: json.dumps({**json.loads(text), "flags": {}}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cache_is_made_anew(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unknown(monkeypatch, capsys)
    (path,) = (tmp_path / "gkd").iterdir()
    whole = path.read_text()
    path.write_text(damage(whole))
    unknown(monkeypatch, capsys)
    assert path.read_text() == whole
    assert list((tmp_path / "gkd").iterdir()) == [path]


def test_a_cache_of_other_versions_or_none_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unknown(monkeypatch, capsys)
    (path,) = (tmp_path / "gkd").iterdir()
    kept = json.loads(path.read_text())
    monkeypatch.setattr("gkd.cli.start.version", lambda library: "0.0.1")
    unknown(monkeypatch, capsys)
    assert json.loads(path.read_text()) == {**kept, "key": json.loads(path.read_text())["key"]}
    assert json.loads(path.read_text())["key"] != kept["key"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a folder that can't exist
    unknown(monkeypatch, capsys)


def test_a_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "run.yaml").write_text("teacher_cache: ~/cache\nchat_template_path: ~/t.jinja\n")
    words = "--model_name_or_path ~/m --dataset_name=~/d.json --output_dir=~/out --student_adapter ~/adapter"
    data, student, args = GKDParser().parse([*words.split(), "--config=~/run.yaml", "--teacher_adapter=~/a"])
    home = str(tmp_path)
    assert (data.dataset_name, student.model_name_or_path) == (f"{home}/d.json", f"{home}/m")
    assert (args.output_dir, student.student_adapter) == (f"{home}/out", f"{home}/adapter")
    assert (args.teacher_cache, args.chat_template_path) == (f"{home}/cache", f"{home}/t.jinja")
    assert args.teacher_adapter == f"{home}/a"
    evaluated = parser_of("eval_gkd.py").parse_one(
        "--models ~/a gpt2 --teacher_model_name_or_path=~/t --dataset_name ~/d.json --output_dir ~/o".split()
    )
    assert evaluated.models == [f"{home}/a", "gpt2"]
    assert evaluated.teacher_model_name_or_path == f"{home}/t"
    assert parsers.export_flags(["~/run", "--output_dir=~/x"], "").output_dir == tmp_path / "x"
    assert parsers.report_flags(["~/a", "~/b", "-o", "~/x"], "").runs == [f"{home}/a", f"{home}/b"]
    make_model(0).save_pretrained(tmp_path / "m")
    assert parsers.chat_flags(["--student=~/m", "--teacher", "~/m"], "").student == f"{home}/m"


@pytest.fixture
def places(tmp_path, saved):
    """Paths of the wrong kind for a flag."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    make_tokenizer().save_pretrained(tmp_path / "words")
    latin = json.dumps([*ROWS, {"prompt": "café"}], ensure_ascii=False, indent=0).encode("latin-1")
    for name in ("rows.json", "config.yaml", "template.jinja", "ds.json", "folder/train.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(latin)
    (tmp_path / "rows.csv").write_bytes("prompt,r\xe9ponse\na,b\n".encode("latin-1"))
    data = tmp_path / "good.json"
    data.write_text(json.dumps(ROWS))
    return {"tmp": tmp_path, "saved": saved, "data": data}


TRAIN = "--model_name_or_path {saved}/student --teacher_model_name_or_path {saved}/teacher --dataset_name {data} "
TRAIN += "--output_dir {tmp}/out --lmbda 0 --report_to none "
CACHE = TRAIN.replace("--lmbda 0 --report_to none ", "")
MODELS = {
    "student": (train_gkd, TRAIN + "--model_name_or_path {tmp}/no", "--model_name_or_path {tmp}/no: no such folder."),
    "teacher": (
        train_gkd,
        TRAIN + "--teacher_model_name_or_path ./no/such",
        "--teacher_model_name_or_path ./no/such: no such folder.",
    ),
    "empty folder": (
        train_gkd,
        TRAIN + "--model_name_or_path {tmp}/empty",
        "--model_name_or_path {tmp}/empty: no model in this folder, no config.json.",
    ),
    "tokenizer alone": (
        train_gkd,
        TRAIN + "--teacher_model_name_or_path {tmp}/words",
        "--teacher_model_name_or_path {tmp}/words: no model in this folder, no config.json.",
    ),
    "file": (
        train_gkd,
        TRAIN + "--model_name_or_path {tmp}/file",
        "--model_name_or_path {tmp}/file: a file. Give the",
    ),
    "perhaps on the hub": (
        train_gkd,
        TRAIN + "--model_name_or_path foo/bar",
        "--model_name_or_path foo/bar: its tokenizer can't be loaded: no model there, neither a folder of this name nor on "
        "the hub: ",
    ),
    "student's adapter": (
        train_gkd,
        TRAIN + "--student_adapter {tmp}/no",
        "--student_adapter {tmp}/no: no such folder.",
    ),
    "teacher's adapter": (
        train_gkd,
        TRAIN + "--teacher_adapter {tmp}/no",
        "--teacher_adapter {tmp}/no: no such folder.",
    ),
    "no adapter": (
        train_gkd,
        TRAIN + "--teacher_adapter {tmp}/empty",
        "--teacher_adapter {tmp}/empty: no adapter in this folder, no adapter_config.json.",
    ),
    "cache": (
        cache_teacher,
        CACHE + "--teacher_model_name_or_path {tmp}/no",
        "--teacher_model_name_or_path {tmp}/no: no such folder.",
    ),
    "chat": (chat, "--student {saved}/student --teacher {tmp}/no", "--teacher {tmp}/no: no such folder."),
    "shrink": (shrink, "{tmp}/no", "TEACHER {tmp}/no: no such folder."),
    "shrink, perhaps from the hub": (
        shrink,
        "foo/bar",
        "TEACHER foo/bar: no model there, neither a folder of this name nor on the hub: ",
    ),
    "tokenizer": (
        convert_data,
        "{data} -o {tmp}/o.json --tokenizer {tmp}/no",
        "--tokenizer {tmp}/no: no such folder.",
    ),
    "tokenizer, a file": (
        convert_data,
        "{data} -o {tmp}/o.json --tokenizer {data}",
        "--tokenizer {data}: a file. Give the folder",
    ),
    "export": (export_model, "{tmp}/no -o {tmp}/out --device cpu", "{tmp}/no: no such folder."),
}
TEXT = {
    "JSON": (train_gkd, TRAIN + "--dataset_name {tmp}/rows.json", "{tmp}/rows.json"),
    "CSV": (train_gkd, TRAIN + "--dataset_name {tmp}/rows.csv", "{tmp}/rows.csv"),
    "folder": (train_gkd, TRAIN + "--dataset_name {tmp}/folder", "{tmp}/folder/train.json"),
    "YAML": (train_gkd, TRAIN + "--config {tmp}/config.yaml", "{tmp}/config.yaml"),
    "template": (train_gkd, TRAIN + "--chat_template_path {tmp}/template.jinja", "{tmp}/template.jinja"),
    "accelerator": (train_gkd, TRAIN + "--accelerator_config {tmp}/ds.json", "{tmp}/ds.json"),
}
OUTPUT = {
    "train": (train_gkd, TRAIN + "--output_dir {tmp}/file/out", "--output_dir {tmp}/file/out: {tmp}/file is a file"),
    "texts": (
        train_gkd,
        TRAIN + "--teacher_text_cache {tmp}/file",
        "--teacher_text_cache {tmp}/file: {tmp}/file is a",
    ),
    "cache": (cache_teacher, CACHE + "--output_dir {tmp}/file", "--output_dir {tmp}/file: {tmp}/file is a file"),
    "export": (export_model, "{saved}/student -o {tmp}/file/x", "--output_dir {tmp}/file/x: {tmp}/file is a file"),
    "report": (report, "{tmp} -o {tmp}/file", "--output_dir {tmp}/file: {tmp}/file is a file"),
}
CASES = MODELS | {f"text: {name}": (p, w, f"{m} is not UTF-8 text: byte ") for name, (p, w, m) in TEXT.items()}
CASES |= {f"output: {name}": case for name, case in OUTPUT.items()}


@pytest.mark.parametrize(("program", "words", "message"), CASES.values(), ids=CASES.keys())
def test_a_wrong_path_is_named_in_one_line(places, capsys, monkeypatch, program, words, message):
    monkeypatch.setattr("gkd.models.loading.load_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        program.main(words.format(**places).split())
    said = capsys.readouterr().err if isinstance(stop.value.code, int) else str(stop.value.code)
    last = said.strip().splitlines()[-1]
    assert message.format(**places) in last
    assert re.match(r"[\w. -]+?: (error: )?" + re.escape(message.format(**places)[:12]), last)
    assert "Repo id must be" not in said


@pytest.mark.parametrize(
    ("program", "words", "called"),
    [
        (train_gkd, [*TRAIN.split(), "--eval_dataset_name", ""], "--eval_dataset_name"),
        (train_gkd, [*TRAIN.split(), "--dataset_name=", "--seed", "1"], "--dataset_name"),
        (cache_teacher, [*CACHE.split(), "--output_dir", ""], "--output_dir"),
        (eval_gkd, [""], "--run"),
        (eval_gkd, ["--models", "a", "", "--seed", "1"], "--models"),
        (convert_data, ["-o", "out.json", ""], "IN"),
        (convert_data, ["in.json", "-o", ""], "--output"),
        (export_model, ["run", "--output_dir", ""], "--output_dir"),
        (report, ["a", ""], "RUN"),
    ],
)
def test_an_empty_path_is_refused(capsys, program, words, called):
    with pytest.raises(SystemExit) as stop:
        program.main(words)
    assert stop.value.code == 2
    assert f"error: {called}: an empty name; give a file or a folder." in capsys.readouterr().err


def test_a_folder_without_permission_is_named(tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root ignores permissions
    try:
        with pytest.raises(SystemExit):
            parsers.export_flags([str(tmp_path), "-o", str(locked / "out")], "")
    finally:
        os.seteuid(user)
    said = capsys.readouterr().err
    assert re.search(
        rf"--output_dir {re.escape(str(locked))}/out: nothing can be written to .*: Permission denied\.", said
    )


def test_a_single_dash_is_no_flag(capsys):
    with pytest.raises(SystemExit, match="2"):
        parser_of("eval_gkd.py").parse_one(["-models", "a"])
    assert "unknown flag -models. Did you mean --models?" in capsys.readouterr().err


def test_a_bare_switch_means_yes_in_every_command(tmp_path):
    words = f"--models a --teacher_model_name_or_path t --dataset_name d --output_dir {tmp_path} --system_as_user"
    assert parser_of("eval_gkd.py").parse_one(words.split()).system_as_user is True
