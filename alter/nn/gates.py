"""Who answers what: the gates that routers return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alter.nn.model import MTAModel
from alter.nn.mta import MixtureOfTaskAdapters


@torch.inference_mode()
def mean_gates(model: MTAModel, batch: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The gates of every router, averaged over the tokens of one example.

    In the last block of a decoder-only model they are those of the tokens that are answered with, in the others those of
    the prompt too.

    Args:
        model: in evaluation mode.
        batch: a training batch of one example, so that nothing is padding.

    Returns:
        for ``experts`` and ``shared``, where the model has such a router: layer to gates, [experts]. Behind the task
        experts stand those of the tasks that were added later.
    """
    task = int(batch["task_ids"])
    if task >= model.base_tasks:
        return newcomer_gates(model, task - model.base_tasks)
    with _noted(model) as noted:
        model(batch)
    found: dict[str, dict[str, Tensor]] = {}
    for (kind, layer), gates in noted.items():
        mean = gates.float().mean((0, 1)).cpu()
        behind = len(model.tasks) - model.base_tasks if kind == "experts" else 0
        found.setdefault(kind, {})[layer] = nn.functional.pad(mean, (0, behind))
    return found


@torch.no_grad()
def newcomer_gates(model: MTAModel, place: int) -> dict[str, dict[str, Tensor]]:
    """The gates of a task that was added later, the same for all of its tokens; as ``mean_gates`` gives them.

    Args:
        model: with such tasks.
        place: which of them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, layer in model.layers.items():
        selector, gate = (shares.cpu() for shares in layer.newcomers[place].gates())
        experts = torch.zeros(layer.num_experts + len(layer.newcomers))
        experts[: layer.num_experts], experts[layer.num_experts + place] = selector[:-1], selector[-1]
        found.setdefault("experts", {})[name] = experts
        if layer.num_shared:
            found.setdefault("shared", {})[name] = gate
    return found


@contextmanager
def _noted(model: MTAModel) -> Iterator[dict[tuple[str, str], Tensor]]:
    """The gates that each router returns within the context."""
    noted: dict[tuple[str, str], Tensor] = {}
    handles = []
    for name, layer in model.layers.items():
        for kind, router in (("experts", layer.router), ("shared", layer.shared_router)):
            if router is not None:

                def note(module: nn.Module, args: Any, gates: Tensor, key: tuple[str, str] = (kind, name)) -> None:
                    noted[key] = gates

                handles.append(router.register_forward_hook(note))
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def expert_cosines(model: MTAModel, batch: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Compares experts by what they add to the same hidden states: the mean over tokens of cos(A_j(x), A_k(x)).

    Args:
        model: with trained experts.
        batch: as ``MTAModel.forward`` takes it.

    Returns:
        for ``experts`` and ``shared``, where there are two or more: ``{layer: [experts, experts]}``; 0 where an expert
        adds nothing.
    """
    found: dict[str, dict[str, Tensor]] = {}
    handles = []
    for name, layer in model.layers.items():

        def compare(
            module: nn.Module, args: Any, gates: Tensor, name: str = name, layer: MixtureOfTaskAdapters = layer
        ) -> None:
            hidden_states, routing = args
            for kind, experts, count in (
                ("experts", layer.experts, layer.num_experts),
                ("shared", layer.shared, layer.num_shared),
            ):
                if experts is not None and count > 1:
                    added = experts.each(hidden_states, layer.frozen, routing)
                    if experts.contains_ffn:
                        added = added - layer.frozen.run(hidden_states, layer.frozen.linear).unsqueeze(-2)
                    added = nn.functional.normalize(added.float(), dim=-1).flatten(0, 1)
                    with torch.autocast(added.device.type, enabled=False):
                        cosines = torch.einsum("sjd,skd->jk", added, added) / len(added)
                    found.setdefault(kind, {})[name] = cosines.cpu()

        handles.append(layer.router.register_forward_hook(compare))
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def expert_names(model: MTAModel) -> list[str]:
    """What to call the task experts: by their tasks, where each has its own."""
    base, added = model.tasks[: model.base_tasks], model.tasks[model.base_tasks :]
    own = base if model.num_experts == len(base) else [f"expert {k + 1}" for k in range(model.num_experts)]
    return [*own, *added]
