"""Speed and peak memory of convert_data.py against a plain json.loads / json.dumps loop over the same rows.

    python benchmarks/convert_speed.py --rows 1000000

Rows have three messages and about 300 bytes. Each run is a separate process; peak memory is its resident set. Prints a
table: rows a second, the ratio to the loop (above 1 is faster), MiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parent.parent
LOOP = """
import json, sys
with open(sys.argv[1], encoding="utf-8") as source, open(sys.argv[2], "w", encoding="utf-8") as out:
    for line in source:
        out.write(json.dumps(json.loads(line), ensure_ascii=False) + "\\n")
"""


def measure(*command: str | Path) -> tuple[float, float]:
    """Wall seconds and peak MiB of a process."""
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {command}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        lines, array = Path(folder, "rows.jsonl"), Path(folder, "rows.json")
        with lines.open("w", encoding="utf-8") as first, array.open("w", encoding="utf-8") as second:
            for i in range(rows):
                question = f"帮我把下面中文翻译成英文: 第 {i} 句, 很好,那是一幅很酷的画作。"
                turns = (
                    ("system", "You translate."),
                    ("user", question),
                    ("assistant", f"Number {i}: a cool painting. " * 3),
                )
                row = json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}, ensure_ascii=False)
                first.write(row + "\n")
                second.write(("[" if i == 0 else ", ") + row)  # a single line
            second.write("]")
        convert = [sys.executable, REPO / "convert_data.py"]
        runs = {
            "plain loop, JSON lines to JSON lines": measure(sys.executable, "-c", LOOP, lines, Path(folder, "loop"))
        }
        for name, source in (("JSON lines to JSON", lines), ("JSON array to JSON", array)):
            runs[f"convert_data.py, {name}"] = measure(
                *convert, source, "-o", Path(folder, f"{source.suffix[1:]}.json")
            )
    loop = runs["plain loop, JSON lines to JSON lines"][0]
    print(f"{rows:,} rows\n\n| run | rows/s | ratio | peak MiB |\n|---|---|---|---|")
    for name, (seconds, peak) in runs.items():
        print(f"| {name} | {rows / seconds:,.0f} | {loop / seconds:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
