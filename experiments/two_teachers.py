"""Rows of two small tasks: a date in digits, and a person as JSON. `python experiments/two_teachers.py OUT`

    dates    When is the meeting, 3 March 2021? Answer in digits.                  03/03/2021
    people   As JSON: Anna, 34, from Lisbon                                        {"name": "Anna", "age": 34, "city": "Lisbon"}

writes OUT/dates/train.jsonl and OUT/people/train.jsonl, on which a teacher each is tuned; OUT/prompts.jsonl, prompts of both without
answers, of which each names its teacher; and OUT/held_out.jsonl, other rows of both. The same bytes each time.
"""

import argparse
import json
import random
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

from gkd.io.files import write_whole

NAMES = "Anna Ben Carla David Emma Felix Grace Henry Ida Jack Karen Leo Maria Noah Olivia Peter Rosa Simon Tina Victor".split()
CITIES = (
    "Lisbon Oslo Rome Paris Vienna Dublin Athens Madrid Berlin Prague London Warsaw Helsinki Boston Cairo Lima".split()
)
EVENTS = [
    "the meeting",
    "the concert",
    "the exam",
    "our flight",
    "the wedding",
    "the deadline",
    "the match",
    "the party",
]
TUNING, TRAIN, HELD_OUT = 1200, 600, 100  # rows of each task
Draw = random.Random


def dates(draw: Draw) -> tuple[str, str]:
    """Question and answer."""
    day = date(1950, 1, 1) + timedelta(days=draw.randrange(36_000))
    return f"When is {draw.choice(EVENTS)}, {day.day} {day:%B %Y}? Answer in digits.", f"{day:%d/%m/%Y}"


def people(draw: Draw) -> tuple[str, str]:
    name, age, city = draw.choice(NAMES), draw.randint(18, 90), draw.choice(CITIES)
    return f"As JSON: {name}, {age}, from {city}", json.dumps({"name": name, "age": age, "city": city})


TASKS: dict[str, Callable[[Draw], tuple[str, str]]] = {"dates": dates, "people": people}


def solved(completion: str, row: dict) -> float:
    """1.0 for the answer, character by character, else 0.0: for --scorer."""
    return float(completion.strip() == json.loads(row["metadata"])["answer"])


def rows_of(task: str) -> dict[str, list[dict]]:
    """The rows of each file, no question twice."""
    draw, pairs = random.Random(f"1 {task}"), {}
    while len(pairs) < TUNING + TRAIN + HELD_OUT:
        pairs.setdefault(*TASKS[task](draw))
    chats = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
            "teacher": task,
            "metadata": json.dumps({"source_dataset": task, "answer": answer}),
        }
        for question, answer in pairs.items()
    ]
    tuning, train, held_out = chats[:TUNING], chats[TUNING:-HELD_OUT], chats[-HELD_OUT:]
    return {
        f"{task}/train": [{name: row[name] for name in ("prompt", "completion")} for row in tuning],
        "prompts": [{name: row[name] for name in ("prompt", "teacher")} for row in train],
        "held_out": held_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out, files = parser.parse_args().out, {}
    for task in TASKS:
        for name, rows in rows_of(task).items():
            files.setdefault(name, []).extend(rows)
    for name, rows in files.items():
        path = out / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(f"{json.dumps(row)}\n" for row in rows))
        print(f"{path}: {len(rows)} rows.")


if __name__ == "__main__":
    main()
