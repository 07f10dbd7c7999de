"""What both stages share: the loss, the learning rates, what a checkpoint holds."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from alter.errors import AlterError, Diverged
from alter.nn.backbone import backbone_fingerprint, check_trainable, resolve_backbone
from alter.nn.body import IGNORED
from alter.nn.model import MTAModel
from alter.nn.sharding import gather, local_numel, shard, slice_like
from alter.nn.trunk_cache import TrunkCache
from alter.stages.schedule import Schedule, make_scheduler
from alter.writing import write_json


class StageModule(LightningModule):
    """Trains some parts of an MTAModel on the mixture of tasks.

    Args:
        optimizer: takes the parameter groups; the recipe names its class and arguments.
        schedule: of the learning rate after the warm-up.
        warmup: share of the steps over which the learning rate rises.
        loss_average: over the target tokens of a batch, or over its examples (each example counts the same, however
            long its answer).
        gradient_checkpointing: computes activations again in the backward pass, to save memory.
        trunk_cache: how the states below the first adapter are kept; None for not at all.
        skip_bad_batches: how many batches may be left out whose loss is not finite, and steps whose gradient is not, over all
            processes; the next one stops the run.
    """

    model: MTAModel  # None until configure_model
    backbone: str
    precision: str
    backbone_lr: float = 0.0

    def __init__(
        self,
        optimizer: OptimizerCallable,
        schedule: Schedule = "cosine",
        warmup: float = 0.05,
        loss_average: Literal["token", "example"] = "token",
        gradient_checkpointing: bool = False,
        trunk_cache: TrunkCache | None = None,
        skip_bad_batches: int = 0,
    ) -> None:
        super().__init__()
        self.model = None  # type: ignore[assignment]
        self.strict_loading = False  # checkpoints hold what trains alone; on_load_checkpoint checks that they fit
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.warmup = warmup
        self.loss_average = loss_average
        self.gradient_checkpointing = gradient_checkpointing
        self.trunk_cache = trunk_cache
        self.skip_bad_batches = skip_bad_batches
        self.skipped = 0
        self._bad: str | None = None  # what was wrong since the last step
        self._unfinished: dict[str, Any] | None = None  # what a checkpoint held of a step in parts

    @abstractmethod
    def make_model(self) -> MTAModel:
        """Loads the backbone and attaches what this stage works with."""

    @abstractmethod
    def learning_rates(self) -> dict[str, float]:
        """Says what trains: for each part of the model the factor on the learning rate, 0 or no mention for frozen."""

    def backbone_identity(self) -> str:
        """Tells the function that this backbone computes from any other's."""
        fingerprint = backbone_fingerprint(resolve_backbone(self.backbone))
        # What the blocks below the adapters compute in.
        mixed = "32-true" if self._trainer is None else self._trainer.precision
        return f"{fingerprint} {self.precision} {mixed} transformers {version('transformers')}"

    def configure_model(self) -> None:
        """Makes the model once, on the process that trains it; every part not in ``learning_rates`` is frozen.

        Raises:
            AlterError: the backbone is to train and its precision is not fp32.
        """
        if self.model is not None:
            return
        check_trainable(self.precision, self.backbone_lr)  # before anything is loaded
        self.model = self.make_model().train()  # the backbone has no dropout left; checkpointing asks for this mode
        rates = self.learning_rates()
        check_trainable(self.precision, rates.get("backbone", 0.0))
        if rates.get("backbone", 0.0) > 0:
            self.model.train_backbone()
        for part, parameters in self.model.part_parameters().items():
            for parameter in parameters:
                # hard selectors have nothing to learn and say so themselves
                parameter.requires_grad_(parameter.requires_grad and rates.get(part, 0.0) > 0)
        if self.gradient_checkpointing:
            self.model.checkpoint_activations()
        mesh = self.device_mesh
        if mesh is not None:
            self.model.body.uncached = "its processes hold slices of the weights, and must run every block together"
        elif self.model.has_own_backbone:
            self.model.body.uncached = "the backbone trains or has trained, so its states are its own"
        elif self.trunk_cache is not None:
            with self.model.adapters_disabled():  # the check must not meet their noise
                self.model.body.cache_trunks(self.trunk_cache, self.backbone_identity())
        if mesh is not None:
            shard(self.model, mesh["data_parallel"])
        self._start_window()

    def parts_table(self) -> str:
        """A table of the model's parts: part, parameters, whether it trains."""
        assert self.model is not None
        lines = [f"{'part':<20}{'parameters':>14}  trains"]
        for part, parameters in self.model.part_parameters().items():
            rate = self.learning_rates().get(part, 0.0)
            trains = (
                "no" if not any(p.requires_grad for p in parameters) else "yes" if rate == 1 else f"yes, lr x {rate:g}"
            )
            lines.append(f"{part:<20}{sum(p.numel() for p in parameters):>14,}  {trains}")
        return "\n".join(lines)

    def trainable_parameters(self) -> int:
        """How many parameters train."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def on_fit_start(self) -> None:
        """Prints what trains, what of it a process holds, and what is kept on disk."""
        self._seed = torch.initial_seed()
        self.print(self.parts_table())
        if self.device_mesh is not None:
            whole = sum(p.numel() for p in self.parameters())
            self.print(f"fsdp2: this process holds {local_numel(self):,} of {whole:,} parameters")
        self.print(self._trunk_line())

    def _trunk_line(self) -> str:
        cached = self.model.body.cached
        if self.trunk_cache is None:
            return "trunk cache: off"
        if not cached:
            return f"trunk cache: off ({self.model.body.uncached})"
        stacks = " and ".join(f"{name} {trunk.trunk}" for name, trunk in cached.items())
        known = sum(len(trunk.store) for trunk in cached.values())
        size = ""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if drawn_tokens := getattr(data, "drawn_tokens", None):
            stored = self.model.body.stored_bytes(*drawn_tokens(self.trainer.max_epochs))
            size = f"up to {stored / 2**30:.2f} GB "
        return (
            f"trunk cache: {stacks}, {size}in {self.trunk_cache.folder} (bound {self.trunk_cache.max_gb:g} GB), "
            f"{known:,} examples there"
        )

    # -- steps ------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Starts the sums of the first step, or goes on with those of one that a checkpoint interrupted."""
        self._start_window()
        if self._unfinished is not None:
            self._window, self._task_window = (self._unfinished[name].to(self.device) for name in ("sums", "task_sums"))
            self._taken, gradients = self._unfinished["taken"], self._unfinished["gradients"]
            for name, parameter in self.model.named_parameters():
                if name in gradients:
                    parameter.grad = slice_like(gradients[name].to(self.device), parameter)
            self._unfinished = None

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Makes the random numbers of a batch (a router's noise) depend on its place alone, not on what was before it."""
        place = [self._seed % 2**64, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the batch's loss; one that only keeps other processes company has none."""
        self._taken += 1
        losses, rows, auxiliary = self.model(batch)
        sums, counts = _per_example(losses, rows, len(batch["task_ids"]))
        loss = losses.mean() if self.loss_average == "token" else (sums / counts.clamp_min(1)).mean()
        if not torch.isfinite(loss + auxiliary):
            self._note_bad((loss + auxiliary).item(), batch, batch_idx)
            return sum((p * 0.0).sum() for p in self.parameters() if p.requires_grad)  # type: ignore[return-value]
        counted = batch.get("counts", 1.0)
        self._window[:3] += counted * torch.stack([loss.detach(), auxiliary.detach(), torch.ones_like(loss)])
        self._task_window += counted * torch.stack(self._per_task(sums.detach(), counts, batch["task_ids"]))
        return (loss + auxiliary) * counted

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the step's loss, over all and per task, and the gradient's norm: of all batches that it takes, on all processes.

        Raises:
            Diverged: on every process, where more batches are bad than may be left out.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).detach()
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # cut over processes
        loss, auxiliary, batches, bad = self.trainer.strategy.reduce(self._window, reduce_op="sum")
        if not (torch.isfinite(norm) or self._scaler_skips):
            bad = bad + 1
            self._bad = (
                self._bad or f"The gradient's norm is {norm.item()} at step {self.global_step} of {type(self).__name__}"
            )
        if bad:
            self._skip(int(bad))
            if not (torch.isfinite(norm) or self._scaler_skips):
                optimizer.zero_grad(set_to_none=True)  # what has no gradient takes no step
        sums, counts = self.trainer.strategy.reduce(self._task_window, reduce_op="sum")
        present = (counts > 0).nonzero().flatten().tolist()
        values = {f"train/loss/{self.model.tasks[t]}": sums[t] / counts[t] for t in present}
        if batches:
            values["train/loss"] = loss / batches
        if auxiliary:
            values["train/auxiliary"] = auxiliary / batches
        if torch.isfinite(norm):
            values["train/gradient_norm"] = norm
        self._log_step({**values, **{f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}})
        self._start_window()

    @property
    def _scaler_skips(self) -> bool:
        """Whether the loss is scaled, as for fp16, by what leaves out a step that overflows, and takes a lower scale."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _log_step(self, values: Mapping[str, Tensor | float]) -> None:
        """Writes at once what Lightning would write after a checkpoint at the end of the batch, which a resume would lose."""
        self.log_dict(dict(values), logger=False)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its logger connector
        if every and (self.global_step + 1) % every == 0:  # 0 is never
            numbers = {name: float(value) for name, value in values.items()}
            for logger in self.loggers:
                logger.log_metrics({**numbers, "epoch": self.current_epoch}, step=self.global_step)

    def _note_bad(self, loss: float, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        tasks = sorted({self.model.tasks[i] for i in batch["task_ids"].tolist()})
        file = Path(self.trainer.default_root_dir) / f"bad_batch.{self.global_rank}.json"
        write_json(
            file,
            {
                "loss": str(loss),
                "step": self.global_step,
                "epoch": self.current_epoch,
                "batch": batch_idx,
                "examples": [
                    {
                        "task": self.model.tasks[task],
                        "input_ids": ids[mask.bool()].tolist(),
                        "labels": labels[labels != IGNORED].tolist(),
                    }
                    for task, ids, mask, labels in zip(
                        batch["task_ids"].tolist(),
                        batch["input_ids"],
                        batch["attention_mask"],
                        batch["labels"],
                        strict=True,
                    )
                ],
            },
        )
        self._bad = (
            f"The loss is {loss} at step {self.global_step} of {type(self).__name__}, batch {batch_idx} (tasks in the batch: "
            f"{', '.join(tasks)}; the batch is in {file})"
        )
        self._window[3] += 1

    def _skip(self, bad: int) -> None:
        self.skipped += bad
        told = (
            self._bad
            or f"The loss of another process is not finite at step {self.global_step} of {type(self).__name__}"
        )
        self._bad = None
        if self.skipped > self.skip_bad_batches:
            raise Diverged(
                f"{told}; lower its optimizer.init_args.lr or set trainer.gradient_clip_val in the recipe, mend the data, or allow "
                f"for some by skip_bad_batches (now {self.skip_bad_batches}), and run again: checkpoints written before this step are "
                "kept."
            )
        rank_zero_warn(f"{told}; left out, {self.skipped} of {self.skip_bad_batches}.")

    def _start_window(self) -> None:
        self._taken = 0  # batches of the step
        self._window = torch.zeros(4, device=self.device)  # loss, routers' losses, batches, bad batches
        self._task_window = torch.zeros(2, len(self.model.tasks), device=self.device)

    def on_validation_epoch_start(self) -> None:
        """Starts the sums."""
        self._sums = torch.zeros(2, len(self.model.tasks), device=self.device, dtype=torch.float64)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Adds the batch to its tasks' sums."""
        losses, rows, _ = self.model(batch)
        sums, counts = _per_example(losses, rows, len(batch["task_ids"]))
        self._sums += batch.get("counts", 1.0) * torch.stack(self._per_task(sums, counts, batch["task_ids"]))

    def on_validation_epoch_end(self) -> None:
        """Logs each task's loss a target token, and ``val/loss``, their mean over the tasks."""
        sums, counts = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        means = (sums / counts.clamp_min(1)).float()
        self.log_dict({f"val/loss/{task}": means[i] for i, task in enumerate(self.model.tasks) if counts[i] > 0})
        self.log("val/loss", means[counts > 0].mean(), prog_bar=True)

    def _per_task(self, sums: Tensor, counts: Tensor, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(len(self.model.tasks), device=sums.device)
        return zeros.index_add(0, task_ids, sums), zeros.index_add(0, task_ids, counts)

    # -- optimisation -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One parameter group a part, its learning rate times the part's factor."""
        rates = self.learning_rates()
        groups = [
            {"params": trainable, "name": part}
            for part, parameters in self.model.part_parameters().items()
            if (trainable := [p for p in parameters if p.requires_grad])
        ]
        try:
            optimizer = self.make_optimizer(groups)
        except ValueError as error:  # such as one that takes matrices alone
            raise AlterError(
                f"optimizer: it does not fit this model ({error}); take another, such as torch.optim.AdamW."
            ) from error
        fused = _to_be_fused(optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= rates[group["name"]]
            if fused:
                group["fused"] = True  # as an argument it would keep Lightning from clipping under autocast
        if (steps := self.trainer.estimated_stepping_batches) == math.inf:
            raise AlterError(
                "trainer.max_epochs: the learning rate is planned over all steps, and nothing says how many there are; give "
                "max_epochs or max_steps (max_time may still end it sooner)."
            )
        scheduler = make_scheduler(optimizer, self.schedule, self.warmup, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the adapters alone where the backbone does not change, and what a step has gathered that is not over."""
        checkpoint["state_dict"] = self.model.trained_state()
        checkpoint["skipped"] = self.skipped
        if self._taken:  # validation and checkpoints may come between the batches of a step
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            own = {
                "gradients": {name: value.cpu() for name, value in gather(gradients).items()},
                "sums": self._window.cpu(),
                "task_sums": self._task_window.cpu(),
                "taken": self._taken,
            }
            everyones: list[Any] = [own] * self.trainer.world_size
            if len(everyones) > 1:
                torch.distributed.all_gather_object(everyones, own)
            checkpoint["unfinished_step"] = everyones

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads what trains and checks that every key matched, which ``strict_loading=False`` would not.

        What belongs to an unfinished step is of use to as many processes as before alone.
        """
        self.configure_model()
        self.model.load_trained_state(checkpoint["state_dict"], "the checkpoint")
        self.skipped = checkpoint.get("skipped", 0)
        everyones = checkpoint.get("unfinished_step", [])
        if self._trainer and len(everyones) == self._trainer.world_size:
            self._unfinished = everyones[self.global_rank]


def _per_example(losses: Tensor, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of token losses by example, each [batch]."""
    zeros = torch.zeros(batch, device=losses.device)
    return zeros.index_add(0, rows, losses.float()), zeros.index_add(
        0, rows, torch.ones_like(losses, dtype=torch.float)
    )


def _to_be_fused(optimizer: Optimizer) -> bool:
    """Whether torch has one pass over memory for an optimizer's step, and its author has said nothing else.

    On a CPU the default is a loop, in which AdamW takes more than twice as long (`benchmarks/optimizer.py`). The others are left
    alone: some of torch's fused steps do not take weights that are cut over processes, or parameters without a gradient.
    """
    settings = optimizer.defaults
    kinds = {p.device.type for group in optimizer.param_groups for p in group["params"]}
    undecided = settings.get("fused") is None and settings.get("foreach") is None and not settings.get("differentiable")
    return isinstance(optimizer, torch.optim.Adam) and undecided and kinds <= {"cpu", "cuda"}
