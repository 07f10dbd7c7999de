"""Against peft: LoRA through transformers' Trainer, on the same model, layers, trainable parameters, rows and examples a batch.

    python benchmarks/peers.py --data ROOT

Training: each side is a process of its own, in turn; tokens are counted without padding. peft's side is used as its
documentation shows it: random batches of a fixed number of examples (as many as ours hold on average), padded by
DataCollatorForSeq2Seq. Its rows are written as token ids beforehand, as ours lie in the token cache, so that its process imports
nothing of ours.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.perf_counter()

COMMAND = "alter_fit"  # whose first step alone is measured
SIDES = ("alter", "alter_cached", COMMAND, "peft")


def train_alter(args, cached):
    """Trains by the stage's module and Lightning's Trainer; returns when each step ended and the tokens of each."""
    import clock
    from lightning import Trainer
    from mixtures import mixture

    from alter.nn import LoRA, TaskSelector, TrunkCache
    from alter.stages import Stage1Module

    data = mixture(args.smollm2, args.data, args.mixture, args.max_tokens)
    module = Stage1Module(
        args.smollm2,
        [task.name for task in data.tasks],
        args.precision,
        layers=args.layers,
        expert=LoRA(rank=args.rank),
        router=TaskSelector(hard=args.router == "hard"),
        trunk_cache=TrunkCache(folder=args.cache) if cached else None,
    )
    trainer = Trainer(
        max_steps=args.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[clock.Clock()],
    )
    trainer.fit(module, data)
    return clock.ends, clock.tokens, module.trainable_parameters()


def train_by_command(args):
    """One step by `alter fit`: its recipe and run folder too."""
    import clock

    from alter.cli import main as alter

    recipe = Path(__file__).parent.parent / "recipes" / f"{args.mixture}.yaml"
    settings = {
        "run": tempfile.mkdtemp(dir=args.examples.parent),
        "stages": "[stage1]",
        "test": "false",
        "backbone": args.smollm2,
        "precision": args.precision,
        "data.root": args.data,
        "data.max_tokens": args.max_tokens,
        "stage1.model.layers": args.layers,
        "stage1.model.expert": f"{{class_path: alter.nn.LoRA, init_args: {{rank: {args.rank}}}}}",
        "stage1.model.router": f"{{class_path: alter.nn.TaskSelector, init_args: {{hard: {args.router == 'hard'}}}}}",
        "trunk_cache.enabled": "false",
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.callbacks+": "clock.Clock",
    }
    flags = [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]
    with contextlib.redirect_stdout(sys.stderr):
        alter(["fit", "--config", str(recipe), *flags])
    return clock.ends, clock.tokens, 0


def write_examples(args, file):
    """Writes what peft's side trains on: as many examples as ours, and how many of them ours has in a batch on average."""
    from mixtures import mixture

    data = mixture(args.smollm2, args.data, args.mixture, args.max_tokens)
    batches = data.train_dataloader().batch_sampler
    rows = batches.examples_per_epoch
    pairs = [pair for _, batch in zip(range(args.steps * 2), batches, strict=False) for pair in batch]
    examples = [(data.examples(data.tasks[task].name, "train")[row]) for task, row in pairs[: min(rows, len(pairs))]]
    content = {
        "tasks": len(data.tasks),
        "batch_size": max(1, round(rows / len(batches))),
        "examples": [
            {
                "input_ids": e["prompt_ids"] + e["target_ids"],
                "attention_mask": [1] * (len(e["prompt_ids"]) + len(e["target_ids"])),
                "labels": [-100] * len(e["prompt_ids"]) + e["target_ids"],
            }
            for e in examples
        ],
    }
    file.write_text(json.dumps(content))


def train_peft(args):
    """The same with peft and transformers' Trainer."""
    import datasets
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    prepared = json.loads(args.examples.read_text())
    dataset = datasets.Dataset.from_list(prepared["examples"])
    tokenizer = AutoTokenizer.from_pretrained(args.smollm2)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    backbone = AutoModelForCausalLM.from_pretrained(args.smollm2, dtype=dtype)
    last = backbone.config.num_hidden_layers
    layers = None if args.layers == "all" else list(range(last - int(args.layers.split(":")[1]), last))
    rank = args.rank * prepared["tasks"]  # as many parameters as an expert a task
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(backbone, config)
    ends, tokens = [], []
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)

    def counted(features):
        tokens.append(sum(len(f["input_ids"]) for f in features))
        return collate(features)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            wait()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=prepared["batch_size"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=args.precision == "bf16",
            seed=13,
        )
        trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=counted, callbacks=[Clock()])
        trainer.train()
    return ends, tokens[: len(ends)], sum(p.numel() for p in model.parameters() if p.requires_grad)


