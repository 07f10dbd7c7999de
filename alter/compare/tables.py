"""The comparison as Markdown, and as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alter import markup
from alter.metrics import RESAMPLES
from alter.writing import write_text


def markdown(result: Mapping[str, Any]) -> str:
    """The tables as Markdown: results, cost, and what the mixture does to each task."""
    parts = [
        _table(*results_table(result)),
        "",
        *notes(result),
        "",
        _table(*cost_table(result)),
    ]
    if "negative_transfer" in result:
        parts += ["", TRANSFER, "", _table(*transfer_table(result))]
    return "\n".join(parts) + "\n"


ROUTING = (
    "Mean gate of each task (rows) on each expert (columns), by layer, on validation examples; the first seed. Under “shared”, "
    "column 0 is the mixture of task experts."
)
TRANSFER = (
    "Each task against the same task trained alone, in points (first metric x 100) with 95% intervals; in bold where these "
    "leave out zero."
)


def results_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the average x 100, the differences from the best baseline and from two stages, each task's first metric."""
    metrics = result["primary_metrics"]
    others = _others(result)
    head = ["method", "average", *(f"against {other}" for other in others.values())]
    head += [f"{task} ({metric})" for task, metric in metrics.items()]
    best = max((m["average"]["mean"] for m in result["methods"].values()), default=0.0)
    rows = []
    for name, method in result["methods"].items():
        cells = [_spread(method["tasks"][task][metric]) for task, metric in metrics.items()]
        average = _spread(method["average"])
        rows.append(
            [
                f"{name}{' (baseline)' if method['baseline'] else ''}",
                f"**{average}**" if method["average"]["mean"] == best else average,
                *("" if name == other else _difference(method[key]) for key, other in others.items()),
                *cells,
            ]
        )
    return head, rows


def _others(result: Mapping[str, Any]) -> dict[str, str]:
    """Whom the methods are set against, by the key of the difference."""
    others = {"vs_best_baseline": result["best_baseline"], "vs_two_stage": "two_stage"}
    known = {
        key for name, method in result["methods"].items() for key in others if name != others[key] and method.get(key)
    }
    return {key: other for key, other in others.items() if key in known}


def cost_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each method is and takes."""
    head = [
        "method",
        "what it is",
        "trained parameters",
        "tokens seen",
        "validation loss",
        "tokens/s",
        "peak memory",
        "lr x",
    ]
    rows = [
        [
            name,
            method["about"],
            f"{method['trainable_parameters']:,}",
            _number(method["tokens"]),
            "-" if method.get("validation_loss") is None else f"{method['validation_loss']:.3f}",
            _number(method["tokens_per_second"]),
            f"{method['peak_memory_bytes'] / 2**30:.1f} GiB",
            f"{method['learning_rate_factor']:g}",
        ]
        for name, method in result["methods"].items()
    ]
    return head, rows


def transfer_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: every method's tasks against their alone-trained selves."""
    tasks = list(result["primary_metrics"])
    rows = []
    for name, differences in result["negative_transfer"].items():
        cells = []
        for task in tasks:
            found = differences[task]
            text = _interval(found)
            cells.append(f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text)
        rows.append([name, *cells])
    return ["method", *tasks], rows


def notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know beside the numbers."""
    seeds = result["seeds"]
    spread = "mean ± standard deviation over the seeds" if len(seeds) > 1 else "one seed"
    yield f"- Split: {result['split']}. Seeds: {', '.join(map(str, seeds))}; {spread}. All metrics x 100."
    if result["best_baseline"]:
        yield f"- Best baseline: {result['best_baseline']}."
    if _others(result):
        over = (
            "seeds and rows"
            if len(seeds) > 1
            else "rows alone, so that what another training seed would change is not in it"
        )
        yield f"- Differences of the average: 95% interval and two-sided p of a paired bootstrap over {over}."
    if "parameter_budget" in result:
        budget = result["parameter_budget"]
        trained = {name: method["trainable_parameters"] for name, method in result["methods"].items()}
        apart = [name for name, count in trained.items() if count and abs(count / budget - 1) > 0.1]
        yield (
            f"- Parameter budget: {budget:,}, that of the recipe's two stages; every method that trains is within 10% of it"
            f"{', except ' if apart else ''}{', '.join(apart)}."
        )
    if "backbone" in result:
        backbone = result["backbone"]
        yield (
            f"- Backbone: {backbone['name']}, {backbone['parameters']:,} parameters, fingerprint {backbone['fingerprint'][:12]}."
        )
    for key in ("command", "commit", "hardware", "hours"):
        if result.get(key):
            yield f"- {key.capitalize()}: {result[key]}"


def _spread(found: Mapping[str, Any]) -> str:
    sd = "" if found["sd"] is None else f" ± {100 * found['sd']:.1f}"
    return f"{100 * found['mean']:.1f}{sd}"


def _difference(found: Mapping[str, float]) -> str:
    least = 2 / (RESAMPLES + 1)  # which is told where no draw crosses zero
    p = f"p ≤ {least:.3f}" if found["p"] <= least else f"p = {found['p']:.3f}"
    return f"{_interval(found)}, {p}"


def _interval(found: Mapping[str, float]) -> str:
    difference, low, high = (100 * found[key] for key in ("difference", "low", "high"))
    return f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def _number(value: float | None) -> str:
    return "" if not value else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:" if number else "---" for number in markup.numeric(rows)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# -- HTML -------------------------------------------------------------------------------------------------------------


def page(result: Mapping[str, Any], title: str, drawn: Mapping[str, Mapping[str, str]]) -> str:
    """One self-contained HTML page: the tables and the routing's pictures."""
    parts = [
        markup.bullets([note[2:] for note in notes(result)]),
        "<h2>Results</h2>",
        markup.table(*results_table(result)),
        "<h2>Cost</h2>",
        markup.table(*cost_table(result)),
    ]
    if "negative_transfer" in result:
        parts += ["<h2>Against training alone</h2>", f"<p>{TRANSFER}</p>", markup.table(*transfer_table(result))]
    if drawn:
        parts.append(f"<h2>Routing</h2><p>{ROUTING}</p>")
        parts += [
            markup.folded(name, "".join(markup.figure(svg, kind) for kind, svg in kinds.items()))
            for name, kinds in drawn.items()
        ]
    return markup.page(title, parts)


def routing_pictures(result: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By method and kind of gate the picture of its routing: an SVG of task by expert, for every layer."""
    from alter import pictures  # matplotlib takes a second

    tasks = list(result["primary_metrics"])
    drawn: dict[str, dict[str, str]] = {}
    for name, method in result["methods"].items():
        for kind, layers in method["routing"].items():
            columns = [str(i) for i in range(len(next(iter(layers.values()))[0]))]
            drawn.setdefault(name, {})[kind] = pictures.svg(pictures.heatmaps(layers, tasks, columns))
    return drawn


def with_heatmaps(text: str, drawn: Mapping[str, Mapping[str, str]], folder: Path) -> str:
    """The tables as Markdown with the routing's pictures, which are written to the folder that the Markdown is to stand in."""
    lines = []
    for name, kinds in drawn.items():
        for kind, svg in kinds.items():
            file = Path("routing") / f"{name}.{kind}.svg"
            (folder / file).parent.mkdir(exist_ok=True)
            write_text(folder / file, svg)
            lines += ["", f"![{name}: {kind}]({quote(file.as_posix())})"]
    return "\n".join([text, ROUTING, *lines, ""]) if lines else text
