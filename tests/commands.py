"""Command lines of short runs on the pair of tiny models, for tests that start the commands as a user does."""

import json

from tiny import REPO, ROWS

ANSWERS = REPO / "data/sample_answers.json"
FAST = [
    *("--max_new_tokens", "8", "--max_length", "200", "--per_device_train_batch_size", "1"),
    *("--logging_steps", "1", "--report_to", "none", "--learning_rate", "1e-3", "--disable_tqdm", "True"),
]


def command(saved, data, out, *flags):
    models = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    return [str(word) for word in (*models, "--dataset_name", data, "--output_dir", out, *FAST, *flags)]


# One row without an answer: the teacher's stands in.
HELD_OUT = [*ROWS, {"prompt": [{"role": "user", "content": "and what now?"}]}]
NEW, LENGTH, BETA = 7, 120, 0.3


def write_rows(folder):
    """The folder, now with the files that `flags` names."""
    (folder / "train.json").write_text(json.dumps(ROWS))
    (folder / "held_out.json").write_text(json.dumps(HELD_OUT))
    return folder


def flags(saved, data, out, *more):
    """Two steps on the rows of the folder `data`, and an evaluation on its held-out rows."""
    models = ("--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher")
    files = ("--dataset_name", data / "train.json", "--eval_dataset_name", data / "held_out.json", "--output_dir", out)
    sizes = ("--max_new_tokens", NEW, "--max_length", LENGTH, "--per_device_eval_batch_size", 2, "--beta", BETA)
    steps = (
        "--max_steps",
        2,
        "--logging_steps",
        1,
        "--learning_rate",
        5e-3,
        "--report_to",
        "none",
        "--preflight",
        "off",
    )
    return [str(word) for word in (*models, *files, *sizes, *steps, "--disable_tqdm", "True", *more)]
