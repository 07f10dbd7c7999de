"""How step time and memory grow with tasks, rank, layers and length, and data preparation with rows.

    python benchmarks/growth.py --plot docs/growth.svg

Every point is a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BASE = {"tasks": 8, "rank": 16, "layers": 4, "length": 64, "shared": 0}
CURVES = {
    "tasks": [1, 2, 4, 8, 16, 32, 64],
    "shared": [0, 2, 4, 8],
    "rank": [4, 16, 64],
    "layers": [1, 4, 12, 30],
    "length": [32, 64, 128, 256],
    "rows": [1_000, 10_000, 100_000, 1_000_000],
}


def step_point(args, setting):
    """Median seconds of a training step of 8 rows, and the process's peak memory."""
    import common

    from alter.nn import LoRA, SharedGate, TaskSelector

    expert, layers = LoRA(rank=setting["rank"]), f"last:{setting['layers']}"
    found = common.model(args.smollm2, "fp32", setting["tasks"], expert, TaskSelector(), layers)
    if setting["shared"]:
        found.add_shared(LoRA(rank=setting["rank"]), setting["shared"], SharedGate())
    data = common.batch(found, 8, setting["length"])
    take = common.stepper(found)
    seconds = common.alternate(args.rounds, step=lambda: take(data))["step"]
    return {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


def rows_point(args, rows):
    """Seconds and memory of encoding generated rows."""
    from alter.data import MultiTaskDataModule
    from alter.data.task import Task
    from alter.nn.backbone import resolve_backbone

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w") as out:
            for number in range(rows):
                words = " ".join(f"w{(number * 7919 + i * 104729) % 9973}" for i in range(12))
                out.write(json.dumps({"text": words, "label": "ab"[number % 2]}) + "\n")
        source = {"class_path": "Files", "init_args": {"train": str(file), "validation": 0.01, "test": 0.01}}
        task = Task("grown", source, "Text: {{ text }}\nLabel:", "{{ label }}", choices=["a", "b"], truncate="text")
        data = MultiTaskDataModule([task], str(resolve_backbone(args.smollm2)), cache_dir=folder)
        started = time.perf_counter()
        data.prepare_data()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "low": seconds, "high": seconds}


def merged(points):
    """One point of each place: the median of its passes, their lowest and highest rounds, the largest memory."""
    places = {}
    for point in points:
        places.setdefault((point["curve"], point["value"]), []).append(point)
    return [
        {
            "curve": curve,
            "value": value,
            "seconds": statistics.median(point["seconds"] for point in own),
            "low": min(point["low"] for point in own),
            "high": max(point["high"] for point in own),
            "peak": max(point["peak"] for point in own),
        }
        for (curve, value), own in places.items()
    ]


def plot(points, file):
    """One panel a curve: time on the left axis, with its lowest and highest rounds behind it, memory on the right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    titles = {"shared": "shared experts", "layers": "adapted layers", "length": "tokens a row", "rows": "rows encoded"}
    for panel, name in zip(panels.flat, CURVES, strict=True):
        own = [p for p in points if p["curve"] == name]
        x, seconds, peaks = [p["value"] for p in own], [p["seconds"] for p in own], [p["peak"] / 2**30 for p in own]
        panel.plot(x, seconds, "o-", color="tab:blue")
        panel.fill_between(x, [p["low"] for p in own], [p["high"] for p in own], color="tab:blue", alpha=0.15)
        panel.set_xlabel(titles.get(name, name))
        panel.set_ylabel("seconds", color="tab:blue")
        memory = panel.twinx()
        memory.plot(x, peaks, "s--", color="tab:orange")
        memory.set(ylim=(0, 1.15 * max(peaks)))
        memory.set_ylabel("peak GB", color="tab:orange")
        if name == "rows":
            panel.set(xscale="log", yscale="log")
            continue
        panel.set(ylim=(0, 1.15 * max(p["high"] for p in own)))
        if name in ("tasks", "rank", "length"):
            panel.set_xscale("log", base=2)
        panel.set_xticks(x, labels=[f"{value}" for value in x])
    figure.savefig(file, metadata={"Date": None})


def main():
    """All curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", default="smollm2-135m", help="name or folder of SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=5, help="steps of a point in a pass")
    parser.add_argument("--passes", type=int, default=3, help="over all curves of steps")
    parser.add_argument("--out", type=Path, help="JSON file for the points")
    parser.add_argument("--plot", type=Path, help="SVG file")
    parser.add_argument("--point", nargs=2, metavar=("CURVE", "VALUE"), help="measure this one and print it")
    args = parser.parse_args()
    if args.point:
        curve, value = args.point[0], int(args.point[1])
        found = rows_point(args, value) if curve == "rows" else step_point(args, {**BASE, curve: value})
        from alter.machine import peak_memory_bytes

        print(json.dumps({"curve": curve, "value": value, **found, "peak": peak_memory_bytes()}))
        return
    places = [(curve, value) for curve, values in CURVES.items() for value in values]
    steps = [place for place in places if place[0] != "rows"]
    points = []
    # every pass over all of them, so that a machine whose speed moves bends no curve; rows take minutes
    for curve, value in steps * (args.passes - 1) + places:
        command = [sys.executable, __file__, "--smollm2", args.smollm2, "--rounds", str(args.rounds)]
        done = subprocess.run([*command, "--point", curve, str(value)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{curve} {value} failed:\n{done.stderr[-3000:]}")
        points.append(json.loads(done.stdout.splitlines()[-1]))
        gigabytes = points[-1]["peak"] / 2**30
        print(f"{curve} {value}: {points[-1]['seconds']:.3f} s, {gigabytes:.2f} GB", flush=True)
    points = merged(points)
    if args.out:
        import common  # not before: a point's peak memory would have it

        command = "python benchmarks/growth.py --out benchmarks/results/growth.json --plot docs/growth.svg"
        content = {"hardware": common.hardware(), "command": command, "points": points}
        args.out.write_text(json.dumps(content, indent=2) + "\n")
    if args.plot:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
