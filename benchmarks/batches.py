"""Padding of an epoch's batches, and how long training waits for them, on the real mixtures.

    python benchmarks/batches.py --data ROOT --t5 FOLDER

The wait is Lightning's own profile of a training run with a filled trunk cache, where steps are shortest.
"""

import logging
import tempfile

import common
import numpy as np
from lightning import Trainer
from lightning.pytorch.profilers import SimpleProfiler
from mixtures import mixture

from alter.nn import LoRA, TrunkCache
from alter.stages import Stage1Module


def padding(data):
    """Share of an epoch's positions that are padding, over prompts and targets."""
    batches = data.train_dataloader().batch_sampler
    lengths = {
        (task, name): np.array(list(map(len, data.examples(spec.name, "train")[f"{name}_ids"][:])))
        for task, spec in enumerate(data.tasks)
        for name in ("prompt", "target")
    }
    used = held = 0
    for pairs in batches:
        prompts, targets = ([lengths[task, name][row] for task, row in pairs] for name in ("prompt", "target"))
        for rows in (prompts, targets) if data.seq2seq else ([p + t for p, t in zip(prompts, targets, strict=True)],):
            used, held = used + sum(rows), held + len(rows) * max(rows)
    return 1 - used / held


def waiting(args, name):
    """Share of a training epoch spent waiting for the next batch."""
    with tempfile.TemporaryDirectory() as folder:
        data = mixture(args.smollm2, args.data, name, args.max_tokens)
        for _ in range(2):  # the first fills the cache
            profiler = SimpleProfiler()
            module = Stage1Module(
                args.smollm2,
                [task.name for task in data.tasks],
                args.precision,
                expert=LoRA(rank=16),
                trunk_cache=TrunkCache(folder=folder),
            )
            trainer = Trainer(
                max_epochs=1,
                limit_train_batches=args.steps,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                profiler=profiler,
                default_root_dir=folder,
            )
            trainer.fit(module, data)
    durations = profiler.recorded_durations
    waits = durations["[_TrainingEpochLoop].train_dataloader_next"][1:]  # the first plans the epoch
    steps = durations["run_training_batch"]
    return [wait / (wait + step) for wait, step in zip(waits, steps[1:], strict=False)]


def main():
    """Every mixture and backbone."""
    parser = common.options(__doc__)
    parser.add_argument("--mixtures", nargs="+", default=["customer_service", "biomedical"])
    parser.add_argument("--max_tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    rows = []
    for name in args.mixtures if args.data else ["medical"]:
        for backbone, folder in (("SmolLM2-135M", args.smollm2), ("T5", args.t5)):
            if folder:
                data = mixture(folder, args.data, name, args.max_tokens)
                label = f"{backbone} {name}: share of padding in batches of {args.max_tokens} tokens"
                rows.append(common.row(label, [padding(data)], 0.05, at_most=True))
        label = f"SmolLM2-135M {name}: share of a cached step spent waiting for its batch"
        rows.append(common.row(label, waiting(args, name), 0.02, at_most=True))
    common.save(rows, args.out)


if __name__ == "__main__":
    main()
