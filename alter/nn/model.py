"""MTAModel: a frozen backbone with a mixture of task adapters in some of its feed-forward blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter.errors import AlterError, did_you_mean
from alter.nn.attention import recomputed_alike
from alter.nn.body import IGNORED, Body
from alter.nn.experts import Expert
from alter.nn.feed_forward import FeedForward, find_feed_forwards, select_layers
from alter.nn.files import copy_state, write_model
from alter.nn.frozen import FrozenFeedForward
from alter.nn.loss import token_losses
from alter.nn.mta import InlineMixture, MixtureOfTaskAdapters
from alter.nn.routers import Router, Routing
from alter.nn.saved import describe, restore
from alter.nn.sharding import gather, put_away
from alter.nn.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenLosses(NamedTuple):
    """The loss of every target token.

    Attributes:
        losses: [tokens], cross-entropy in nats.
        rows: [tokens], which example of the batch a token belongs to.
        auxiliary: the sum of the routers' own losses over the layers, a scalar; 0 in evaluation mode.
    """

    losses: Tensor
    rows: Tensor
    auxiliary: Tensor


class MTAModel(nn.Module):
    """A frozen backbone and its adapters.

    The backbone runs without dropout, so that it is one fixed function; it trains where ``train_backbone`` lets it, else adapters
    alone.

    Attributes:
        base_tasks: how many of the tasks were trained together; those after them were added later.
        retired: tasks that are no longer answered; their places stay, so that the others' ids do.
        standing: the tasks, [1] for all rows or [batch], that a sequence is about which the backbone starts, for callers
            that know the backbone alone, such as a transformers pipeline; None where ``set_examples`` says it each time.

    Args:
        backbone: a Hugging Face causal or seq2seq language model.
        tasks: names; a task's id is its place here.
        layers: the blocks that get adapters: ``all``, ``last:4`` or ``last:40%`` of each stack, or a list of indices.
        ffn: pattern that names the feed-forward blocks where their structure does not show them.

    Raises:
        AlterError: no feed-forward block is found, or ``layers`` does not fit.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tasks: Sequence[str],
        layers: str | list[int] = "last:4",
        ffn: str | None = None,
    ) -> None:
        super().__init__()
        _remove_dropout(backbone.eval())
        self.backbone = backbone.requires_grad_(False)
        self.tasks = list(tasks)
        self.base_tasks = len(self.tasks)
        self.retired: list[str] = []
        self.is_seq2seq = bool(backbone.config.is_encoder_decoder)
        embeddings = cast(Tensor, backbone.get_input_embeddings().weight)
        self.routing = Routing(prompt=torch.zeros(1, embeddings.shape[-1]))
        self.placement = layers, ffn
        adapted = select_layers(find_feed_forwards(backbone, ffn), layers)
        self.body = Body(backbone, adapted)
        # A plain dict: the layers are already registered as parts of the backbone.
        self.layers: Mapping[str, MixtureOfTaskAdapters] = self._attach(adapted)
        self._untouched: dict[str, Tensor] | None = None
        self.standing: Tensor | None = None
        for stack in filter(None, (self.body.encoder, self.body.decoder)):
            stack.register_forward_pre_hook(self._note_start, with_kwargs=True)
        cast(nn.Module, backbone.get_output_embeddings()).register_forward_pre_hook(_together)

    def _attach(self, adapted: Sequence[FeedForward]) -> dict[str, MixtureOfTaskAdapters]:
        layers = {}
        encoder = {id(module) for module in self.body.stack("encoder").modules()} if self.is_seq2seq else set()
        for found in adapted:
            owner = self.backbone.get_submodule(found.name)
            frozen = FrozenFeedForward(owner, found, self.backbone.dtype)
            path = f"{found.name}.{found.down}" if found.inline else found.name
            mixture = InlineMixture if found.inline else MixtureOfTaskAdapters
            layers[found.name] = mixture(self.backbone.get_submodule(path), frozen, self.routing)
            self.backbone.set_submodule(path, layers[found.name])
            blocks = cast(nn.ModuleList, self.backbone.get_submodule(found.stack)) if found.stack else ()
            layers[found.name].stack = "encoder" if id(blocks) in encoder else "decoder"
            if isinstance(made := layers[found.name], InlineMixture) and blocks:
                blocks[found.index].register_forward_pre_hook(made.note_rows, with_kwargs=True)
            layers[found.name].is_last = not self.is_seq2seq and not found.inline and found.index == len(blocks) - 1
        return layers

    def add_experts(self, expert: Expert, router: Router, own: float = 0.9, num_experts: int | None = None) -> None:
        """Stage 1: experts in every chosen layer, one a task unless told otherwise.

        Args:
            expert: template of the experts.
            router: template of the router.
            own: the share of a task's own expert at the start.
            num_experts: E; None for one a task. Task t's own expert is t modulo E.

        Raises:
            AlterError: there would be no expert, or the router or the experts do not fit.
        """
        check_task_experts(own, num_experts, len(self.tasks), expert, router)
        tasks, experts = len(self.tasks), num_experts or len(self.tasks)
        own = own if experts > 1 else 1.0
        prior = torch.full((tasks, experts), (1 - own) / max(experts - 1, 1))
        prior[torch.arange(tasks), torch.arange(tasks) % experts] = own
        for layer in self.layers.values():
            layer.add_experts(expert, router, prior)
        self._place_adapters()

    def add_shared(self, expert: Expert, num_shared: int, router: Router, keep: float = 0.9) -> None:
        """Stage 2: shared experts and the gate over the task experts' mixture and them.

        What the task experts change is divided by their first share, ``keep`` unless the gate leaves some experts out, so that
        it is what all of it was: the model answers nearly as it did before, exactly where experts do not act before an activation.

        Args:
            expert: template of the shared experts.
            num_shared: how many.
            router: template of the gate.
            keep: the task experts' share at the start.

        Raises:
            AlterError: there would be no expert, or the router or the experts do not fit.
        """
        check_shared_experts(num_shared, keep, expert, router)
        row = torch.tensor([keep, *[(1 - keep) / num_shared] * num_shared])
        share = float(router.first_gates(row)[0])
        for layer in self.layers.values():
            layer.add_shared(expert, num_shared, router, row.repeat(len(self.tasks), 1))
            if share > 0 and layer.shared_router.starts_at_prior:
                layer.experts.strengthen(1 / share, layer.frozen)
        self._place_adapters()

    def add_newcomer(self, task: str, expert: Expert | None = None, own: float = 0.8, keep: float = 0.8) -> None:
        """Adds a task to a trained model; what the others compute stays the same, bit for bit.

        Args:
            task: its name, which a retired one gives up.
            expert: template of its expert; None for the kind of the others.
            own: the share of its own expert among the task experts at the start.
            keep: the task experts' share at the start, where there are shared ones.

        Raises:
            AlterError: there is such a task already, or the model's experts hold something for each task.
        """
        if task in self.tasks and task not in self.retired:
            raise AlterError(f"name: the model has a task '{task}' already; give the new one another name.")
        check_task_experts(own, None, 1, *filter(None, [expert]))
        first = next(iter(self.layers.values()))
        for part in (first.experts, first.shared):
            if part is not None and part.holds_tasks:
                raise AlterError(
                    f"{type(part).__name__} experts hold something for each task, so that none can be added; train all "
                    "tasks together with `alter fit`."
                )
        for layer in self.layers.values():
            layer.add_newcomer(expert or layer.experts, own, keep)
        if task in self.retired:
            self._free_name(task)
        self.tasks.append(task)
        self._place_adapters()

    def _free_name(self, task: str) -> None:
        """Renames a retired task; its place stays, on which depends what the others compute."""
        other = f"{task} (removed)"
        while other in self.tasks:
            other += " (removed)"
        for names in (self.tasks, self.retired):
            names[names.index(task)] = other

    def remove_task(self, task: str) -> None:
        """Takes a task out; what the others compute stays the same, bit for bit.

        What was added later goes with all that it brought. The place of a task that was trained with the others is kept
        and marked as retired, since they may borrow from its expert.

        Raises:
            AlterError: there is no such task, or no other.
        """
        left = [name for name in self.tasks if name not in self.retired and name != task]
        if task not in self.tasks or task in self.retired:
            raise AlterError(
                f"--task: there is no task '{task}'; it is one of {', '.join(left)}.{did_you_mean(task, left)}"
            )
        if not left:
            raise AlterError(f"--task: '{task}' is the model's last task; remove the run folder instead.")
        place = self.tasks.index(task)
        if place < self.base_tasks:
            self.retired.append(task)
            return
        self.tasks.remove(task)
        for layer in self.layers.values():
            del layer.newcomers[place - self.base_tasks]  # type: ignore[attr-defined]

    def _place_adapters(self) -> None:
        device = next(self.backbone.parameters()).device
        for layer in self.layers.values():
            for part in layer.parts().values():
                part.to(device)

    def settle(self) -> Self:
        """Keeps experts in the precision in which they compute, of a model that only answers; its answers stay the same.

        In fp32, as they are trained and saved, all of them would be converted for every token that is written. Not all kinds of
        experts can be kept so (``Expert.only_multiplies``).
        """
        for layer in self.layers.values():
            for part in layer.parts().values():
                if isinstance(part, Expert) and part.only_multiplies:
                    part.to(layer.frozen.dtype)
        return self

    def part_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of the backbone and of each kind of adapter part, by name."""
        parts: dict[str, list[nn.Parameter]] = {}
        for layer in self.layers.values():
            for name, part in layer.parts().items():
                parts.setdefault(name, []).extend(part.parameters())
        adapters = {id(parameter) for group in parts.values() for parameter in group}
        return {"backbone": [p for p in self.backbone.parameters() if id(p) not in adapters], **parts}

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """The untouched backbone, for as long as the context lasts; a trained one has its first weights back."""
        for layer in self.layers.values():
            layer.enabled = False
        trained = {name: value.data for name, value in self._backbone_parameters().items()} if self._untouched else {}
        try:
            self._set_backbone(self._untouched or {})
            yield
        finally:
            self._set_backbone(trained)
            for layer in self.layers.values():
                layer.enabled = True

    # -- a backbone that trains too ---------------------------------------------------------------------------------

    def train_backbone(self) -> None:
        """Lets the backbone train too, without dropout still; its weights are then part of what is saved."""
        self.own_backbone()
        for parameter in self._backbone_parameters().values():
            parameter.requires_grad_(True)

    def checkpoint_activations(self) -> None:
        """Computes each block again in the backward pass, which takes less memory and more time.

        Raises:
            AlterError: the backbone cannot.
        """
        if not self.backbone.supports_gradient_checkpointing:
            raise AlterError(
                f"gradient_checkpointing: {type(self.backbone).__name__} cannot compute its blocks again; write false."
            )
        weight = cast(Tensor, self.backbone.get_input_embeddings().weight)
        options = {"use_reentrant": False, "context_fn": partial(recomputed_alike, weight)}
        self.backbone.activation_checkpointing_enable(options)

    @property
    def has_own_backbone(self) -> bool:
        """Whether the backbone trains or has trained, so that its weights are no longer those of its folder."""
        return self._untouched is not None

    def own_backbone(self) -> None:
        """Makes the backbone's weights the model's own: they are saved with it, and what they were is kept."""
        if self._untouched is None:
            self._untouched = {
                name: parameter.detach().to("cpu", copy=True) for name, parameter in self._backbone_parameters().items()
            }

    def _backbone_parameters(self) -> dict[str, nn.Parameter]:
        own = {id(parameter) for parameter in self.part_parameters()["backbone"]}
        return {name: parameter for name, parameter in self.backbone.named_parameters() if id(parameter) in own}

    def _set_backbone(self, weights: Mapping[str, Tensor]) -> None:
        parameters = self._backbone_parameters()
        for name, value in weights.items():
            parameters[name].data = value.to(parameters[name].device)

    def take_backbone(self, other: MTAModel) -> None:
        """Takes over the trained backbone of a model with adapters in the same places."""
        self.own_backbone()
        self._set_backbone({name: value.detach().clone() for name, value in other._backbone_parameters().items()})

    def set_examples(self, batch: Mapping[str, Tensor]) -> None:
        """Says which examples the next calls are about.

        Args:
            batch: ``task_ids`` [batch]; where a router reads the prompt also ``input_ids`` and ``attention_mask``
                [batch, seq], and ``labels`` where targets stand behind the prompts.
        """
        if any(router.reads_prompt for router in self.routers()):
            prompt = self._pooled_prompt(batch)
        else:  # the last batch's would have as many rows as that
            width = self.routing.prompt.shape[-1]
            prompt = self.routing.prompt.new_zeros(1, width, device=batch["task_ids"].device)
        self.routing.announce(batch["task_ids"], prompt)

    def routers(self) -> Iterator[Router]:
        """The routers of all layers."""
        for layer in self.layers.values():
            yield from (router for router in (layer.router, layer.shared_router) if router is not None)

    @property
    def reads_task(self) -> bool:
        """Whether what it computes depends on which task an example is of."""
        layer = next(iter(self.layers.values()))
        experts = [part for part in (layer.experts, layer.shared) if part is not None]
        routers = any(router.reads_task for router in self.routers())
        return routers or any(part.holds_tasks for part in experts) or bool(len(layer.newcomers))

    @torch.no_grad()
    def _pooled_prompt(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean of the frozen input embeddings over each prompt's tokens, [batch, d]; targets are left out."""
        mask = batch["attention_mask"].bool()
        if not self.is_seq2seq and "labels" in batch:
            mask = mask & (batch["labels"] == IGNORED)
        embeddings = self.backbone.get_input_embeddings()(batch["input_ids"]).float()
        return (embeddings * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)

    def _note_start(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a stack runs, tells the routers whether it goes on from a cache, and where its rows start."""
        if self.standing is None and not any(router.reads_sequence for router in self.routers()):
            return  # nobody asks, and an exporter's trace would take the cache's length for a constant
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        self.routing.cached = 0 if cache is None else int(cache.get_seq_length())
        if self.standing is not None and not self.routing.cached and stack is (self.body.encoder or self.body.decoder):
            ids = kwargs["input_ids"]
            all_or_mask = mask if isinstance(mask, Tensor) else torch.ones_like(ids)
            self.set_examples({"task_ids": self.standing, "input_ids": ids, "attention_mask": all_or_mask})
        known = self.routing.cached == 0 and isinstance(mask, Tensor) and mask.dim() == 2
        self.routing.first = cast(Tensor, mask).int().argmax(1) if known else None

    # -- training ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> TokenLosses:
        """Computes the loss of every target token; logits are made at those positions alone.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels`` [batch, seq] (-100 where there is no loss), and
                ``task_ids`` [batch].
        """
        self.set_examples(batch)
        labels, mask = batch["labels"], batch["attention_mask"].bool()
        targets = labels if self.is_seq2seq else F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # i predicts token i + 1
        positions = targets != IGNORED
        self.routing.positions = _places(positions)
        self.routing.masks = {
            "encoder": mask,
            "decoder": positions if self.is_seq2seq else mask,
            "positions": positions.gather(1, self.routing.positions),  # rows that have fewer are filled up
        }
        extra: list[Tensor] = []
        self.routing.losses = extra
        hidden_states = self.body.last_hidden_states(batch["input_ids"], batch["attention_mask"], labels)
        self.routing.losses = None
        losses = token_losses(
            hidden_states[positions],
            targets[positions],
            self.body.logits,
            self.body.vocabulary,
            self.body.head_trains,
        )
        return TokenLosses(
            losses, positions.nonzero()[:, 0], torch.stack(extra).sum() if extra else losses.new_zeros(())
        )

    # -- saving -----------------------------------------------------------------------------------------------------

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters' tensors by ``layer.part.name``."""
        return {
            f"{name}.{part_name}.{key}": value
            for name, layer in self.layers.items()
            for part_name, part in layer.parts().items()
            for key, value in part.state_dict().items()
        }

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, whole; of a model that is cut over processes, all of them must ask."""
        put_away(self)
        return gather(self.trained_tensors())

    def trained_tensors(self) -> dict[str, Tensor]:
        """What training changes: the adapters' tensors and, where the backbone trains too, its own as ``backbone.name``."""
        if not self.has_own_backbone:
            return self.adapter_state()
        backbone = {f"backbone.{name}": value.detach() for name, value in self._backbone_parameters().items()}
        return {**self.adapter_state(), **backbone}

    def load_trained_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Loads what ``trained_state`` returned.

        Raises:
            AlterError: a key is missing, surplus or of another shape.
        """
        copy_state(self.trained_tensors(), state, where)

    def save_pretrained(self, folder: str | Path, backbone: str, trained: Mapping[str, Tensor] | None = None) -> None:
        """Writes the adapters, and the backbone only where it has trained, as safetensors and JSON.

        Args:
            folder: made where it does not exist; the JSON is written last, so a folder without it is not a model.
            backbone: the name or folder of the backbone, as ``load_backbone`` takes it.
            trained: what ``trained_state`` returned; None to ask for it here.
        """
        write_model(folder, describe(self, backbone), trained or self.trained_state())

    @property
    def num_experts(self) -> int:
        """E, how many task experts there are."""
        return next(iter(self.layers.values())).num_experts

    @property
    def num_shared(self) -> int:
        """K, how many shared experts there are."""
        return next(iter(self.layers.values())).num_shared

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: str | None = None, precision: str = "fp32") -> Self:
        """Restores what ``save_pretrained`` wrote.

        Args:
            folder: of the adapters.
            backbone: where the backbone is, when not where it was; it must be the same one.
            precision: fp32, bf16, int8 or nf4.

        Raises:
            AlterError: a file is missing or damaged, a key is missing, surplus or misshapen, or the backbone is another.
        """
        return restore(cls, Path(folder), backbone, precision)


def check_task_experts(own: float, num_experts: int | None, num_tasks: int, *templates: Template) -> None:
    """Says what makes no sense in how task experts start; see ``MTAModel.add_experts``.

    Raises:
        AlterError: a number or an argument of a template is out of its range.
    """
    if num_experts is not None and num_experts < 1:
        raise AlterError(f"num_experts: {num_experts} is below 1; give a positive number, or none for one a task.")
    if not 0 <= own <= 1:
        raise AlterError(f"own: {own} is no share; give 0 to 1, such as 0.9.")
    for template in templates:
        template.check()
        if isinstance(template, Router):
            template.check_experts(num_experts or num_tasks)


def check_shared_experts(num_shared: int, keep: float, *templates: Template) -> None:
    """Says what makes no sense in how shared experts start; see ``MTAModel.add_shared``.

    Raises:
        AlterError: a number or an argument of a template is out of its range.
    """
    if num_shared < 1:
        raise AlterError(f"num_shared: {num_shared} is below 1; give a positive number, or leave stage 2 out.")
    if not 0 <= keep <= 1:
        raise AlterError(f"keep: {keep} is no share; give 0 to 1, such as 0.9.")
    for template in templates:
        template.check()
        if isinstance(template, Router):
            template.check_experts(num_shared + 1)  # the task experts' mixture is one


def _together(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The head's input in one piece: of prompts' last positions torch would make a batched product and copy the weight for each."""
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in args)


def _places(positions: Tensor) -> Tensor:
    """The places of [batch, seq] that are true, [batch, n]; rows that have fewer are filled up with others."""
    count = max(1, int(positions.sum(1).max()))
    return positions.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def _remove_dropout(backbone: nn.Module) -> None:
    """Sets every dropout to zero, so that training and evaluation mode are one function."""
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and name.endswith(("dropout", "layerdrop", "dropout_rate", "dropout_prob")):
                setattr(module, name, 0.0)
