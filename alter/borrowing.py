"""Who takes from whose expert: what a task that was added borrows, and who may use the expert of one that leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alter.nn.gates import expert_names, newcomer_gates
from alter.nn.model import MTAModel


def borrowed(model: MTAModel, task: str) -> dict[str, Any]:
    """What a task that was added later takes from whom: its shares of the mixture.

    Returns:
        ``experts``, the share of every task's expert and of its own, ``shared``, that of the shared experts together, each
        the mean over the layers and all together 1; and ``layers``, the same a layer.
    """
    place = model.tasks.index(task) - model.base_tasks
    gates = newcomer_gates(model, place)
    names = expert_names(model)
    layers: dict[str, Any] = {}
    for layer, experts in gates["experts"].items():
        keep = float(gates["shared"][layer][0]) if "shared" in gates else 1.0
        shares = dict(zip(names, (keep * experts).tolist(), strict=True))
        others = {name for name in model.tasks[model.base_tasks :] if name != task}  # it takes nothing from these
        layers[layer] = {
            "experts": {name: share for name, share in shares.items() if name not in others},
            "shared": 1.0 - keep,
        }
    rows = list(layers.values())
    mean = {name: sum(row["experts"][name] for row in rows) / len(rows) for name in rows[0]["experts"]}
    return {"experts": mean, "shared": sum(row["shared"] for row in rows) / len(rows), "layers": layers}


def describe(task: str, found: Mapping[str, Any]) -> str:
    """``borrowed`` in words, the largest lender first."""
    own = found["experts"][task]
    lenders = sorted(((share, name) for name, share in found["experts"].items() if name != task), reverse=True)
    lines = [f"{task} takes {own:.0%} from its own expert (mean over the layers), and borrows"]
    lines += [f"  {share:>6.1%}  from {name}" for share, name in lenders]
    if found["shared"]:
        lines.append(f"  {found['shared']:>6.1%}  from the shared experts")
    return "\n".join(lines)


def borrowers(model: MTAModel, name: str) -> list[str]:
    """Who may use a task's expert, with the mean share where it does not depend on the tokens."""
    place = model.tasks.index(name)
    layers = list(model.layers.values())
    if model.num_experts != model.base_tasks:
        return ["the experts are no task's own"]
    if not layers[0].router.reads_task_alone:
        return [f"{type(layers[0].router).__name__} decides at every token"]
    found = []
    for index, task in enumerate(model.tasks[: model.base_tasks]):
        share = sum(float(layer.router.task_gates(index)[place]) for layer in layers) / len(layers)
        if task not in (name, *model.retired):
            found.append(f"{task} {share:.1%}")
    return found
