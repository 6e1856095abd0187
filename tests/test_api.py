"""What `import gkd` offers to programs."""

import json
import subprocess
import sys

import pytest
from tiny import REPO, ROWS

import gkd
from gkd.compat import GKDConfig, StockGKDTrainer

# What a program for TRL's trainer looks like, with models loaded by name and all else left at its default.
PROGRAM = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

tokenizer = AutoTokenizer.from_pretrained("{models}/student")
model = AutoModelForCausalLM.from_pretrained("{models}/student")
teacher_model = AutoModelForCausalLM.from_pretrained("{models}/teacher")


def talk(question, answer):
    turns = [dict(role="user", content=question), dict(role="assistant", content=answer)]
    return Dataset.from_dict(dict(messages=[turns] * 4))


training_args = GKDConfig(output_dir="{out}", per_device_train_batch_size=1)
trainer = GKDTrainer(
    model=model,
    teacher_model=teacher_model,
    args=training_args,
    processing_class=tokenizer,
    train_dataset=talk("What is the capital of France?", "Paris."),
    eval_dataset=talk("And of Italy?", "It is Rome."),
)
trainer.train()
"""


def test_it_stands_in_for_trls_by_one_line(saved, tmp_path):
    program = PROGRAM.replace("trl.experimental.gkd", "gkd").format(models=saved, out=tmp_path / "out")
    names = {"__name__": "program"}
    exec(program, names)
    trainer = names["trainer"]
    assert isinstance(trainer, StockGKDTrainer)
    assert isinstance(trainer.args, GKDConfig)
    assert type(trainer) is gkd.GKDTrainer
    assert trainer.state.global_step == 12  # three epochs of four rows
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert (tmp_path / "out/checkpoint-12/model.safetensors").is_file()


def test_names_load_their_modules_when_they_are_asked_for():
    program = "import sys, gkd\nassert not {'torch', 'transformers', 'numpy'} & sys.modules.keys(), 'at once'\n"
    program += "for name in gkd.__all__:\n    getattr(gkd, name)\n"
    program += "from gkd import *\nassert GKDConfig.__mro__ and callable(export) and 'torch' in sys.modules\n"
    program += "assert set(gkd.__all__) <= set(dir(gkd)) and not hasattr(gkd, 'trainer')"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPO)


def test_evaluating_and_exporting_are_functions(saved, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    options = {"dataset_name": str(tmp_path / "rows.json"), "max_length": 64, "max_new_tokens": 4, "max_rows": 2}
    options |= {"teacher_model_name_or_path": str(saved / "teacher"), "output_dir": str(tmp_path / "out")}
    results = gkd.evaluate([saved / "student"], **options)
    assert [result["rows"] for result in results] == [2, 2]
    assert results[0]["metrics"]["dataset/forward_kl"]["value"] > 0
    assert (tmp_path / "out/report.html").is_file()
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="no such folder"):
        gkd.evaluate(tmp_path / "nowhere")

    exported = gkd.export(saved / "student", tmp_path / "model", device="cpu", dtype="bfloat16")
    assert exported.dtype == "bfloat16"
    assert (tmp_path / "model/README.md").is_file()
    with pytest.raises(ValueError, match="is not an empty folder"):
        gkd.export(saved / "student", tmp_path / "model")
