"""The trunk cache: each example's states at the cut are computed once and read from disk from then on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from alter.errors import AlterError
from alter.home import alter_home
from alter.nn.trunk import Trunk
from alter.nn.trunk_store import KEY_BYTES, TrunkStore

GB = 2**30


class TrunkCache:
    """How the states below the first adapted block are kept; later epochs, stage 2 and other runs start from them.

    Args:
        enabled: whether they are kept at all.
        max_gb: of disk, for all backbones and cuts together.
        dtype: of the stored states; auto is the one that the backbone computes in, so that nothing is rounded.
        evict: whether states that this run has not used make room, longest unused first; otherwise a full cache takes
            no more.
        folder: by default ``trunk`` in ALTER's cache folder.

    Raises:
        AlterError: ``max_gb`` is no number above 0.
    """

    def __init__(
        self,
        enabled: bool = True,
        max_gb: float = 10.0,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        evict: bool = True,
        folder: str | None = None,
    ) -> None:
        if not 0 < max_gb < math.inf:  # states of other runs would make room for none
            raise AlterError(
                f"trunk_cache.max_gb: {max_gb} is no number above 0; to keep nothing, write trunk_cache.enabled: false."
            )
        self.enabled = enabled
        self.max_gb = max_gb
        self.dtype = dtype
        self.evict = evict
        self.folder = Path(folder).expanduser() if folder else alter_home() / "trunk"

    def stored_dtype(self, computed: torch.dtype) -> torch.dtype:
        """The type that states computed in another are stored in."""
        chosen = {"auto": computed, "fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        return chosen if chosen == torch.bfloat16 else torch.float32

    def open(self, identity: str, width: int, computed: torch.dtype) -> TrunkStore:
        """Opens the store of one trunk.

        Args:
            identity: everything that the states depend on beside the example.
            width: d.
            computed: the type that the backbone computes in.
        """
        dtype = self.stored_dtype(computed)
        name = hashlib.sha256(f"{identity} {dtype} {width}".encode()).hexdigest()[:24]
        return TrunkStore(self.folder / name, width, dtype, int(self.max_gb * GB), self.evict)


class CachedTrunk:
    """A trunk whose states are looked up before they are computed.

    Args:
        trunk: the split stack.
        store: where its states are.
        dtype: that the stack computes in.
    """

    def __init__(self, trunk: Trunk, store: TrunkStore, dtype: torch.dtype) -> None:
        self.trunk = trunk
        self.store = store
        self.dtype = dtype

    def states(self, keys: Sequence[bytes], lengths: Sequence[int], inputs: Mapping[str, Tensor]) -> Tensor:
        """The states of a batch that is padded on the right.

        Args:
            keys: of the examples, from ``example_keys``.
            lengths: tokens of each example.
            inputs: for the stack, each [batch, ...].

        Returns:
            [batch, seq, d], zero where there is padding.
        """
        found = {row: states for row, key in enumerate(keys) if (states := self.store.get(key)) is not None}
        if missing := [row for row in range(len(keys)) if row not in found]:
            for row, states in self._compute(missing, lengths, inputs):
                found[row] = states.to(self.store.dtype)
                self.store.put(keys[row], found[row])
        batch, seq = inputs["input_ids"].shape
        states = torch.zeros(batch, seq, self.store.width, dtype=self.dtype)
        for row, stored in found.items():
            states[row, : len(stored)] = stored
        return states.to(inputs["input_ids"].device)  # a GPU waits for one copy and not for one a row

    def _compute(
        self, rows: Sequence[int], lengths: Sequence[int], inputs: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields each row with its states, [tokens, d].

        On a CPU the whole batch is computed, as it would be without a cache. A product's last bits depend on the rows beside
        it, so that a batch which an interrupted run had stored in part would else give other states.
        """
        if inputs["input_ids"].device.type == "cpu":
            computed = self.trunk.states(**inputs)[list(rows)]
        else:
            computed = self.trunk.states(**{name: value[list(rows)] for name, value in inputs.items()}).cpu()
        yield from ((row, states[: lengths[row]]) for row, states in zip(rows, computed, strict=True))


def example_keys(*parts: tuple[Tensor, Tensor]) -> tuple[list[bytes], list[int]]:
    """Names each example of a batch by its tokens.

    Args:
        parts: token ids [batch, seq] and how many of each row count [batch]; such as the prompt's and the target's.

    Returns:
        the keys, and how many tokens of the last part count.
    """
    hashes = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in range(len(parts[0][0]))]
    for ids, lengths in parts:
        for row, digest, length in zip(ids.cpu().numpy(), hashes, lengths.tolist(), strict=True):
            digest.update(row[:length].tobytes() + length.to_bytes(8, "little"))
    return [digest.digest() for digest in hashes], parts[-1][1].tolist()
