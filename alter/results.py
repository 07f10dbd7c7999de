"""`results.json` and the table people read: each metric with its interval, beside three references on the same rows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alter import terminal
from alter.metrics import bootstrap_interval, metric

REFERENCES = {"majority": "majority", "backbone": "backbone", "tfidf": "TF-IDF"}  # key in the file -> name in the table
STEPS = ("data", "stage1", "stage2", "test")
_DIGITS = 6


def task_results(
    metrics: Sequence[str],
    targets: Sequence[str],
    predictions: Sequence[str],
    references: Mapping[str, Sequence[str] | None],
    choices: Sequence[str] | None,
) -> dict[str, Any]:
    """Measures one task's model and references on the same rows.

    Args:
        metrics: names from `alter.metrics.KNOWN`.
        targets: what is right, one a row.
        predictions: what the model answered.
        references: what each of `REFERENCES` answered; None where it makes no sense.
        choices: the labels of a classification, else None.

    Returns:
        `{metric: {"value", "low", "high", "n", "references": {name: {"value", "low", "high"} or None}}}`.
    """
    return {
        name: {
            **with_interval(name, predictions, targets, choices),
            "n": len(targets),
            "references": {
                reference: None if answer is None else with_interval(name, answer, targets, choices)
                for reference, answer in references.items()
            },
        }
        for name in metrics
    }


def with_interval(
    name: str, predictions: Sequence[str], targets: Sequence[str], choices: Sequence[str] | None
) -> dict[str, float]:
    """A metric's value with its bootstrap interval."""
    measured = metric(name, predictions, targets, choices)
    low, high = bootstrap_interval(measured)
    return {"value": round(measured.value(), _DIGITS), "low": round(low, _DIGITS), "high": round(high, _DIGITS)}


def run_results(
    tasks: Mapping[str, Any],
    seconds: Mapping[str, float | None],
    peak_memory: int,
    trainable_parameters: int,
    peak_device_memory: int | None = None,
) -> dict[str, Any]:
    """Returns the whole of `results.json`.

    Args:
        tasks: a `task_results` for each task's name.
        seconds: how long each of `STEPS` took; one that did not run becomes null.
        peak_memory: see `alter.machine.peak_memory_bytes`.
        trainable_parameters: the number of parameters that either stage trained.
        peak_device_memory: see `alter.machine.peak_device_memory_bytes`; the key is there only when it is given.
    """
    results = {
        "tasks": dict(tasks),
        "seconds": {step: seconds.get(step) for step in STEPS},
        "peak_memory_bytes": peak_memory,
        "trainable_parameters": trainable_parameters,
    }
    if peak_device_memory is not None:
        results["peak_device_memory_bytes"] = peak_device_memory
    return results


# The table. A mark stands behind a reference that the model does not clearly beat; the notes below say it in words.


class Verdict(NamedTuple):
    """How a reference stands to the model."""

    above: bool
    overlap: bool

    @property
    def mark(self) -> str:
        """The signs behind the reference's cell."""
        return ("*" if self.above else "") + ("~" if self.overlap else "")


def verdict(model: Mapping[str, float], reference: Mapping[str, float]) -> Verdict:
    """Returns whether the reference's value is above the model's, and whether their intervals overlap."""
    return Verdict(reference["value"] > model["value"], overlap(model, reference))


def overlap(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two intervals do."""
    return one["low"] <= other["high"] and other["low"] <= one["high"]


def render_table(results: Mapping[str, Any]) -> str:
    """Returns the results as plain text, as wide as the terminal; below 110 columns without the references' intervals."""
    room = terminal.width()
    full = room >= terminal.WIDEST
    cell = 24 if full else 12  # characters of a reference
    heads = f"{'  metric':<14}{'model [95% interval]':<24}" + "".join(f"{name:<{cell}}" for name in REFERENCES.values())
    lines = [heads.rstrip(), "-" * room]
    for task, metrics in results["tasks"].items():
        ns = {entry["n"] for entry in metrics.values()}
        lines.append(terminal.cut(f"{task}  (n = {', '.join(f'{n:,}' for n in sorted(ns))})", room))
        for name, entry in metrics.items():
            others = "".join(f"{marked(entry, reference, full):<{cell}}" for reference in REFERENCES)
            if len(name) > 11:  # a name such as recall[out of scope] stands above its numbers
                lines.append(terminal.cut(f"  {name}", room))
                name = ""
            lines.append(f"  {name:<12}{measured(entry):<24}{others}".rstrip())
    lines.append("-" * room)
    for note in _notes(results):
        lines += textwrap.wrap(note, room, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def measured(entry: Mapping[str, float] | None, interval: bool = True) -> str:
    """A value and, where asked, its interval."""
    if entry is None:
        return "-"
    return f"{entry['value']:.3f}" + (f" [{entry['low']:.3f}, {entry['high']:.3f}]" if interval else "")


def marked(entry: Mapping[str, Any], reference: str, interval: bool = True) -> str:
    """A reference's cell: its value, and how it stands to the model."""
    other = entry["references"].get(reference)
    return "-" if other is None else f"{measured(other, interval)} {verdict(entry, other).mark}".rstrip()


def _notes(results: Mapping[str, Any]) -> Iterator[str]:
    above: dict[str, list[str]] = {}
    near: dict[str, list[str]] = {}
    compared = False
    for reference, where, found in _verdicts(results):
        compared = True
        if found.above:
            above.setdefault(reference, []).append(where)
        if found.overlap:
            near.setdefault(reference, []).append(where)
    if compared and not above and not near:
        yield "The model is above every reference, intervals apart."
    for reference, places in above.items():
        yield f"* {_capitalised(reference)} is above the model on: {', '.join(places)}."
    for reference, places in near.items():
        yield f"~ {_capitalised(reference)} has an interval that overlaps the model's on: {', '.join(places)}."
    yield from _costs(results)


def spoken(reference: str) -> str:
    """A reference in a sentence."""
    return {"majority": "the majority class", "backbone": "the untouched backbone"}.get(
        reference, REFERENCES.get(reference, reference)
    )


def _capitalised(reference: str) -> str:
    name = spoken(reference)
    return name[0].upper() + name[1:]


def _verdicts(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Verdict]]:
    """Yields (reference, "task metric", verdict), reference by reference."""
    for reference in REFERENCES:
        for task, metrics in results["tasks"].items():
            for name, entry in metrics.items():
                other = entry["references"].get(reference)
                if other is not None:
                    yield reference, f"{task} {name}", verdict(entry, other)


def _costs(results: Mapping[str, Any]) -> Iterator[str]:
    parts = [f"{step} {took:,.0f} s" for step, took in results.get("seconds", {}).items() if took is not None]
    memory = {"peak_memory_bytes": "peak memory", "peak_device_memory_bytes": "peak device memory"}
    parts += [f"{name} {results[key] / 2**30:.2f} GiB" for key, name in memory.items() if results.get(key)]
    if results.get("trainable_parameters"):
        parts.append(f"{results['trainable_parameters']:,} parameters trained")
    if parts:
        yield "; ".join(parts) + "."
