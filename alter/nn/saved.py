"""What a model folder says of a model, and the model that it makes again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from alter.errors import AlterError
from alter.nn.backbone import QUANTISED, backbone_fingerprint, load_backbone, resolve_backbone, whole_name
from alter.nn.experts import Expert
from alter.nn.files import CONFIG_FILE, WEIGHTS_FILE, read_config, read_weights
from alter.nn.routers import Router
from alter.nn.template import make_template

if TYPE_CHECKING:
    from alter.nn.model import MTAModel

Model = TypeVar("Model", bound="MTAModel")


def describe(model: MTAModel, backbone: str) -> dict[str, Any]:
    """All of a model but its tensors, as JSON takes it.

    Args:
        model: to save.
        backbone: the name or folder of its backbone, as ``load_backbone`` takes it.
    """
    layer = next(iter(model.layers.values()))
    layers, ffn = model.placement
    return {
        "backbone": {
            "name": whole_name(backbone),
            "fingerprint": backbone_fingerprint(resolve_backbone(backbone)),
        },
        "tasks": model.tasks,
        "layers": layers,
        "ffn": ffn,
        "parts": {name: part.describe() for name, part in layer.templates().items()},
        "newcomers": [newcomer.expert.describe() for newcomer in layer.newcomers],
        "retired": model.retired,
        "num_experts": model.num_experts,
        "num_shared": model.num_shared,
        "own_backbone": model.has_own_backbone,
    }


def restore(kind: type[Model], folder: Path, backbone: str | None, precision: str) -> Model:
    """Makes a model from its folder; see ``MTAModel.from_pretrained``.

    Args:
        kind: the class of the model.
        folder: of the adapters.
        backbone: where the backbone is, when not where it was.
        precision: of the backbone.

    Raises:
        AlterError: a file is missing or damaged, a key is missing, surplus or misshapen, or the backbone is another.
    """
    config = read_config(folder)
    path = resolve_backbone(backbone or config["backbone"]["name"])
    if backbone_fingerprint(path) != config["backbone"]["fingerprint"]:
        raise AlterError(
            f"{folder / CONFIG_FILE}: the adapters were trained on another backbone than {path} (they name "
            f"'{config['backbone']['name']}'); name the right one by --backbone, or as the argument backbone."
        )
    newcomers = config.get("newcomers", [])  # absent in files from before there were any
    tasks, first = config["tasks"], len(config["tasks"]) - len(newcomers)
    model = kind(load_backbone(str(path), precision), tasks[:first], config["layers"], config["ffn"])
    parts, where = config["parts"], str(folder / CONFIG_FILE)
    with _Undrawn():
        model.add_experts(
            make_template(parts["experts"], Expert, where),
            make_template(parts["router"], Router, where),
            num_experts=config.get("num_experts"),  # absent in files from when there was always one a task
        )
        if "shared" in parts:
            model.add_shared(
                make_template(parts["shared"], Expert, where),
                config["num_shared"],
                make_template(parts["shared_router"], Router, where),
            )
        for task, expert in zip(tasks[first:], newcomers, strict=True):
            model.add_newcomer(task, make_template(expert, Expert, where))
    model.retired = list(config.get("retired", []))
    if config.get("own_backbone"):
        if precision in QUANTISED:
            raise AlterError(
                f"{where}: the backbone was trained too, so its precision cannot be {precision}; load it as fp32 or bf16."
            )
        model.own_backbone()
    model.load_trained_state(read_weights(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """Within it, first weights are zero where they would be drawn, which takes long; they are loaded next."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0].zero_()
        return (torch.zeros if func is torch.randn else func)(*args, **(kwargs or {}))
