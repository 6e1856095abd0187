"""The task of the claim at length: pack an order into a box, one item a line, and write out the whole box behind each.

    user:       Pack the order, one item a line.
                order: fig1 nut2 tea0
                box: fig0 nut0 tea0
    assistant:  + nut: fig0 nut1 tea0
                + fig: fig1 nut1 tea0
                + nut: fig1 nut2 tea0
                done

Any order of the items will do. A clean answer packs an empty box and only ever adds what is missing, so whoever has read
nothing else has never seen a box with too much in it, nor an item taken out: "- fig: fig0 nut2 tea0".

    python experiments/claim/packing.py runs/claim_long/10/data --items 10 --train 1000
    python experiments/claim/packing.py runs/claim_long/data --teacher runs/claim_long/base --items 5 10 20

The first writes the student's data, the second, in teacher/train.jsonl, what the teacher is tuned on; the same bytes each time.

    train.jsonl      clean answers, what users have
    prompts.jsonl    the same prompts as chats whose answer is empty
    perturbed.jsonl  half of them, and as many from a wrongly packed box: does given text that shows how to mend do as well?
    held_out.jsonl   for evaluation: boxes empty at the start, orders that no other file has
    probe.jsonl      for --lmbda auto to look at: the same, other orders again
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

# One token each in SmolLM2's vocabulary.
GOODS = (
    "apple pear plum fig lime nut tea egg jam pie rice salt milk corn bean kale beet mint soup cake bread honey lemon grape"
).split()
KINDS = 12  # on the shelf of a row; a line has 28 of SmolLM2's tokens then
MOST = 9  # of a kind in a box: a count has one digit
SEED = 1
HELD_OUT, PROBE, TEACHER = 1500, 128, 32_000  # rows
QUESTION = "Pack the order, one item a line.\norder: {}\nbox: {}"
MOVE = re.compile(r"([+-]) (\w+): (.*)")

Counts = list[int]
Move = tuple[int, int]  # +1 or -1, and of which kind on the shelf


class Row(NamedTuple):
    """`lines` of the answer; the first `given` characters go astray: to be gone on from, not to be learnt."""

    names: list[str]
    order: Counts
    box: Counts
    lines: list[str]
    given: int = 0

    @property
    def answer(self) -> str:
        return "\n".join(self.lines)

    def last_box(self) -> Counts:
        """As the last line says, or as it was at the start; a new list."""
        return _box_behind(self.lines[-1]) if self.lines else list(self.box)

    @property
    def question(self) -> str:
        return QUESTION.format(written(self.names, self.order), written(self.names, self.box))


def written(names: list[str], counts: Counts) -> str:
    return " ".join(f"{name}{count}" for name, count in zip(names, counts, strict=True))


def _box_behind(line: str) -> Counts:
    return [int(count) for count in re.findall(r"\d", line)]


def right_moves(box: Counts, order: Counts) -> list[Move]:
    """What brings the box nearer to the order: what is too much goes out first; none where it is packed."""
    out = [(-1, kind) for kind, (has, wanted) in enumerate(zip(box, order, strict=True)) if has > wanted]
    return out or [(1, kind) for kind, (has, wanted) in enumerate(zip(box, order, strict=True)) if has < wanted]


def wrong_moves(box: Counts, order: Counts) -> list[Move]:
    """Legal ones that lead away: one too many, or one out that is needed."""
    pairs = list(enumerate(zip(box, order, strict=True)))
    add = [(1, kind) for kind, (has, wanted) in pairs if wanted <= has < MOST]
    return add + [(-1, kind) for kind, (has, wanted) in pairs if 0 < has <= wanted]


def _walk(row: Row, choose: Callable[[Counts, Counts], list[Move]], steps: int | None, draw: random.Random) -> Row:
    """The row with so many random moves more of those that `choose` allows, or all until there is none."""
    lines = list(row.lines)
    box = row.last_box()
    for _ in itertools.count() if steps is None else range(steps):
        moves = choose(box, row.order)
        if not moves:
            break
        sign, kind = draw.choice(moves)
        box[kind] += sign
        lines.append(f"{'+' if sign > 0 else '-'} {row.names[kind]}: {written(row.names, box)}")
    return row._replace(lines=lines)


def _finished(row: Row, draw: random.Random) -> Row:
    row = _walk(row, right_moves, None, draw)
    return row._replace(lines=[*row.lines, "done"])


def _begun(items: int, kinds: int, draw: random.Random) -> Row:
    """An order of so many items, each of any kind on the shelf, and an empty box."""
    names, order = draw.sample(GOODS, kinds), [0] * kinds
    for _ in range(items):
        order[draw.choice([kind for kind in range(kinds) if order[kind] < MOST])] += 1
    return Row(names, order, [0] * kinds, [])


def clean(items: int, kinds: int, draw: random.Random) -> Row:
    """From an empty box, right moves alone."""
    return _finished(_begun(items, kinds, draw), draw)


def _astray(items: int, kinds: int, draw: random.Random) -> Row:
    """Begun with some right moves and one to three wrong ones behind them, in three of ten rows again."""
    while True:
        row = _begun(items, kinds, draw)
        for most in (items, 4)[: 1 + (draw.random() < 0.3)]:
            right = _walk(row, right_moves, draw.randint(0, most), draw)
            row = _walk(right, wrong_moves, draw.randint(1, 3), draw)
        if len(row.lines) > len(right.lines):  # where each kind is wanted, an empty box has no wrong move
            return row


def recovery(items: int, kinds: int, draw: random.Random) -> Row:
    """From an empty box, gone astray, and right from there on.

    The box that the last wrong move leads to is to be learnt: who goes on behind a wrong move has to write it first.
    """
    row = _astray(items, kinds, draw)
    return _finished(row._replace(given=len(row.answer) - len(row.lines[-1]) + row.lines[-1].index(":")), draw)


def garbled(items: int, kinds: int, draw: random.Random) -> Row:
    """From an empty box, some right moves, then one to six lines whose box does not follow, and right from the last one on.

    A student that has just learnt to take something out writes such lines, and many alike: a teacher that has seen none goes
    along with them. Where the box stays as it was, the next such line often is the same again.
    """
    row = _walk(_begun(items, kinds, draw), right_moves, draw.randint(0, items), draw)
    lines, box = list(row.lines), row.last_box()
    sign, kind, step = draw.choice("+--"), draw.randrange(kinds), 0
    for number in range(draw.randint(1, 6)):
        if number == 0 or draw.random() < 0.4:
            sign, kind, step = draw.choice("+--"), draw.randrange(kinds), draw.choice((0, 1, 1, 2))
        wrong = kind if draw.random() < 0.7 else draw.randrange(kinds)  # of what the count is wrong
        change = -step if sign == "+" else step
        if wrong != kind:
            change = draw.choice((-1, 1))
        box[wrong] = min(max(box[wrong] + change, 0), MOST)
        lines.append(f"{sign} {row.names[kind]}: {written(row.names, box)}")
    row = row._replace(lines=lines)
    return _finished(row._replace(given=len(row.answer) + 1), draw)


def perturbed(items: int, kinds: int, draw: random.Random) -> Row:
    """From a box with too much of something, right moves alone."""
    while True:
        row = _astray(items, kinds, draw)
        box = _box_behind(row.lines[-1])
        if any(has > wanted for has, wanted in zip(box, row.order, strict=True)):
            return _finished(row._replace(box=box, lines=[]), draw)


def solved(completion: str, row: dict) -> float:
    """1.0 if the answer packs the order, else 0.0: for --scorer.

    Each line has to be a legal move, with the box that it leads to, and the last says "done" when the box holds the order
    and nothing else. A move that leads away and is taken back costs only its lines.
    """
    known = json.loads(row["metadata"])
    names, box = known["names"], list(known["box"])
    *lines, last = completion.rstrip().split("\n")
    for line in lines:
        move = MOVE.fullmatch(line)
        if move is None or move[2] not in names:
            return 0.0
        kind = names.index(move[2])
        box[kind] += 1 if move[1] == "+" else -1
        if not 0 <= box[kind] <= MOST or move[3] != written(names, box):
            return 0.0
    return float(last == "done" and box == known["order"])


def rows_of(make: Callable[[int, int, random.Random], Row], items: int, kinds: int, name: str) -> Iterator[Row]:
    """Rows without end, the same for a name each time."""
    draw = random.Random(f"{SEED} {name} {items} {kinds}")
    while True:
        yield make(items, kinds, draw)


def as_chat(row: Row) -> dict:
    known = {"source_dataset": f"packing_{sum(row.order)}", "names": row.names, "order": row.order, "box": row.box}
    return {
        "prompt": [{"role": "user", "content": row.question}],
        "completion": [{"role": "assistant", "content": row.answer}],
        "metadata": json.dumps(known),
    }


def as_text(row: Row, tokenizer) -> dict:
    """With the chat's template around it, and in the prompt what is given, on which SFT does not train."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row.question}], tokenize=False, add_generation_prompt=True
    )
    return {"prompt": prompt + row.answer[: row.given], "completion": row.answer[row.given :]}


