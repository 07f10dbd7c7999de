"""Runs the benchmarks one after another and writes benchmarks/results/cpu.json, the tables of docs/performance.md and growth's curves.

    nox -s bench -- --data ROOT --t5 FOLDER
    nox -s bench -- --data ROOT --t5 FOLDER --precision bf16      # on a machine with a GPU: gpu.json

Arguments go to every benchmark but growth; --only NAME ... runs some of them and keeps the other rows. What a benchmark has
measured is written at once.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch

HERE = Path(__file__).parent
RUNS = {  # what a row's "benchmark" says: the program and its arguments
    "fused_mixture": ["fused_mixture"],
    "fused_mixture compiled": ["fused_mixture", "--compile", "--batch", "64", "--length", "256"],
    "choices": ["choices"],
    "trunk_cache": ["trunk_cache"],
    "batches": ["batches"],
    "generation": ["generation"],
    "loading": ["loading"],
    "peers": ["peers"],
    "peers biomedical": ["peers", "--mixture", "biomedical"],
    "peers all": ["peers", "--layers", "all", "--router", "soft"],  # as the recipes of the real mixtures train
    "mixed_generation": ["mixed_generation"],
    "mixed_generation bf16": ["mixed_generation", "--precision", "bf16"],
    "serve": ["serve", "--requests", "32", "--minutes", "0"],  # ten minutes of load: docs/serving.md
    "optimizer": ["optimizer"],
    "precisions": ["precisions"],
    "growth": ["growth"],
}
NOT_ON = {
    "cpu": {"fused_mixture compiled"},
    "gpu": {"mixed_generation bf16", "growth"},  # there all is measured in bf16
}
NEED_DATA = {"peers biomedical"}
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
    machines = json.loads((results / f"machines_{kind}.json").read_text())
    used = list(dict.fromkeys(row["hardware"] for row in rows))
    targets = [row["holds"] for row in rows if row["target"] is not None]
    held = f"{sum(targets)} of {len(targets)} rows with a target hold it. " if targets else ""
    where = f"{held}Measured on {' and '.join(used)}" + ("; the JSON has each row's." if len(used) > 1 else ".")
    parts = {
        f"results {kind}": f"{table(rows)}\n\n{where}",
        f"machine {kind}": "\n".join(
            f"- {machine.pop('hardware')}: " + "; ".join(f"{name} {value:,.0f}" for name, value in machine.items())
            for machine in machines
        ),
    }
    for name, text in parts.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.S
        )
    PAGE.write_text(page)


def measured(program, arguments):
    """What a program writes to --out."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        subprocess.run([sys.executable, HERE / f"{program}.py", *arguments, "--out", out], check=True)
        return json.loads(out.read_text())


def replaced(file, new, key, order):
    """Writes the file's rows with new ones in place of those of the same key."""
    kept = json.loads(file.read_text()) if file.is_file() else []
    rows = [row for row in kept if row[key] not in {row[key] for row in new}] + new
    file.write_text(json.dumps(sorted(rows, key=lambda row: order.index(row[key])) if order else rows, indent=2) + "\n")


def main():
    """Every benchmark in turn."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    arguments, left_out = sys.argv[1:], NOT_ON[kind]
    if not common.options(__doc__).parse_known_args(arguments)[0].data:
        left_out = left_out | NEED_DATA
    only = [name for name in RUNS if name not in left_out]
    if "--only" in arguments:
        at = arguments.index("--only")
        end = next((i for i in range(at + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
        only, arguments = arguments[at + 1 : end], arguments[:at] + arguments[end:]
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    replaced(results / f"machines_{kind}.json", [measured("machine", [])], "hardware", None)
    for name in only:
        program, *own = RUNS[name]
        if name == "growth":
            curves = ["--out", results / "growth.json", "--plot", PAGE.parent / "growth.svg"]
            subprocess.run([sys.executable, HERE / "growth.py", *curves], check=True)
            continue
        rows = [{**row, "benchmark": name} for row in measured(program, [*own, *arguments])]
        replaced(results / f"{kind}.json", rows, "benchmark", list(RUNS))
        render(results, kind)


if __name__ == "__main__":
    main()
