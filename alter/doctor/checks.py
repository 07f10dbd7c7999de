"""What the doctor looks at: each check yields lines with a tick, a cross, or a dot where there is nothing to judge."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from alter import terminal
from alter.data import Files, MultiTaskDataModule, Task
from alter.data.sources import SPLITS
from alter.errors import AlterError
from alter.nn.backbone import QUANTISED
from alter.precision import slow_precision

MOST_REPEATED = 0.01  # of the test prompts also in train
MOST_TRUNCATED = 0.1  # of the prompts
MOST_MISSPELT = 0.01  # of the targets
MOST_SPELT = 5000  # targets; there may be millions
LESS_MEMORY = "lower data.max_tokens, set gradient_checkpointing: true in both stages' models, or name fewer layers"
EXAMPLES = 3
BAR = 40


@dataclass
class Line:
    """One line of the report.

    Attributes:
        good: tick or cross; None for a fact that nothing follows from.
        topic: what it is about.
        text: what was found; of a cross, with the remedy.
        detail: lines below it.
    """

    good: bool | None
    topic: str
    text: str
    detail: list[str] = field(default_factory=list)


def readable(task: Task, data: MultiTaskDataModule) -> Line:
    """Rows of each split, encoded."""
    stats = data.statistics(task.name)
    rows = " / ".join(f"{stats[split]['rows']:,} {split}" for split in SPLITS)
    return Line(True, "data", f"{task.name}: {rows}")


def disjoint(task: Task, data: MultiTaskDataModule) -> Line:
    """Whether prompts of the test or validation rows are in train too."""
    prompts = {split: data.examples(task.name, split)["prompt"][:] for split in SPLITS}
    train = set(prompts["train"])
    repeated = {split: sum(p in train for p in prompts[split]) for split in SPLITS[1:]}
    counts = ", ".join(f"{count:,} of {len(prompts[split]):,} {split} prompts" for split, count in repeated.items())
    worst = max(count / max(len(prompts[split]), 1) for split, count in repeated.items())
    if worst > MOST_REPEATED:
        remedy = "remove repeated rows from one of the splits."
        if isinstance(task.opened, Files) and any(repeated[split] for split in task.opened.shares):
            remedy = "remove repeated rows, or name the column that tells them apart as the source's group."
        return Line(
            False, "splits", f"{task.name}: {counts} are in train too, so that results would be too good; {remedy}"
        )
    return Line(True, "splits", f"{task.name}: {counts} are in train too")


def balance(task: Task, data: MultiTaskDataModule) -> Line | None:
    """How often each choice is the answer; a choice without a training row cannot be learned."""
    if not task.choices:
        return None
    counts = Counter(data.examples(task.name, "train")["target"])
    total = sum(counts.values())
    missing = [choice for choice in task.choices if not counts[choice]]
    if missing:
        return Line(
            False,
            "labels",
            f"{task.name}: no training row has {', '.join(map(repr, missing[:5]))}{' and more' if len(missing) > 5 else ''}; "
            "add rows, raise limit.train, or take the choice out.",
        )
    most, *_, least = counts.most_common()
    return Line(
        True,
        "labels",
        f"{task.name}: {len(task.choices)} choices, from {least[0]} ({least[1]:,} rows, {least[1] / total:.1%}) to {most[0]} "
        f"({most[1]:,} rows, {most[1] / total:.1%})",
    )


def lengths(task: Task, data: MultiTaskDataModule, end: int) -> Line:
    """Token lengths, and how many prompts and targets were cut.

    Args:
        task: the task.
        data: set up.
        end: the token that ends a whole target.
    """
    train = data.examples(task.name, "train")
    prompts = np.array([len(ids) for ids in train["prompt_ids"]])
    targets = np.array([len(ids) for ids in train["target_ids"]])
    cut = data.statistics(task.name)["train"]["truncated"] / len(prompts)
    cut_targets = sum(ids[-1] != end for ids in train["target_ids"]) / len(prompts)
    spread = "median {:.0f}, 95% up to {:.0f}, longest {:.0f}"
    said = (
        f"{task.name}: prompt tokens {spread.format(*_quantiles(prompts))}, {cut:.1%} shortened; "
        f"target tokens {spread.format(*_quantiles(targets))}, {cut_targets:.1%} cut"
    )
    if cut > MOST_TRUNCATED:
        return Line(False, "tokens", f"{said}; raise max_prompt_tokens, or shorten the prompt.")
    return Line(True, "tokens", said)


def spelled(task: Task, data: MultiTaskDataModule, tokenizer: Any) -> Line:
    """Whether the tokenizer can write the targets: what it has no token for can neither be learned nor answered."""
    train = data.examples(task.name, "train")
    train = train.select(sorted(random.Random(0).sample(range(len(train)), min(len(train), MOST_SPELT))))
    whole = [
        (target, tokenizer.decode(ids, skip_special_tokens=True))
        for target, ids in zip(train["target"], train["target_ids"], strict=True)
        if ids[-1] == tokenizer.eos_token_id
    ]
    # how many spaces there are is the metrics' matter
    wrong = [(target, written) for target, written in whole if "".join(target.split()) != "".join(written.split())]
    share = len(wrong) / max(len(whole), 1)
    if share > MOST_MISSPELT:
        target, written = wrong[0]
        return Line(
            False,
            "letters",
            f"{task.name}: the tokenizer cannot write {share:.1%} of the targets; {_short(target)!r} becomes {_short(written)!r}; "
            "put other signs into the target, or take another backbone.",
        )
    return Line(True, "letters", f"{task.name}: the tokenizer can write {1 - share:.1%} of the targets")


def _quantiles(values: np.ndarray) -> list[float]:
    return np.quantile(values, [0.5, 0.95, 1.0]).tolist()


def examples(task: Task, data: MultiTaskDataModule) -> Line:
    """Three training examples as the model sees them: from the start, the middle and the end."""
    rows = data.examples(task.name, "train")
    places = sorted({0, len(rows) // 2, len(rows) - 1})[:EXAMPLES]
    detail = []
    for place in places:
        row = rows[place]
        *prompt, last = row["prompt"].splitlines() or [""]
        detail += [*(f"| {_short(line)}" for line in prompt), f"| {_short(last)} -> {_short(row['target'])}", ""]
    return Line(None, "examples", f"{task.name}: {len(places)} of them", detail[:-1])


def _short(text: str) -> str:
    """A long line without its middle, on two lines of the terminal at most."""
    room = 2 * (terminal.width() - 24)
    return text if len(text) <= room else f"{text[: 2 * room // 3]} ... {text[-room // 3 :]}"


def rates(data: MultiTaskDataModule) -> Line:
    """Each task's share of the draws as a bar."""
    names = [task.name for task in data.tasks]
    width = max(map(len, names))
    room = min(BAR, max(8, terminal.width() - width - 48))  # what the other columns leave
    longest = max(data.rates)
    detail = [
        f"{name:<{width}}  {'█' * max(1, round(room * rate / longest)):<{room}} {rate:>6.1%}  "
        f"{rate * data.draws / size:.2g} x its {size:,} rows"
        for name, rate, size in zip(names, data.rates, data.sizes, strict=True)
    ]
    return Line(None, "rates", f"at temperature {data.temperature:g}, {data.draws:,} draws an epoch", detail)


