"""The trunk: the blocks of a frozen stack below its first adapter, which compute the same for an example at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Trunk:
    """Splits one stack of blocks at a cut: the states that enter block ``cut`` are computed by themselves, or given.

    Args:
        stack: the module that runs the blocks, an encoder or a decoder.
        blocks: its blocks.
        cut: the first block with an adapter; with no blocks named, the stack has none and its states are its output.
    """

    def __init__(self, stack: nn.Module, blocks: Sequence[nn.Module] | nn.ModuleList, cut: int) -> None:
        self.stack = stack
        self.blocks = blocks
        self.cut = cut
        self._position_biases = [_PositionBias.of(block) for block in blocks[:cut]]

    def __str__(self) -> str:
        return "output" if self.whole else f"blocks 0 to {self.cut - 1} of {len(self.blocks)}"

    @property
    def whole(self) -> bool:
        """Whether the trunk is the whole stack."""
        return not self.blocks

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the states depend on."""
        above = {id(p) for block in self.blocks[self.cut :] for p in block.parameters()}
        return (p for p in self.stack.parameters() if id(p) not in above)

    @torch.no_grad()
    def states(self, **inputs: Any) -> Tensor:
        """Runs the trunk alone, [batch, seq, d]. Args: inputs: for the stack."""
        if self.whole:
            return self.stack(**inputs).last_hidden_state
        with replaced_forward(self.blocks[self.cut], _stop):
            try:
                self.stack(**inputs)
            except _CutReached as reached:
                return reached.states
        raise RuntimeError(f"{type(self.stack).__name__} does not run its blocks in order.")

    def works(self, **inputs: Tensor) -> bool:
        """Whether the stack computes the same when it starts from its states; not every backbone is so built."""
        with torch.no_grad():
            expected = self.stack(**inputs).last_hidden_state.float()
            try:
                with self.replaced_by(self.states(**inputs)):
                    found = self.stack(**inputs).last_hidden_state.float()
            except Exception:  # whatever blocks of an unknown make do
                return False
        return torch.allclose(expected, found, rtol=1e-3, atol=1e-3)

    @contextmanager
    def replaced_by(self, states: Tensor) -> Iterator[None]:
        """Lets the stack start at the cut, from ``states``; its blocks below are not run."""
        with ExitStack() as replaced:
            for index, bias in enumerate(self._position_biases):
                given = states if index == self.cut - 1 else None
                replaced.enter_context(replaced_forward(self.blocks[index], _skip(bias, given)))
            yield


class _CutReached(Exception):
    """Leaves the stack's own loop over its blocks; carries the states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop(hidden_states: Tensor, *args: Any, **kwargs: Any) -> None:
    raise _CutReached(hidden_states)


class _PositionBias(NamedTuple):
    """What a block does about T5's position bias, which its first block makes and all blocks of the stack share.

    Attributes:
        returned: whether the block returns it beside the hidden states.
        maker: the block's attention that makes it; None where the block hands on what it was given.
    """

    returned: bool
    maker: Any

    @classmethod
    def of(cls, block: nn.Module) -> _PositionBias:
        attentions = [module for module in block.modules() if hasattr(module, "has_relative_attention_bias")]
        return cls(bool(attentions), next((a for a in attentions if a.has_relative_attention_bias), None))


def _skip(bias: _PositionBias, given: Tensor | None) -> Callable[..., Any]:
    """Stands for a block: hands on its input, or the states ``given``."""

    def forward(
        hidden_states: Tensor, mask: Tensor | None = None, position_bias: Any = None, *_: Any, **__: Any
    ) -> Any:
        states = hidden_states if given is None else given
        if not bias.returned:
            return states
        if bias.maker is not None:
            length = hidden_states.shape[1]
            position_bias = bias.maker.compute_bias(length, length, device=hidden_states.device)
        return states, position_bias, None

    return forward


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls ``forward`` in place of the module's own, for as long as the context lasts."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
