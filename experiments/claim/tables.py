"""Tables and pictures of the claim from its results.

python experiments/claim/tables.py runs/claim/results           # of your own run
python experiments/claim/tables.py --write                      # of results/*/ beside this, into experiments/RESULTS.md
"""

import argparse
import dataclasses
import functools
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gkd.io.files import new_figure, save_figure, write_whole

HERE = Path(__file__).parent
RESULTS, REPORT = HERE / "results", HERE.parent / "RESULTS.md"
STEPS, LEARNING_RATE = 300, "3e-4"  # of a cell whose flags or name have no other, as in claim.sh
STARTS = {  # by their folder
    "rows_200": "few rows",
    "warm_up_250": "250 steps of SFT",
    "warm_up_1000": "1,000 steps of SFT",
    "warm_up_1000_h200": "1,000 steps of SFT, H200",
    "long_10": "the long task",
    "long_10_guard": "the long task, guarded",
}
TIMED = {
    "rows_200": "warm_up_250",
    "warm_up_1000": "warm_up_250",
    "long_10_guard": "long_10",
}  # steps that take as long
BASELINE = "supervised_forward"
CLAIMED = (
    *("on_policy_jsd", "on_policy_reverse", "mixed_jsd", "mixed_reverse", "mixed_forward"),
    *("auto_forward", "auto_jsd", "auto_reverse"),
)
KINDS = ("sampled", "greedy")
AUTO = "auto"  # λ of runs that decide it
ALIKE = 0.15  # by how much seconds may differ that are called equal
DRAWS = 2000  # of the bootstrap
SHOWN = (
    "on_policy_reverse",
    "on_policy_jsd",
    "mixed_jsd",
    "supervised_forward",
    "sft",
    "on_policy_jsd_longer",
    "supervised_forward_longer",
    "supervised_jsd_longer",
)


Clock = tuple[bool, str, bool, bool]  # what seconds depend on: is it TRL's trainer, λ, does the teacher write, LoRA


@dataclasses.dataclass
class Cell:
    """All seeds of a cell. `kind`: `sampled` (temperature 1) or `greedy` text."""

    name: str
    seeds: list[dict]  # with the `run` that each is of and that run's `start`
    spreads: dict[str, tuple[float, int]]  # by kind: of the accuracy between seeds, see `spread_of`
    lost: tuple[str, ...] = ()  # the runs of more seeds, which solved nothing any more in the end

    @functools.cached_property
    def means(self) -> dict[str, dict]:
        """By kind, see `mean_of`."""
        return {kind: mean_of([seed[kind] for seed in self.seeds]) for kind in KINDS}

    def mean(self, kind: str, figure: str = "accuracy") -> float:
        return self.means[kind][figure]

    def start(self, kind: str) -> float:
        """Accuracy of the students that its seeds start from."""
        return statistics.mean(seed["start"]["student"][kind]["accuracy"] for seed in self.seeds)

    def gain(self, kind: str) -> float:
        """Of the accuracy over the student at the start."""
        return self.mean(kind) - self.start(kind)

    def gains(self, kind: str) -> np.ndarray:
        """Draws of `gain`, (DRAWS,): a bootstrap over rows, the same for all cells, and noise for its number of seeds."""
        before = np.mean([seed["start"]["student"][kind]["solved"] for seed in self.seeds], axis=0)
        change = self.means[kind]["solved"] - before
        spread, degrees = self.spreads[kind]
        noise = np.random.default_rng(list(self.name.encode())).standard_t(max(degrees, 1), DRAWS)
        return _row_shares(len(change)) @ change + spread * noise / len(self.seeds) ** 0.5

    @property
    def count(self) -> str:
        """Of its seeds."""
        return f"{len(self.seeds)} of {len(self.seeds) + len(self.lost)}" if self.lost else str(len(self.seeds))

    @property
    def runs(self) -> set[str]:
        return {seed["run"] for seed in self.seeds}

    def within(self, runs: set[str]) -> "Cell":
        if self.runs.union(self.lost) <= runs:
            return self  # with the means that it has made
        seeds = [seed for seed in self.seeds if seed["run"] in runs]
        return dataclasses.replace(self, seeds=seeds, lost=tuple(run for run in self.lost if run in runs))

    @property
    def flags(self) -> str:
        return self.seeds[0]["flags"]

    @property
    def steps(self) -> int:
        return self.seeds[0]["steps"]

    @property
    def clock(self) -> Clock:
        return clock_of(self.seeds[0])

    def seconds(self, clocks: dict[Clock, float]) -> float:
        """Of all its steps on a GPU to itself; nan where none of its kind was timed so."""
        stock, lmbda, *more = self.clock
        if self.clock in clocks:
            return self.steps * clocks[self.clock]
        supervised, on_policy = (clocks.get((stock, kind, *more), float("nan")) for kind in "01")
        if lmbda != AUTO:
            share = float(lmbda)
            return self.steps * (share * on_policy + (1 - share) * supervised)
        found = [on_policy_steps(seed) for seed in self.seeds]
        return statistics.mean(on * on_policy + (self.steps - steps) * supervised for on, steps in found)

    @property
    def variant(self) -> str:
        """What ends its name where it trains longer than most cells or at another learning rate: `_longer`, `_lr_X`."""
        return re.search(r"(_longer)?(_lr_.*)?$", self.name)[0]

    @property
    def rate(self) -> str:
        """Its learning rate."""
        return self.variant.partition("_lr_")[2] or LEARNING_RATE

    @property
    def baseline(self) -> str:
        """The name of supervised KD with as many steps at the same learning rate."""
        return BASELINE + self.variant

    def curve(self) -> tuple[list[int], list[float]]:
        """Steps, and the accuracy of sampled text after them."""
        points = [{point["step"]: point["accuracy"] for point in seed["curve"]} for seed in self.seeds]
        points = [{0: self.start("sampled")} | point for point in points]
        steps = sorted(set.intersection(*(set(point) for point in points)))
        return steps, [statistics.mean(point[step] for point in points) for step in steps]

    def steps_to(self, accuracy: float) -> float:
        """Steps until sampled text is so accurate, on straight lines between the measurements; nan if it never is."""
        for (before, low), (after, high) in itertools.pairwise(zip(*self.curve(), strict=True)):
            if low < accuracy <= high:
                return before + (after - before) * (accuracy - low) / (high - low)
        return float("nan")


