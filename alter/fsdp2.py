"""Lightning's strategy for weights cut over processes, with checkpoints like every other strategy's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from alter.nn.sharding import gather, slice_like


class FSDP2Strategy(ModelParallelStrategy):
    """Every process holds a slice of each weight, of its gradient and of the optimizer's state.

    Lightning's own would write one checkpoint a process, or one whose optimizer state no other strategy reads; this one
    writes the whole, as an unsharded run does. The module cuts its weights in ``configure_model``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Takes all processes for data; the default would take a node's for tensor parallelism, and shard nothing."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the trainer hands over the optimizer's state of a checkpoint."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: the module itself says what of it is kept, see ``StageModule.on_save_checkpoint``."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, on every process, in the form of ``torch.optim``."""
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        return {**state, "state": {place: gather(kept) for place, kept in state["state"].items()}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this process's slices of what ``optimizer_state`` returned, under whichever strategy."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            own = {place: dict(_sliced(kept, parameters[place])) for place, kept in state["state"].items()}
            optimizer.load_state_dict({**state, "state": own})

    load_checkpoint: Callable[..., dict[str, Any]] = ParallelStrategy.load_checkpoint
    save_checkpoint: Callable[..., None] = ParallelStrategy.save_checkpoint


def _sliced(state: Mapping[str, Any], parameter: Tensor) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        follows = isinstance(value, Tensor) and value.shape == parameter.shape
        yield name, slice_like(value, parameter) if follows else value


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Weights cut over processes by torch's fully_shard")
