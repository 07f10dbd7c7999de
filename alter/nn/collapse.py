"""One task of a model as a plain model: its adapters merged into the backbone, or concatenated into one adapter.

Both are exact, and only possible where the gates depend on the task alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alter.errors import AlterError
from alter.nn.experts import Bottleneck
from alter.nn.experts.base import Linears
from alter.nn.model import MTAModel
from alter.nn.mta import MixtureOfTaskAdapters
from alter.nn.routers import TaskSelector


def refuse_other_inputs(model: MTAModel) -> None:
    """Checks that routing needs nothing but the task.

    Raises:
        AlterError: a router reads more than the task.
    """
    layer = next(iter(model.layers.values()))
    for router, stage in ((layer.router, 1), (layer.shared_router, 2)):
        if router is None or router.reads_task_alone:
            continue
        what = "the prompt" if router.reads_prompt else "the hidden states"
        remedies = ["export the model of stage 1 (--stage stage1)"] if stage == 2 else []
        if not (router.reads_prompt or router.reads_sequence):
            remedies.append("take --format onnx, which keeps the routers")
        remedies.append("use the model as it is (--format alter, alter.load)")
        raise AlterError(
            f"{type(router).__name__}, the router of stage {stage}, reads {what}, so no fixed weights answer for a task; "
            f"{', or '.join(remedies)}."
        )


@contextmanager
def merged(model: MTAModel, task: str) -> Iterator[PreTrainedModel]:
    """The backbone as a plain model that answers one task as the model does, for as long as the context lasts.

    Args:
        model: in evaluation mode, not quantised.
        task: a name.

    Yields:
        the backbone, without any adapter.

    Raises:
        AlterError: a router reads more than the task, or the mixture is no feed-forward of the backbone's shape.
    """
    task_id = _trained_task(model, task)
    refuse_other_inputs(model)
    found = [(layer, _merged_layer(layer, task_id)) for layer in model.layers.values()]
    paths = {module: path for path, module in model.backbone.named_modules()}
    before: list[tuple[torch.nn.Parameter, Tensor]] = []
    try:
        for layer, linears in found:
            model.backbone.set_submodule(paths[layer], layer.ffn)
            for role, (weight, bias) in linears.items():
                linear = layer.frozen.module(role)
                transposed = type(linear).__name__ == "Conv1D"  # GPT-2's linear map keeps [in, out]
                for name, value in (("weight", weight.T if transposed else weight), ("bias", bias)):
                    if value is not None:
                        parameter = linear.get_parameter(name)
                        before.append((parameter, parameter.data))
                        parameter.data = value.to(parameter.dtype).contiguous()
        yield model.backbone
    finally:
        for parameter, value in before:
            parameter.data = value
        for layer, _ in found:
            model.backbone.set_submodule(paths[layer], layer)


def _trained_task(model: MTAModel, task: str) -> int:
    task_id = model.tasks.index(task)
    if task_id >= model.base_tasks:
        graph = not any(router.reads_prompt or router.reads_sequence for router in model.routers())
        raise AlterError(
            f"The task '{task}' was added later and adds up outputs of its own expert and of others, which is no single "
            f"feed-forward; {'take --format onnx, or ' if graph else ''}use the model as it is (--format alter, alter.load)."
        )
    return task_id


def _merged_layer(layer: MixtureOfTaskAdapters, task_id: int) -> Linears:
    if layer.shared is not None:
        raise AlterError(
            "The model of stage 2 adds up the outputs of several experts, which is no single feed-forward; export the model "
            "of stage 1 (--stage stage1), or take --format onnx."
        )
    linears = layer.experts.merged(layer.router.task_gates(task_id), layer.frozen, task_id)
    if linears is None:
        name = type(layer.experts).__name__
        remedy = "take --format adapter" if isinstance(layer.experts, Bottleneck) else "take --format onnx"
        raise AlterError(
            f"The task's mixture of {name} experts is no feed-forward of the backbone's shape, so it cannot be merged into "
            f"it; {remedy}, or train with LoRA experts."
        )
    return linears


def one_adapter(model: MTAModel, task: str, backbone: PreTrainedModel) -> MTAModel:
    """A model with one task and one expert, the concatenation of those that answer the task.

    Args:
        model: in evaluation mode, of parallel bottlenecks.
        task: a name.
        backbone: the model's, loaded anew.

    Raises:
        AlterError: a router reads more than the task, or the experts do not concatenate.
    """
    found = joined_experts(model, task)
    rank = max(expert.rank for expert in found)
    plain = MTAModel(backbone, [task], *model.placement)
    plain.add_experts(Bottleneck(rank, found[0].activation), TaskSelector(hard=True))
    with torch.no_grad():
        for layer, expert in zip(plain.layers.values(), found, strict=True):
            layer.experts.get_parameter("down").zero_()[..., : expert.rank] = expert.down
            layer.experts.get_parameter("up").zero_()[:, : expert.rank] = expert.up
    if model.has_own_backbone:
        plain.take_backbone(model)
    return plain.eval()


def joined_experts(model: MTAModel, task: str) -> list[Bottleneck]:
    """The one expert of each layer that ``one_adapter`` has.

    Raises:
        AlterError: as there.
    """
    task_id = _trained_task(model, task)
    refuse_other_inputs(model)
    return [_one_expert(layer, task_id) for layer in model.layers.values()]


def _one_expert(layer: MixtureOfTaskAdapters, task_id: int) -> Bottleneck:
    gates = layer.router.task_gates(task_id)
    parts = [(layer.experts, gates)]
    if layer.shared is not None:
        shares = layer.shared_router.task_gates(task_id)
        parts = [(layer.experts, shares[0] * gates), (layer.shared, shares[1:])]
    found = [(expert, weights) for expert, weights in parts if isinstance(expert, Bottleneck)]
    if len(found) < len(parts):
        raise AlterError(
            "--format adapter is for Bottleneck experts, which join into one; this run has others, so take --format hf for "
            "experts that change its weights, such as LoRA."
        )
    if len({expert.activation for expert, _ in found}) > 1:
        raise AlterError(
            "The task experts and the shared experts have different activations, so they do not concatenate into one "
            "adapter; take --format onnx."
        )
    return Bottleneck.joined([expert.concatenated(weights) for expert, weights in found])
