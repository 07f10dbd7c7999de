"""Runs the benchmarks one after another and writes benchmarks/results/cpu.json and the tables of docs/performance.md.

    nox -s bench -- --data ROOT --t5 FOLDER
    nox -s bench -- --data ROOT --t5 FOLDER --precision bf16      # on a machine with a GPU: gpu.json

Arguments go to every benchmark; --only NAME ... runs some of them and keeps the other rows. What a benchmark has
measured is written at once.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
BENCHMARKS = (
    "fused_mixture",
    "choices",
    "trunk_cache",
    "batches",
    "generation",
    "loading",
    "peers",
    "mixed_generation",
    "serve",
    "precisions",  # of a GPU alone
)
SHORTER = {
    "serve": ["--requests", "32", "--minutes", "0"]
}  # ten minutes of load are a run of their own: docs/serving.md
PAGE = HERE.parent / "docs" / "performance.md"


def table(rows):
    """The rows as Markdown."""
    lines = ["| what | ratio, median [lowest, highest] | target | holds |", "|---|---|---|---|"]
    for row in rows:
        target = "" if row["target"] is None else f"{row['bound']} {row['target']:g}"
        ratio = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        holds = "" if row["target"] is None else "yes" if row["holds"] else "**no**"
        lines.append(f"| {row['name']} | {ratio} | {target} | {holds} |")
    return "\n".join(lines)


def render(results, kind):
    """Puts the tables of a kind of machine between the page's markers."""
    page = PAGE.read_text()
    rows = json.loads((results / f"{kind}.json").read_text())
    machine = json.loads((results / f"machine_{kind}.json").read_text())
    machines = list(dict.fromkeys(row["hardware"] for row in rows))
    where = f"Measured on {' and '.join(machines)}" + ("; the JSON has each row's." if len(machines) > 1 else ".")
    parts = {
        f"results {kind}": f"{table(rows)}\n\n{where}",
        f"machine {kind}": "\n".join(
            f"- {name}: {value:,.0f}" for name, value in machine.items() if name != "hardware"
        ),
    }
    for name, text in parts.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.S
        )
    PAGE.write_text(page)


def main():
    """Every benchmark in turn."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    arguments, only = sys.argv[1:], [name for name in BENCHMARKS if name != "precisions" or kind == "gpu"]
    if "--only" in arguments:
        at = arguments.index("--only")
        end = next((i for i in range(at + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
        only, arguments = arguments[at + 1 : end], arguments[:at] + arguments[end:]
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    file = results / f"{kind}.json"
    subprocess.run([sys.executable, HERE / "machine.py", "--out", results / f"machine_{kind}.json"], check=True)
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            subprocess.run(
                [sys.executable, HERE / f"{name}.py", *SHORTER.get(name, []), *arguments, "--out", out], check=True
            )
            rows = [{**row, "benchmark": name} for row in json.loads(out.read_text())]
        kept = [row for row in (json.loads(file.read_text()) if file.is_file() else []) if row["benchmark"] != name]
        order = sorted(kept + rows, key=lambda row: BENCHMARKS.index(row["benchmark"]))
        file.write_text(json.dumps(order, indent=2) + "\n")
        render(results, kind)


if __name__ == "__main__":
    main()
