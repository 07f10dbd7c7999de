"""Batches of tensors from encoded examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


class Collator:
    """Pads examples into batches; padding is marked by the attention mask, whatever the padding token is.

    Args:
        pad_token_id: fills padding.
        seq2seq: whether the prompt goes to an encoder and the target to a decoder.
    """

    def __init__(self, pad_token_id: int, seq2seq: bool) -> None:
        self.pad_token_id = pad_token_id
        self.seq2seq = seq2seq

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Makes a training batch; the loss is on target tokens alone.

        Args:
            examples: with ``prompt_ids``, ``target_ids`` and ``task_id``; ``company`` where they only keep other processes
                company.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` (-100 where no loss), [batch, seq], and ``task_ids`` [batch]; a
            batch for company has ``counts`` too, a scalar 0.
        """
        prompts = [list(example["prompt_ids"]) for example in examples]
        targets = [list(example["target_ids"]) for example in examples]
        if self.seq2seq:
            inputs, labels = prompts, targets
        else:
            inputs = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
            labels = [[IGNORED] * len(prompt) + target for prompt, target in zip(prompts, targets, strict=True)]
        batch = {
            **self._inputs(inputs, left=False),
            "labels": _pad(labels, IGNORED, left=False),
            "task_ids": torch.tensor([example["task_id"] for example in examples]),
        }
        return {**batch, "counts": torch.tensor(0.0)} if examples[0].get("company") else batch

    def prompts(self, prompts: Sequence[Sequence[int]], task_ids: Sequence[int]) -> dict[str, Tensor]:
        """Makes a batch of prompts to answer, padded on the left for a causal model.

        Returns:
            ``input_ids`` and ``attention_mask`` [batch, seq], and ``task_ids`` [batch].
        """
        return {**self._inputs(prompts, left=not self.seq2seq), "task_ids": torch.tensor(task_ids)}

    def _inputs(self, rows: Sequence[Sequence[int]], left: bool) -> dict[str, Tensor]:
        return {
            "input_ids": _pad(rows, self.pad_token_id, left),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, left),
        }


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> Tensor:
    longest = max(map(len, rows))
    filled = [[value] * (longest - len(row)) for row in rows]
    whole = [[*f, *row] if left else [*row, *f] for f, row in zip(filled, rows, strict=True)]
    return torch.tensor(whole, dtype=torch.long)