def student_files(items: int, kinds: int, train: int) -> dict[str, list[dict]]:
    """Rows by file. Fewer for training leave those held out as they are."""
    streams = {name: rows_of(clean, items, kinds, name) for name in ("held_out", "probe", "train")}
    held_out = list(itertools.islice(streams["held_out"], HELD_OUT))
    kept = {row.question for row in held_out}
    probe = list(itertools.islice((row for row in streams["probe"] if row.question not in kept), PROBE))
    kept |= {row.question for row in probe}
    given = list(itertools.islice((row for row in streams["train"] if row.question not in kept), train))
    chats = [as_chat(row) for row in given]
    wrong = rows_of(perturbed, items, kinds, "perturbed")
    empty = [{"role": "assistant", "content": ""}]
    return {
        "held_out": [as_chat(row) for row in held_out],
        "probe": [as_chat(row) for row in probe],
        "train": chats,
        "prompts": [{"messages": chat["prompt"] + empty} for chat in chats],
        "perturbed": [*chats[: train // 2], *(as_chat(row) for row in itertools.islice(wrong, train - train // 2))],
    }


MAKERS = {make.__name__: make for make in (clean, recovery, perturbed, garbled)}


def teacher_rows(
    items: list[int], kinds: int, count: int, tokenizer, names: Sequence[str] = tuple(MAKERS)
) -> list[dict]:
    """As many of each of MAKERS that is named."""
    makers = [MAKERS[name] for name in names]
    streams = itertools.cycle(rows_of(make, number, kinds, f"teacher {place}") for number in items for place, make in enumerate(makers))  # fmt: skip
    rows = [as_text(next(stream), tokenizer) for stream in itertools.islice(streams, count)]
    random.Random(SEED).shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, nargs="+", required=True, help="of an order: how long answers are")
    parser.add_argument("--kinds", type=int, default=KINDS, help="of goods: how long a line is")
    parser.add_argument("--train", type=int, default=1000, help="rows for the student")
    parser.add_argument("--teacher", type=Path, help="write the teacher's rows, in the chat template of this model")
    parser.add_argument("--rows", nargs="+", choices=MAKERS, default=tuple(MAKERS), help="kinds of the teacher's")
    args = parser.parse_args()
    if args.teacher:
        tokenizer = AutoTokenizer.from_pretrained(args.teacher)
        files = {"teacher/train": teacher_rows(args.items, args.kinds, TEACHER, tokenizer, args.rows)}
    else:
        (items,) = args.items
        files = student_files(items, args.kinds, args.train)
    for name, rows in files.items():
        path = args.out / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