def backbone(name: str, folder: Path, precision: str, arguments: dict[str, Any]) -> Line:
    """Loads the backbone and says where adapters go.

    Args:
        name: as the recipe has it.
        folder: where it was found.
        precision: of the recipe.
        arguments: of stage 1's model.
    """
    from alter.nn.backbone import load_backbone
    from alter.nn.feed_forward import find_feed_forwards, select_layers

    try:
        model = load_backbone(str(folder), precision)
        blocks = find_feed_forwards(model, arguments.get("ffn"))
        chosen = select_layers(blocks, arguments.get("layers", "last:4"))
    except AlterError as error:
        return Line(False, "backbone", " ".join(error.messages))
    size = sum(parameter.numel() for parameter in model.parameters())
    first, last = chosen[0].name, chosen[-1].name
    detail = [f"adapters in {len(chosen)} of {len(blocks)} feed-forward blocks: {first} to {last}"]
    return Line(True, "backbone", f"{name}: {type(model).__name__}, {size / 1e6:,.0f}M parameters, in {folder}", detail)


def machine(precision: str, accelerator: str = "auto") -> Iterator[Line]:
    """GPU, SLURM, bf16 and bitsandbytes, for a recipe's precision and Lightning's accelerator."""
    import torch

    if torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        cards = ", ".join(f"{count} x {name}" for name, count in names.items())
        free = torch.cuda.mem_get_info()[0]
        yield Line(True, "GPU", f"{cards}; {free / 2**30:.1f} GiB free on the first")
    else:
        yield Line(None, "GPU", f"none; {os.cpu_count()} CPU cores")
    if job := os.environ.get("SLURM_JOB_ID"):
        yield Line(True, "SLURM", f"inside job {job}, {os.environ.get('SLURM_NTASKS', '1')} tasks")
    else:
        yield Line(None, "SLURM", "sbatch is here" if shutil.which("sbatch") else "none")
    if slow := slow_precision(precision, accelerator):
        yield Line(False, "precision", slow)
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        needed = precision in QUANTISED
        yield Line(
            False if needed else None,
            "bitsandbytes",
            f"not installed{f', and precision {precision} needs it: pip install bitsandbytes' if needed else ''}",
        )
    else:
        yield Line(True, "bitsandbytes", f"{found}; this recipe's precision is {precision}")


def available_memory() -> int | None:
    """Bytes of the host that a process can still take, by the kernel and by the container's own bound."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    bounds = [free]
    group = Path("/sys/fs/cgroup")
    if (limit := group / "memory.max").is_file() and (used := group / "memory.current").is_file():
        text = limit.read_text().strip()
        bounds += [int(text) - int(used.read_text())] if text.isdigit() else []
    return min(bounds)


def fits(needed: int, available: int | None, what: str) -> Line:
    """Whether the estimated memory is there."""
    said = f"{what}: about {needed / 2**30:.1f} GiB at the peak"
    if available is None:
        return Line(None, "memory", said)
    said += f", {available / 2**30:.1f} GiB available"
    if needed > available:
        return Line(False, "memory", f"{said}; {LESS_MEMORY}.")
    return Line(True, "memory", said)
