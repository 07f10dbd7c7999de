"""Baselines that change the backbone itself, trained and answered as ALTER's models are.

Full fine-tuning, and the peft library's LoRA and Polytropon in the blocks where ALTER's experts would be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from alter.errors import AlterError
from alter.nn.backbone import load_backbone
from alter.nn.files import write_tensors
from alter.nn.model import MTAModel
from alter.nn.trunk_cache import TrunkCache
from alter.stages.base import StageModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["full", "lora", "poly"]
WEIGHTS, SETTINGS = "weights.safetensors", "baseline.json"


class BaselineModel(MTAModel):
    """A backbone without experts, of which all weights or peft's layers train.

    Args:
        backbone: a Hugging Face causal or seq2seq language model.
        tasks: names; a task's id is its place here.
        layers: the blocks that peft's layers go to, as `MTAModel` takes them.
        ffn: pattern of the blocks' names, as `MTAModel` takes it.
        kind: full, peft's LoRA, or peft's Polytropon with as many skills as tasks.
        rank: of the LoRA, or of each skill.

    Raises:
        AlterError: peft is not installed, or does not take this backbone.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tasks: Sequence[str],
        layers: str | list[int] = "last:4",
        ffn: str | None = None,
        kind: Kind = "lora",
        rank: int = 16,
    ) -> None:
        super().__init__(backbone, tasks, layers, ffn)
        self.settings = {"tasks": list(tasks), "layers": layers, "ffn": ffn, "kind": kind, "rank": rank}
        if kind == "full":
            self.backbone.requires_grad_(True)
        else:
            self._add_peft(kind, rank)

    def _add_peft(self, kind: Kind, rank: int) -> None:
        maps = {id(layer.frozen.module(role)) for layer in self.layers.values() for role in layer.frozen.shapes}
        targets = [name for name, module in self.backbone.named_modules() if id(module) in maps]
        import peft  # whose absence the plan of a comparison has told

        if kind == "lora":
            config: Any = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        else:
            config = peft.PolyConfig(r=rank, n_tasks=len(self.tasks), n_skills=len(self.tasks), target_modules=targets)
        try:
            peft.inject_adapter_in_model(config, self.backbone)
        except TypeError as error:
            raise AlterError(
                f"--methods: peft's {kind} does not take this backbone ({error}); leave the method out."
            ) from error
        for parameter in self.tuned().values():
            parameter.data = parameter.data.float()  # peft makes them in the backbone's precision
        for module in self.backbone.modules():
            if hasattr(module, "poly_router"):
                module.register_forward_pre_hook(self._tell_tasks, with_kwargs=True)

    def _tell_tasks(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "task_ids": self.routing.rows(len(args[0]))}

    def tuned(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        parameters = dict(self.backbone.named_parameters())
        if self.settings["kind"] == "full":
            return parameters
        return {name: p for name, p in parameters.items() if ".lora_" in name or ".poly_" in name}

    def part_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that train, and the backbone's others."""
        own = self.tuned()
        return {
            "backbone": [p for name, p in self.backbone.named_parameters() if name not in own],
            "tuned": list(own.values()),
        }

    def trained_tensors(self) -> dict[str, Tensor]:
        """The tensors that train, by name."""
        return {name: parameter.data for name, parameter in self.tuned().items()}

    def save_pretrained(self, folder: str | Path, backbone: str, trained: Mapping[str, Tensor] | None = None) -> None:
        """Writes the settings and the tensors that train."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, trained or self.trained_state())
        (folder / SETTINGS).write_text(json.dumps({**self.settings, "backbone": str(backbone)}, indent=2))

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: str | None = None, precision: str = "fp32") -> Self:
        """Restores what ``save_pretrained`` wrote."""
        from safetensors.torch import load_file

        settings = json.loads(Path(folder, SETTINGS).read_text())
        name = settings.pop("backbone")
        model = cls(load_backbone(backbone or name, precision), **settings)
        model.load_trained_state(load_file(Path(folder, WEIGHTS)), str(folder))
        return model.eval()


class BaselineModule(StageModule):
    """Trains a baseline as stage 1 trains experts.

    Args:
        backbone: name or folder, set by the recipe's ``backbone``.
        tasks: names, set by the recipe's ``data.tasks``.
        precision: of the backbone, set by the recipe's ``precision``.
        layers: blocks, as `Stage1Module` takes them.
        ffn: pattern of the blocks' names.
        kind: full, peft's LoRA or peft's Polytropon.
        rank: of the LoRA, or of each skill.
        optimizer: class and arguments.
        trunk_cache: how the states below the first adapter are kept, set by the recipe's ``trunk_cache``; full
            fine-tuning moves them and keeps none.
        kwargs: as for ``StageModule``.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        tasks: list[str] | None = None,
        precision: str = "fp32",
        layers: str | list[int] = "last:4",
        ffn: str | None = None,
        kind: Kind = "lora",
        rank: int = 16,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0),
        trunk_cache: TrunkCache | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, trunk_cache=None if kind == "full" else trunk_cache, **kwargs)
        self.backbone = backbone
        self.tasks = tasks or []
        self.precision = precision
        self.layers = layers
        self.ffn = ffn
        self.kind: Kind = kind
        self.rank = rank

    def make_model(self) -> BaselineModel:
        """The backbone, with fresh layers of peft's where they are asked for."""
        backbone = load_backbone(self.backbone, self.precision)
        return BaselineModel(backbone, self.tasks, self.layers, self.ffn, self.kind, self.rank)

    def learning_rates(self) -> dict[str, float]:
        """All that is tuned, at one rate."""
        return {"tuned": 1.0}