def wait():
    """As common.wait, which would bring ALTER's imports into peft's side."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak():
    """Bytes on the GPU, else in the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    # The kernel's own mark; getrusage starts from the peak of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def child(args):
    """Runs one side and prints what was measured."""
    if args.side == "peft":
        ends, tokens, trained = train_peft(args)
        assert not {"alter", "lightning"} & set(sys.modules)  # whose imports would count as peft's
    elif args.side == COMMAND:
        ends, tokens, trained = train_by_command(args)
    else:
        ends, tokens, trained = train_alter(args, args.side == "alter_cached")
    print(
        json.dumps(
            {
                "tokens_per_second": sum(tokens[1:]) / (ends[-1] - ends[0]) if len(ends) > 1 else None,
                "first_step": ends[0] - STARTED,
                "peak": peak(),
                "trained": trained,
            }
        )
    )


def main():
    """The sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if "--side" in sys.argv:
        parser.add_argument("--side", choices=SIDES)
        parser.add_argument("--cache")
        parser.add_argument("--examples", type=Path)
        parser.add_argument("--smollm2")
        parser.add_argument("--data")
        parser.add_argument("--precision")
    else:
        import common

        parser = common.options(__doc__)
        parser.set_defaults(rounds=11)  # a process's start varies by a fifth
    parser.add_argument("--layers", default="last:4")
    parser.add_argument(
        "--router", choices=("hard", "soft"), default="hard", help="ALTER's: a task's expert, or all mixed"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--mixture", default="customer_service")
    args = parser.parse_args()
    if "--side" in sys.argv:
        child(args)
        return
    from mixtures import known

    from alter.nn.backbone import resolve_backbone

    args.smollm2 = str(resolve_backbone(args.smollm2))  # peft's side knows folders alone
    args.mixture = known(args.data, args.mixture)
    sides = [
        side for side in SIDES if args.layers != "all" or side != "alter_cached"
    ]  # nothing stands below all blocks
    measured = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write_examples(args, Path(folder) / "examples.json")
        for number in range(args.rounds + 1):
            for side in sides:
                found = run(side, args, Path(folder))
                if number:  # the first round fills the trunk cache and the file system's
                    measured[side].append(found)
    values = {side: {key: [m[key] for m in rounds] for key in rounds[0]} for side, rounds in measured.items()}
    for side in sides:
        print(
            side, {key: sorted(found)[len(found) // 2] for key, found in values[side].items() if found[0] is not None}
        )
    speed, start, peak = "tokens_per_second", "first_step", "peak"
    ours, theirs = (values[side]["trained"][0] for side in ("alter", "peft"))
    assert abs(ours / theirs - 1) < 0.01, f"ALTER trains {ours} parameters and peft {theirs}"
    name = f"{common.called('SmolLM2-135M', args.layers, args.precision)}, {args.mixture}"
    name += ", all experts mixed" if args.router == "soft" else ""
    rows = [
        common.row(f"{name}: training over peft", common.ratios(values["alter"][speed], values["peft"][speed]), 1.5),
        *(
            common.row(
                f"{name}: training from cached trunks over peft",
                common.ratios(values[side][speed], values["peft"][speed]),
                4.0,
            )
            for side in sides
            if side == "alter_cached"
        ),
        *(
            common.row(
                f"{name}: seconds to the end of {how} first step, over peft's",
                common.ratios(values[side][start], values["peft"][start]),
                1.0,
                at_most=True,
            )
            for side, how in (("alter", "the"), (COMMAND, "`alter fit`'s"))
        ),
        *(
            common.row(
                f"{name}: peak memory{how} over peft's",
                common.ratios(values[side][peak], values["peft"][peak]),
                1.0,
                at_most=True,
            )
            for side, how in (("alter", ""), ("alter_cached", " from cached trunks"))
            if side in sides
        ),
    ]
    common.save(rows, args.out)


def run(side, args, folder):
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--smollm2", args.smollm2]
    command += ["--cache", str(folder / "cache"), "--examples", str(folder / "examples.json")]
    command += ["--layers", args.layers, "--router", args.router, "--rank", str(args.rank), "--steps", str(args.steps)]
    command += ["--max_tokens", str(args.max_tokens), "--mixture", args.mixture, "--precision", args.precision]
    command += ["--data", args.data] if args.data else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
