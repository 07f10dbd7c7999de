"""The layer: a frozen feed-forward block with its mixture of task adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from alter.errors import AlterError
from alter.nn.experts import Expert
from alter.nn.frozen import FrozenFeedForward
from alter.nn.newcomer import Newcomer
from alter.nn.outputs import Outputs
from alter.nn.routers import Router, RouterShape, Routing
from alter.nn.template import Template


class MixtureOfTaskAdapters(nn.Module):
    """Takes the place of one feed-forward block F and adds experts to it.

    Stage 1: ``y = F(x) + e``, ``e = sum_k g_k A_k(x)`` with ``g = router(x, task)``.
    Stage 2: ``y = F(x) + a_0 e + sum_k a_k S_k(x)`` with ``a = shared_router([e; S_1..S_K], task)``.
    Where experts return whole feed-forward outputs, F cancels and is not computed. Source: arXiv 2309.11042.

    Args:
        ffn: the frozen module whose place this takes.
        frozen: the whole frozen block, by roles.
        routing: the model's routing state, shared by all layers.
    """

    PARTS = ("experts", "router", "shared", "shared_router")
    experts: Expert  # as the router, from add_experts on
    router: Router
    shared: Expert | None  # from add_shared on
    shared_router: Router

    def __init__(self, ffn: nn.Module, frozen: FrozenFeedForward, routing: Routing) -> None:
        super().__init__()
        self.ffn = ffn
        self.frozen = frozen
        self.routing = routing
        self.enabled = True
        self.is_last = False  # nothing above mixes positions any more
        self.stack = "decoder"  # or "encoder": whose tokens pass here
        for part in self.PARTS:
            self.register_module(part, None)
        self.num_experts = self.num_shared = self.num_tasks = 0
        self.newcomers: Sequence[Newcomer] = nn.ModuleList()  # type: ignore[assignment]

    def add_experts(self, expert: Expert, router: Router, prior: Tensor) -> None:
        """Adds the task experts and their router.

        Args:
            expert: template of the experts.
            router: template of the router.
            prior: [tasks, experts], the gates to start from.

        Raises:
            AlterError: the experts need gates that sum to one and the router's do not.
        """
        if expert.contains_ffn and not expert.blends_parameters and not router.normalised:
            raise AlterError(
                f"{type(expert).__name__} experts need gates that sum to one, which {type(router).__name__}'s do not; "
                "take another router or LoRA or Bottleneck experts."
            )
        self.experts, self.router = expert.fresh(), router.fresh()
        self.num_tasks, self.num_experts = prior.shape
        self.experts.build(self.frozen, self.num_experts, self.num_tasks)
        own = torch.arange(self.num_tasks) % self.num_experts
        self.router.build(self._shape(prior, self.frozen.hidden_size, own))

    def add_shared(self, expert: Expert, num_shared: int, router: Router, prior: Tensor) -> None:
        """Adds stage 2's shared experts and the gate over the task experts' mixture and them.

        Args:
            expert: template of the shared experts.
            num_shared: K.
            router: template of the gate, which reads ``[e; S_1..S_K]``.
            prior: [tasks, 1 + K], the gates to start from.
        """
        self.shared, self.shared_router, self.num_shared = expert.fresh(), router.fresh(), num_shared
        self.shared.build(self.frozen, num_shared, len(prior))
        mixture = torch.zeros(len(prior), dtype=torch.long)
        self.shared_router.build(self._shape(prior, self.frozen.hidden_size * (1 + num_shared), mixture))
        self.router.join_shared()

    def add_newcomer(self, expert: Expert, own: float, keep: float) -> None:
        """Adds what a further task brings; its id is one above the last task's.

        Args:
            expert: template of its expert.
            own: the share of its own expert among the task experts at the start.
            keep: the task experts' share at the start, where there are shared ones.
        """
        self.newcomers.append(  # type: ignore[attr-defined]
            Newcomer(expert, self.frozen, self.num_experts, self.num_shared, own, keep)
        )

    def _shape(self, prior: Tensor, hidden_size: int, own: Tensor) -> RouterShape:
        num_tasks, num_experts = prior.shape
        return RouterShape(num_tasks, num_experts, hidden_size, prior, own, prompt_size=self.routing.prompt.shape[-1])

    def templates(self) -> dict[str, Template]:
        """The modules that all tasks were trained with, by name: experts, router, shared, shared_router."""
        return {name: part for name in self.PARTS if (part := getattr(self, name)) is not None}

    def parts(self) -> dict[str, nn.Module]:
        """The trainable modules by name: the templates, and ``newcomers.0.expert``, ``newcomers.0.rates`` and so on."""
        added = {
            f"newcomers.{i}.{name}": part
            for i, newcomer in enumerate(self.newcomers)
            for name, part in newcomer.parts().items()
        }
        return {**self.templates(), **added}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, seq, d] -> [batch, seq, d]."""
        if not self.enabled or self.experts is None:
            return self.ffn(hidden_states)
        if self.routing.positions is None or not self.is_last or self._reads_sequence():
            return self.mix(hidden_states, lambda: self.ffn(hidden_states), self.stack)
        index = self.routing.positions.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
        needed = hidden_states.gather(1, index)
        mixed = self.mix(needed, lambda: self.ffn(needed), "positions")
        return torch.zeros_like(hidden_states).scatter(1, index, mixed)

    def _reads_sequence(self) -> bool:
        return any(router.reads_sequence for router in (self.router, self.shared_router) if router is not None)

    def mix(self, hidden_states: Tensor, ffn_output: Callable[[], Tensor], place: str) -> Tensor:
        """Computes the equations above.

        Args:
            hidden_states: [batch, seq, d].
            ffn_output: gives F(x) where it is needed.
            place: whose tokens these are, a key of ``Routing.masks``.

        Returns:
            [batch, seq, d].
        """
        dtype, device = self.frozen.dtype, hidden_states.device.type
        # Adapters are kept in fp32 whatever the backbone's precision, and compute in the backbone's. Where nothing is cast, a
        # step of decoding goes without the context's own time.
        casts = dtype != torch.float32
        needed = casts or torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype, enabled=casts) if needed else nullcontext():
            return self._mix(hidden_states, ffn_output, self.routing.seen_at(place)).to(hidden_states.dtype)

    def _mix(self, x: Tensor, ffn_output: Callable[[], Tensor], routing: Routing) -> Tensor:
        task = routing.only_task
        if task is not None and task >= self.num_tasks:
            return self._mix_new(self.newcomers[task - self.num_tasks], x, ffn_output, routing)
        if not self.newcomers or task is not None or not (routing.task_ids >= self.num_tasks).any():
            return self._mix_trained(x, ffn_output, routing)
        tasks = routing.rows(x.shape[0])
        groups = [(tasks < self.num_tasks).nonzero().flatten()]
        groups += [(tasks == self.num_tasks + i).nonzero().flatten() for i in range(len(self.newcomers))]
        mixed = []
        for index, newcomer in zip(groups, [None, *self.newcomers], strict=True):
            if not len(index):
                continue

            def own_ffn_output(index: Tensor = index) -> Tensor:
                return ffn_output()[index]

            own = x[index], own_ffn_output, routing.of_rows(index, x.shape[0])
            mixed.append(self._mix_trained(*own) if newcomer is None else self._mix_new(newcomer, *own))
        return torch.cat(mixed)[torch.cat(groups).argsort()]

    def _mix_new(self, newcomer: Newcomer, x: Tensor, ffn_output: Callable[[], Tensor], routing: Routing) -> Tensor:
        y, ffn_share = newcomer(x, self.experts, self.shared, self.frozen.reading(x), routing)
        parts = [self.experts, newcomer.expert, *([self.shared] if self.shared is not None else [])]
        return y if all(part.contains_ffn for part in parts) else (1.0 - ffn_share) * ffn_output() + y

    def _mix_trained(self, x: Tensor, ffn_output: Callable[[], Tensor], routing: Routing) -> Tensor:
        gates = self._gates(x, routing)
        ffn_share: Tensor | float
        if self.shared is None:
            y = self.experts.mix(x, gates, self.frozen, self.router.active, routing)
            ffn_share = float(self.experts.contains_ffn)
        else:
            frozen = self.frozen.reading(x)
            task = self.experts.mixed_outputs(x, gates, frozen, self.router.active, routing)
            outputs = Outputs.beside([task, self.shared.own_outputs(x, frozen, routing)])
            linearly = self.shared_router.reads_linearly
            weights = self.shared_router(outputs if linearly else outputs.whole().float().flatten(-2), routing)
            y = outputs.weighted(weights)
            ffn_share = self._ffn_share(weights, self.shared.contains_ffn)
        if isinstance(ffn_share, float) and ffn_share == 1.0:
            return y
        return (1.0 - ffn_share) * ffn_output() + y

    def _gates(self, x: Tensor, routing: Routing) -> Tensor:
        if not (self.router.reads_task_alone and torch.is_inference_mode_enabled()):
            return self.router(x, routing)
        key = self.router, x.shape[0]
        if key not in routing.known:
            routing.known[key] = self.router(x, routing)
        return routing.known[key]

    def _ffn_share(self, weights: Tensor, shared_contain: bool) -> Tensor | float:
        """How much of F(x) the weighted outputs already hold: a number where it is the same for all tokens."""
        held = [self.experts.contains_ffn, shared_contain]
        if not any(held):
            return 0.0
        if all(held) and self.shared_router.normalised:
            return 1.0
        counted = torch.tensor([held[0], *[held[1]] * (weights.shape[-1] - 1)], device=weights.device)
        return (weights * counted).sum(-1, keepdim=True)


