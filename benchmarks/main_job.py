"""Measures the main job: start-up of the command, and the whole of `alter fit --config recipes/medical.yaml`.

    python benchmarks/main_job.py [--run DIR]

Writes benchmarks/results/main_job.json: a list of {"name", "value", "target", "holds", "command", "hardware"}. With --run an
already finished run is read instead of running it again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from alter.machine import hardware

COMMAND = "alter fit --config recipes/medical.yaml"


def start_up(rounds: int = 7) -> float:
    """Median seconds of `alter --help`."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "alter", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run of the medical recipe")
    run = parser.parse_args().run
    if run is None:
        run = Path("runs/medical-benchmark")
        subprocess.run([sys.executable, "-m", *COMMAND.split(), "--run", str(run)], check=True)
    results = json.loads((run / "results.json").read_text())
    measured = [
        ("seconds of alter --help", start_up(), 0.5, "alter --help"),
        ("seconds of the whole job", sum(results["seconds"].values()), 1200, COMMAND),
        ("peak memory in bytes", results["peak_memory_bytes"], 6e9, COMMAND),
    ]
    rows = [
        {"name": n, "value": v, "target": t, "holds": v <= t, "command": c, "hardware": hardware()}
        for n, v, t, c in measured
    ]
    out = Path(__file__).parent / "results" / "main_job.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['name']}: {row['value']:.4g} (target {row['target']:.4g}) {'holds' if row['holds'] else 'DOES NOT HOLD'}"
        )


if __name__ == "__main__":
    main()