def clock_of(record: dict) -> Clock:
    stock, lmbda = record["cell"].startswith("stock_"), re.search(r"--lmbda (\S+)", record["flags"])[1]
    return stock, lmbda, "--seq_kd" in record["flags"], "--use_peft" in record["flags"]


def on_policy_steps(record: dict) -> tuple[float, float]:
    """What a run of --lmbda auto took of on-policy steps' time, and how many it made.

    A measurement at the start, one before and one behind each probe, and one where it decides write and read 128 rows: each counts
    as a step of 64, which trains on them too.
    """
    since, probes = (
        int(max((log.get(name, 0) for log in record["training"]), default=0))
        for name in ("lmbda_since", "lmbda_probes")
    )
    since = since or record["steps"]
    interval = int(re.search(r"--lmbda_probe_steps (\d+)", record["flags"])[1])
    steps = probes * (interval // 8) + (record["steps"] - since) / 2
    return steps + 2 * probes + 2, steps


@functools.cache
def _row_shares(rows: int) -> np.ndarray:
    """How much of a draw each row is, (DRAWS, rows)."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=DRAWS) / rows


def _bits(found: dict) -> np.ndarray:
    return np.array([int(bit) for bit in f"{int(found['solved'], 16):0{found['rows']}b}"])


def mean_of(seeds: list[dict]) -> dict:
    """Means over seeds of what collect.py measured, and of `solved` as numbers, (rows,)."""
    found = {key: statistics.mean(seed[key] for seed in seeds) for key in seeds[0] if key not in ("solved", "tasks")}
    tasks = {task: statistics.mean(seed["tasks"][task] for seed in seeds) for task in seeds[0]["tasks"]}
    return {**found, "tasks": tasks, "solved": np.mean([_bits(seed) for seed in seeds], axis=0)}


Grid = tuple[dict, dict[str, Cell]]  # what its cells start from, the mean of all measurements, and they by name


def start_of(starts: list[dict]) -> dict:
    """Means over their seeds, by model and kind."""
    return {
        model: {kind: mean_of([start[model][kind] for start in starts]) for kind in KINDS}
        for model in ("student", "teacher")
    }


def spread_of(groups: Iterable[list[dict]], kind: str) -> tuple[float, int]:
    """Standard deviation of the accuracy between seeds of a cell in a run, pooled over all such with the same tasks, and its degrees
    of freedom.

    It holds the noise of sampling too, which the bootstrap over rows has already: intervals are rather too wide.
    """
    squares, degrees = 0.0, 0
    for seeds in groups:
        found = [seed[kind]["accuracy"] for seed in seeds]
        squares += sum((accuracy - statistics.mean(found)) ** 2 for accuracy in found)
        degrees += len(found) - 1
    return (squares / max(degrees, 1)) ** 0.5, degrees


def is_lost(record: dict) -> bool:
    """Whether the student solves nothing any more, which is another end than those that a mean and a spread describe."""
    return all(record[kind]["accuracy"] == 0 for kind in KINDS)


def records_of(folder: Path) -> Iterator[tuple[str, list[dict]]]:
    """Name and records of each run that the folder has."""
    for path in sorted(folder.glob("*.jsonl")):
        yield path.stem, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(folders: Iterable[Path]) -> dict[str, Grid]:
    """By the folders' names, the weakest start first; cells are in the order of their list, as far as they were measured.

    A folder holds a file of results, or several, of runs that each made their teacher and student anew.
    """
    listed = [
        line.split()[0] for name in ("cells.txt", "long_cells.txt") for line in (HERE / name).read_text().splitlines()
    ]
    order = {cell: place for place, cell in reversed([*enumerate(listed)])}  # its first place
    starts: dict[str, list[dict]] = {}
    groups: dict[tuple[str, str, str], list[dict]] = {}  # seeds by folder, cell and run
    for folder in folders:
        for run, records in records_of(folder):
            records.sort(key=lambda record: f"{record['cell']}-{record['seed']}")  # whichever ended first
            of_run = [record for record in records if record["cell"] == "start"]
            if not of_run:
                raise SystemExit(f"{folder}/{run}.jsonl: no start yet; experiments/claim.sh makes it.")
            starts.setdefault(folder.name, []).extend(of_run)
            begin = {"run": run, "start": start_of(of_run)}
            for record in records:
                if "sampled" in record:
                    groups.setdefault((folder.name, record["cell"], run), []).append(record | begin)
        if folder.name not in starts:
            raise SystemExit(f"{folder}: no start yet; experiments/claim.sh makes it.")
    ended = {
        group[:2] for group, seeds in groups.items() if not all(map(is_lost, seeds))
    }  # cells with a seed that is not
    kept = {
        group: [seed for seed in seeds if group[:2] not in ended or not is_lost(seed)]
        for group, seeds in groups.items()
    }
    tasks = {folder: "\n".join(sorted(found[0]["student"]["sampled"]["tasks"])) for folder, found in starts.items()}

    @functools.cache
    def spreads_of(of_tasks: str) -> dict[str, tuple[float, int]]:
        alike = [seeds for (folder, *_), seeds in kept.items() if seeds and tasks[folder] == of_tasks]
        return {kind: spread_of(alike, kind) for kind in KINDS}

    grids: dict[str, Grid] = {folder: (start_of(found), {}) for folder, found in starts.items()}
    for folder, name, run in sorted(groups, key=lambda group: order.get(group[1], len(listed))):
        cell = grids[folder][1].setdefault(name, Cell(name, [], spreads_of(tasks[folder])))
        cell.seeds.extend(kept[folder, name, run])
        cell.lost += (run,) * (len(groups[folder, name, run]) - len(kept[folder, name, run]))
    return dict(sorted(grids.items(), key=lambda item: item[1][0]["student"]["sampled"]["accuracy"]))


def seconds_per_step(folders: Iterable[Path]) -> dict[str, dict[Clock, float]]:
    """By folder and `clock_of`, of its cells that had a GPU to themselves, or those of the folder that TIMED names."""
    found: dict[str, dict[Clock, list[float]]] = {}
    for folder in folders:
        clocks = found.setdefault(folder.name, {})
        for record in (record for _, records in records_of(folder) for record in records if record.get("jobs") == 1):
            clocks.setdefault(clock_of(record), []).append(record["seconds_per_step"])
    medians = {
        name: {clock: statistics.median(seconds) for clock, seconds in of.items()} for name, of in found.items()
    }
    return {name: medians.get(TIMED.get(name, name), {}) for name in found}


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def bounds(draws: np.ndarray) -> tuple[float, float]:
    """Of the 95 % interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return low, high


def with_interval(value: float, draws: np.ndarray) -> str:
    """In percentage points, with its 95 % interval."""
    low, high = bounds(draws)
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def gain(cell: Cell, kind: str) -> str:
    return with_interval(cell.gain(kind), cell.gains(kind))


def matched(cell: Cell, other: Cell) -> tuple[Cell, Cell, str]:
    """Both in the runs that both have, and no mark; as they are, and a mark, where they have none in common."""
    runs = cell.runs & other.runs
    return (cell.within(runs), other.within(runs), "") if runs else (cell, other, " †")


def minus(cell: Cell, other: Cell | None, kind: str) -> str:
    """The cell's gain less that of another, see `matched`; nothing where there is no other."""
    if other is None or other is cell:
        return ""
    cell, other, mark = matched(cell, other)
    return with_interval(cell.gain(kind) - other.gain(kind), cell.gains(kind) - other.gains(kind)) + mark


def ratio(cell: Cell, other: Cell, kind: str) -> str:
    """Of the gains, see `matched`, with its 95 % interval; – where the other's may be none."""
    cell, other, mark = matched(cell, other)
    mine, theirs = cell.gains(kind), other.gains(kind)
    if bounds(theirs)[0] <= 0:
        return "–"
    low, high = bounds(mine / theirs)
    return f"{cell.gain(kind) / other.gain(kind):.2f} [{low:.2f}, {high:.2f}]{mark}"


def table(header: str, rows: list[list[str]]) -> str:
    rule = "|".join("---" for _ in header.split("|")[1:-1])
    return "\n".join([header, f"|{rule}|", *("| " + " | ".join(row) + " |" for row in rows)])


def claimed(grids: dict[str, Grid]) -> Iterator[tuple[list[str], Cell, dict[str, Cell]]]:
    """On-policy cells that have a supervised one of the same learning rate: where they start, that rate, steps and flags."""
    for name, (start, cells) in grids.items():
        label = f"{STARTS.get(name, name)}, {percent(start['student']['sampled']['accuracy'])} %"
        for variant in (cell.variant for cell in cells.values() if cell.name == cell.baseline):
            for cell in (cells[method + variant] for method in CLAIMED if method + variant in cells):
                yield [label, cell.rate, str(cell.steps), f"`{text_and_divergence(cell)}`"], cell, cells


def text_and_divergence(cell: Cell) -> str:
    return re.match(r"--lmbda \S+ (--kd_ratio \S+|--beta \S+)( --seq_kd True)?", cell.flags)[0]


def claim_table(grids: dict[str, Grid]) -> str:
    """Beside supervised KD of the same learning rate and steps."""
    rows = []
    for begin, cell, cells in claimed(grids):
        baseline = cells[cell.baseline]
        if baseline.steps != cell.steps:
            continue
        same_beta = re.sub(r"--lmbda \S+", "--lmbda 0", cell.flags)
        twin = next((other for other in cells.values() if other.flags == same_beta), None)
        rows.append(
            [
                *begin,
                f"{cell.count}, {baseline.count}",
                gain(cell, "sampled"),
                minus(cell, baseline, "sampled"),
                ratio(cell, baseline, "sampled"),
                minus(cell, twin, "sampled"),
                minus(cell, baseline, "greedy"),
                minus(cell, twin, "greedy"),
            ]
        )
    return table(
        "| start | learning rate | steps | flags | seeds | sampled: gain | minus supervised | gain / supervised "
        "| minus supervised of its β | greedy: minus supervised | minus supervised of its β |",
        rows,
    )


def equal_seconds_table(grids: dict[str, Grid], clocks: dict[str, dict[Clock, float]]) -> str:
    """On-policy cells beside supervised ones that take as long, and `--lmbda auto` beside all others that do."""
    rows = []
    for name, grid in grids.items():
        for begin, cell, cells in claimed({name: grid}):
            seconds, auto = cell.seconds(clocks[name]), cell.clock[1] == AUTO
            for other in cells.values():
                beside = other.seconds(clocks[name])
                peer = other.clock[1] == "0" or (auto and other.clock[1] != AUTO)
                if peer and other.rate == cell.rate and abs(beside / seconds - 1) <= ALIKE and not other.clock[0]:
                    rows.append(
                        [
                            *begin,
                            f"{seconds:.0f}",
                            f"{other.steps}: `{text_and_divergence(other)}`",
                            f"{beside:.0f}",
                            ", ".join(each.count for each in matched(cell, other)[:2]),
                            minus(cell, other, "sampled"),
                            minus(cell, other, "greedy"),
                        ]
                    )
    return table(
        "| start | learning rate | steps | flags | seconds | beside steps of | seconds | seeds | sampled: difference | greedy: difference |",
        rows,
    )


def least_steps(cells: dict[str, Cell]) -> int:
    """Of a cell that is more than a look at TRL's trainer."""
    return cells[BASELINE].steps if BASELINE in cells else STEPS


def steps_table(start: dict, cells: dict[str, Cell]) -> str:
    rows = []
    for model in ("teacher", "student"):
        sampled, greedy = start[model]["sampled"], start[model]["greedy"]
        label = "teacher" if model == "teacher" else "student at the start"
        more = ["" if model == "teacher" else f"{sampled[key]:.3f}" for key in ("entropy", "forward_kl")]
        rows.append([label, "", "", percent(sampled["accuracy"]), "", "", percent(greedy["accuracy"]), "", "", *more])  # fmt: skip
    for cell in cells.values():
        if cell.steps >= least_steps(cells):
            rows.append(
                [
                    f"`{cell.name}`",
                    f"`{cell.flags}`",
                    cell.count,
                    percent(cell.mean("sampled")),
                    gain(cell, "sampled"),
                    minus(cell, cells.get(cell.baseline), "sampled"),
                    percent(cell.mean("greedy")),
                    gain(cell, "greedy"),
                    minus(cell, cells.get(cell.baseline), "greedy"),
                    f"{cell.mean('sampled', 'entropy'):.3f}",
                    f"{cell.mean('sampled', 'forward_kl'):.3f}",
                ]
            )
    return table(
        "| cell | flags | seeds | sampled, % | gain | minus supervised | greedy, % | gain | minus supervised | entropy | forward KL |",
        rows,
    )


def seconds_table(cells: dict[str, Cell], clocks: dict) -> str:
    rows = []
    for cell in cells.values():
        seconds = cell.seconds(clocks)
        if seconds == seconds and not cell.clock[0] and cell.steps >= least_steps(cells):
            gains = [gain(cell, kind) for kind in KINDS]
            rows.append((seconds, [f"`{cell.name}`", str(cell.steps), f"{seconds:.0f}", *gains]))
    rows = [row for _, row in sorted(rows, key=lambda row: row[0])]
    return table("| cell | steps | GPU seconds | sampled: gain | greedy: gain |", rows)


def peer_table(cells: dict[str, Cell], clocks: dict) -> str:
    """TRL's trainer beside gkd's: cells of equal flags, called stock_X and gkd_X."""
    rows = []
    for name, stock in cells.items():
        ours = cells.get(name.replace("stock_", "gkd_"))
        if not name.startswith("stock_") or ours is None:
            continue
        target = min(stock.mean("sampled"), ours.mean("sampled"))  # both come so far
        for cell in (stock, ours):
            per_step = clocks.get(cell.clock, float("nan"))
            rows.append(
                [
                    f"`{cell.name}`",
                    cell.count,
                    percent(cell.mean("sampled")),
                    gain(cell, "sampled"),
                    minus(cell, stock, "sampled"),
                    percent(cell.mean("greedy")),
                    minus(cell, stock, "greedy"),
                    f"{per_step:.2f}",
                    f"{percent(target)} % in {cell.steps_to(target) * per_step:.0f} s",
                    f"{100 * cell.gain('sampled') / (cell.steps * per_step / 60):.1f}",
                ]
            )
    return table(
        "| cell | seeds | sampled, % | gain | minus TRL's | greedy, % | minus TRL's | s a step | to the lower of both | points a GPU minute |",
        rows,
    )


def tasks_table(start: dict, cells: dict[str, Cell]) -> str:
    shown = [cells[name] for name in (BASELINE, "on_policy_jsd", "on_policy_reverse") if name in cells]
    names = ["teacher", "start", *(f"`{cell.name}`" for cell in shown)]
    rows = []
    for task in start["student"]["sampled"]["tasks"]:
        known = [start[model]["sampled"]["tasks"][task] for model in ("teacher", "student")]
        found = [cell.means["sampled"]["tasks"][task] for cell in shown]
        rows.append([task, *(percent(value) for value in known + found)])
    return table(f"| sampled, % | {' | '.join(names)} |", rows)


def draw(cells: dict[str, Cell], clocks: dict, folder: Path) -> None:
    """Into the folder. curves.png: accuracy against steps and seconds; text.png: entropy and length of what the student writes."""
    figure, (by_step, by_second) = new_figure(2, 11)
    for name in SHOWN:
        if name in cells:
            steps, accuracy = cells[name].curve()
            percentages = [100 * value for value in accuracy]
            (line,) = by_step.plot(steps, percentages, marker="o", label=name)
            whole = cells[name].seconds(clocks)
            if whole == whole:
                seconds = [step / cells[name].steps * whole for step in steps]
                by_second.plot(seconds, percentages, marker="o", color=line.get_color())
    by_step.set(xlabel="optimizer steps", ylabel="solved, % (sampled at temperature 1)")
    by_second.set(xlabel="GPU seconds")
    if by_step.lines:
        by_step.legend(fontsize=8)
    save_figure(figure, folder / "curves.png")

    figure, (entropy, length) = new_figure(2, 11)
    for name, cell in cells.items():
        if name.startswith("on_policy_") and not cell.variant:
            logs = [log for log in cell.seeds[0]["training"] if "student_entropy" in log]
            entropy.plot([x["step"] for x in logs], [x["student_entropy"] for x in logs], label=name)
            length.plot([x["step"] for x in logs], [x["completion_length"] for x in logs], label=name)
    entropy.set(xlabel="optimizer steps", ylabel="student's entropy, nats a token")
    length.set(xlabel="optimizer steps", ylabel="tokens a completion")
    if entropy.lines:
        entropy.legend(fontsize=8)
    save_figure(figure, folder / "text.png")


def all_tables(grids: dict[str, Grid], clocks: dict[str, dict[Clock, float]]) -> dict[str, str]:
    """Markdown by GRID/TABLE."""
    tables = {"all/claim": claim_table(grids), "all/equal_seconds": equal_seconds_table(grids, clocks)}
    for name, (start, cells) in grids.items():
        tables |= {
            f"{name}/steps": steps_table(start, cells),
            f"{name}/seconds": seconds_table(cells, clocks[name]),
            f"{name}/peer": peer_table(cells, clocks[name]),
            f"{name}/tasks": tasks_table(start, cells),
        }
    return tables


def filled(text: str, tables: dict[str, str]) -> str:
    """The report with its tables between their marks, `<!-- GRID/TABLE -->` and `<!-- end -->`.

    Raises:
        KeyError: a mark names no table.
    """
    return re.sub(
        r"(<!-- (\S+/\S+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{tables[found[2]]}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("results", type=Path, nargs="?", help="folder of a run's results")
    what.add_argument("--write", action="store_true", help="put tables and pictures into the repository's report")
    args = parser.parse_args()
    folders = [args.results] if args.results else list(RESULTS.iterdir())
    grids, clocks = load(folders), seconds_per_step(folders)
    tables = all_tables(grids, clocks)
    for name, markdown in tables.items():
        print(f"\n{name}\n{markdown}")
    if args.results:
        draw(grids[args.results.name][1], clocks[args.results.name], args.results)
    if args.write:
        report = REPORT.read_text(encoding="utf-8")
        for name, (_, cells) in grids.items():
            if f"{name}/curves.png" in report:
                draw(cells, clocks[name], RESULTS / name)
        write_whole(REPORT, filled(report, tables))


if __name__ == "__main__":
    main()
