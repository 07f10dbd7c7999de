"""How many examples a task needs that joins a trained run, beside a fresh adapter trained on the same ones.

    python benchmarks/add_task.py --run runs/four_tasks --data ROOT --task recipes/tasks/customer_service/snips_intent.yaml

The run must not know the tasks. Both sides have an expert of the run's kind and rank at the same places, the same rows, draws,
batches, learning rate and checks on validation; the newcomer also has its rates of the mixture (a few numbers a layer). Prints and
writes the test metric of each size and seed.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import common

from alter.borrowing import borrowed
from alter.data import MultiTaskDataModule, Task
from alter.evaluate import answers
from alter.growth import newcomer_arguments
from alter.loading import run_recipe
from alter.metrics import metric
from alter.nn.backbone import is_seq2seq, load_tokenizer, resolve_backbone
from alter.predict import Predictor
from alter.run import quiet
from alter.training import train


def fresh_arguments(content, arguments):
    """The same training of one adapter alone in the same backbone."""
    given = arguments["model"]["init_args"]
    kept = {key: given[key] for key in ("backbone", "tasks", "precision", "trunk_cache", "optimizer")}
    stage1 = content["stage1"]["model"]["init_args"]
    model = {**kept, **{key: stage1[key] for key in ("layers", "ffn", "expert")}}
    return {**arguments, "model": {"class_path": "alter.stages.Stage1Module", "init_args": model}}


def one(args, content, task, size, seed):
    """The metrics of both sides at one size and seed."""
    backbone = resolve_backbone(content["backbone"])
    limited = replace(task, limit={"train": size, "validation": args.validation, "test": args.test})
    drawn = {"seed": seed, "examples_per_epoch": args.draws, "max_tokens": args.max_tokens}
    settings = {**content["data"], "tasks": [limited], "limit": None, **drawn}
    found = {}
    for name in ("newcomer", "fresh"):
        data = MultiTaskDataModule(**settings, tokenizer=str(backbone), seq2seq=is_seq2seq(backbone))
        data.prepare_data()
        data.setup()
        arguments = newcomer_arguments(args.run, content, task.name, backbone, args.draws, None)
        arguments = {
            **(arguments if name == "newcomer" else fresh_arguments(content, arguments)),
            "seed_everything": seed,
        }
        arguments["trainer"] |= {"enable_progress_bar": False}
        with tempfile.TemporaryDirectory() as folder:
            facts, cli = train(Path(folder) / name, arguments, data, content["backbone"])
        model = cli.model.model.eval()
        tasks = [replace(limited, name=other) for other in model.tasks[:-1]] + [limited]
        predictor = Predictor(model, load_tokenizer(backbone), tasks)
        said, targets = answers(predictor, data, task.name, "test"), data.examples(task.name, "test")["target"][:]
        found[name] = {
            "value": metric(task.metrics[0], said, targets, task.choices).value(),
            "validation_loss": facts["validation_loss"],
            "seconds": facts["seconds"],
        }
        if name == "newcomer":
            found[name]["own"] = borrowed(model, task.name)["experts"][task.name]
        print(f"{task.name}, {size} rows, seed {seed}, {name}: {found[name]}", flush=True)
    return found


def main():
    """Every task, size and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run that does not know the tasks")
    parser.add_argument("--task", type=Path, action="append", required=True, help="a task file; again for more")
    parser.add_argument("--data", required=True, help="root of the tasks' data")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[13, 14, 15])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=256, help="of a batch: few rows need many steps")
    parser.add_argument("--validation", type=int, default=64, help="rows")
    parser.add_argument("--test", type=int, default=250, help="rows")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    quiet()
    content, results = run_recipe(args.run), {}
    tasks = [Task.from_file(file, args.data) for file in args.task]
    for seed in args.seeds:
        for task in tasks:
            for size in args.sizes:
                sides = results.setdefault(task.name, {"metric": task.metrics[0]}).setdefault(str(size), {})
                for side, found in one(args, content, task, size, seed).items():
                    sides.setdefault(side, []).append({"seed": seed, **found})
                if args.out:
                    args.out.write_text(json.dumps({**facts(args, content), "results": results}, indent=2) + "\n")
    print("\n".join(table(results)))


def facts(args, content):
    """What the numbers depend on."""
    return {
        "hardware": common.hardware(),
        "draws": args.draws,
        "max_tokens": args.max_tokens,
        "validation": args.validation,
        "test": args.test,
        "run": {
            "tasks": [entry["name"] for entry in content["data"]["tasks"]],
            "backbone": Path(content["backbone"]).name,
            "draws": content["data"]["examples_per_epoch"],
            "layers": content["stage1"]["model"]["init_args"]["layers"],
        },
    }


def table(results):
    """The rows of a Markdown table: metric and validation loss of both sides, mean and standard deviation over the seeds."""
    yield "| task | rows | metric | newcomer | fresh | validation loss, newcomer | fresh |"
    yield "|---|---|---|---|---|---|---|"
    for task, found in results.items():
        for size in (key for key in found if key != "metric"):
            sides = [found[size][side] for side in ("newcomer", "fresh")]
            cells = [_mean([row[key] for row in rows]) for key in ("value", "validation_loss") for rows in sides]
            yield f"| {task} | {size} | {found['metric']} | {' | '.join(cells)} |"


def _mean(values):
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
