"""`alter serve` under load from this process: mixed tasks of 16 clients against one after another, then for minutes on end.

    python benchmarks/serve.py --run runs/medical --minutes 10

Without --run, the seven medical tasks over SmolLM2 with adapters of random weights, whose answers are as long as the backbone
makes them.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import common
import openai
import yaml

from alter.data import Task, load_tasks
from alter.loading import run_recipe
from alter.nn import LoRA, SharedGate
from alter.nn.backbone import resolve_backbone

RECIPES = Path(__file__).parents[1] / "recipes"
ROWS = 64  # of each task
SAMPLE_SECONDS = 2.0


def made_run(folder, args):
    """A run folder as training leaves it, untrained."""
    tasks = load_tasks(["tasks/medical/*.yaml"], RECIPES)
    found = common.model(args.smollm2, args.precision, len(tasks), LoRA(rank=16), layers="last:40%")
    found.add_shared(LoRA(rank=16), 2, SharedGate())
    found.tasks = [task.name for task in tasks]
    found.save_pretrained(folder / "model", str(resolve_backbone(args.smollm2)))
    recipe = {"precision": args.precision, "data": {"tasks": [task.to_dict() for task in tasks]}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def requests(run):
    """Validation rows as requests, every task in turn."""
    tasks = [Task.from_run(entry, str(run)) for entry in run_recipe(run)["data"]["tasks"]]
    rows = [[row for row, _ in zip(task.opened.rows("validation"), range(ROWS), strict=False)] for task in tasks]
    return [
        {"model": task.name, "prompt": _prompt(task, row)}
        for together in zip(*rows, strict=False)
        for task, row in zip(tasks, together, strict=True)
    ]


def _prompt(task, row):
    given = {name: row[name] for name in task.fields}
    return given[task.fields[0]] if len(given) == 1 else json.dumps(given)


@contextmanager
def serving(run):
    """The server in a process of its own, at a free port; its address."""
    command = [sys.executable, "-m", "alter", "serve", "--run", str(run), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield next(word for word in server.stdout.readline().split() if word.startswith("http"))
    finally:
        server.terminate()
        server.wait()


class Load:
    """Clients that each ask again as soon as they are answered."""

    def __init__(self, address, asked):
        self.address, self.asked, self.failed, self.answered = address, asked, [], 0

    def run(self, clients, count=None, seconds=None):
        """Asks so many requests, or for so long; returns the seconds it took."""
        return asyncio.run(self._run(clients, count, seconds))

    async def _run(self, clients, count, seconds):
        started, numbers = time.perf_counter(), iter(range(count if count is not None else sys.maxsize))

        async def client():
            for number in numbers:
                if seconds is not None and time.perf_counter() - started > seconds:
                    return
                try:
                    await server.completions.create(**self.asked[number % len(self.asked)])
                    self.answered += 1
                except openai.OpenAIError as error:
                    self.failed.append(repr(error))

        async with openai.AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0) as server:
            await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - started

    def endure(self, clients, seconds):
        """Loads the server for so long; returns its resident memory in bytes, sampled."""
        return asyncio.run(self._endure(clients, seconds))

    async def _endure(self, clients, seconds):
        load, samples = asyncio.create_task(self._run(clients, None, seconds)), []
        while not load.done():
            samples.append(await asyncio.to_thread(resident_bytes, self.address))
            await asyncio.wait({load}, timeout=SAMPLE_SECONDS)
        await load
        return samples


def resident_bytes(address):
    """The server's memory, as its metrics tell it."""
    page = subprocess.run(["curl", "-sf", f"{address}/metrics"], capture_output=True, text=True, check=True).stdout
    return next(float(line.split()[1]) for line in page.splitlines() if line.startswith("process_resident_memory"))


def measure(run, args):
    """Three rows: throughput, failures, memory; without a long part the first alone."""
    what = f"serving {args.clients} clients, mixed tasks" + (f", {args.precision}" if args.precision != "fp32" else "")
    with serving(run) as address:
        load = Load(address, requests(run))
        seconds = common.alternate(
            args.rounds,
            together=lambda: load.run(args.clients, args.requests),
            alone=lambda: load.run(1, args.requests),
        )
        rates = [args.requests / taken for taken in seconds["together"]]
        print(f"{statistics.median(rates):.1f} requests/s at {args.clients} clients", flush=True)
        rows = [
            common.row(
                f"{what}: throughput over one at a time", common.ratios(seconds["alone"], seconds["together"]), 2
            )
        ]
        if not args.minutes:
            return rows
        load.answered = 0
        memory = load.endure(args.clients, 60 * args.minutes)
    quarter = len(memory) // 4
    settled = statistics.median(memory[quarter : 2 * quarter])
    print(
        f"{load.answered} answered in {args.minutes:g} minutes, {len(load.failed)} failed {load.failed[:3]}", flush=True
    )
    print(f"resident: {settled / 2**20:.0f} MiB, at the end {memory[-1] / 2**20:.0f} MiB", flush=True)
    share = len(load.failed) / max(1, len(load.failed) + load.answered)
    rows.append(common.row(f"{what}, {args.minutes:g} minutes: share of requests that failed", [share], 0, True))
    late = [sample / settled for sample in memory[-quarter:]]
    rows.append(
        common.row(f"{what}, {args.minutes:g} minutes: memory of the last quarter over the second", late, 1.02, True)
    )
    return rows


def main():
    """Against a finished run, or one made for it."""
    parser = common.options(__doc__)
    parser.add_argument("--run", type=Path, help="a finished run")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of the long part, half a minute or more; 0 leaves it out"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common.save(measure(args.run or made_run(Path(folder), args), args), args.out)


if __name__ == "__main__":
    main()