class InlineMixture(MixtureOfTaskAdapters):
    """The same for a block whose linear maps stand in the layer itself, without a module of their own (as in BART).

    It takes the place of the second linear map, and remembers what entered the first.
    """

    def __init__(self, ffn: nn.Module, frozen: FrozenFeedForward, routing: Routing) -> None:
        super().__init__(ffn, frozen, routing)
        self._input: Tensor | None = None
        self._rows = 1
        self._expects_input = True
        first = "gate" if "gate" in frozen.shapes else "up"
        frozen.module(first).register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._expects_input:
            self._input = args[0]

    def note_rows(self, block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Before the transformer block runs: how many rows there are, since OPT's makes one of rows and positions."""
        self._rows = (args[0] if args else kwargs["hidden_states"]).shape[
            0
        ]  # len would be a constant to an ONNX export

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, seq, intermediate] -> [batch, seq, d]; or both without a dimension of rows."""
        x, self._input = self._input, None
        if not self.enabled or self.experts is None or x is None:
            return self.ffn(hidden_states)
        if x.dim() == 2:
            return self._mixed(*(part.unflatten(0, (self._rows, -1)) for part in (x, hidden_states))).flatten(0, 1)
        return self._mixed(x, hidden_states)

    def _mixed(self, x: Tensor, hidden_states: Tensor) -> Tensor:
        self._expects_input = False  # experts that vary the block call its linear maps themselves
        try:
            # under autocast what comes in may be of another dtype than the map, and within ``mix`` nothing is cast
            return self.mix(x, lambda: self.ffn(hidden_states.to(self.frozen.dtype)), self.stack)
        finally:
            self._expects_input = True
