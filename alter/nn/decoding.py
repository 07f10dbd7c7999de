"""Answers that a model writes, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from alter.errors import AlterError
from alter.nn.model import MTAModel
from alter.nn.thin import ThinProducts


@dataclass
class Generation:
    """How answers of generation tasks are decoded.

    Attributes:
        num_beams: beams of beam search; 1 is greedy.
        length_penalty: with beams, a sequence's score is divided by its length to this power; below 1 favours short ones.
    """

    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise AlterError(f"generation.num_beams: {self.num_beams} is below 1; 1 is greedy, 4 a usual search.")

    def options(self) -> dict[str, Any]:
        """Options for ``generate``; a greedy search knows no length penalty."""
        return {} if self.num_beams == 1 else {"num_beams": self.num_beams, "length_penalty": self.length_penalty}


Watch = Callable[
    [int, list[int], bool], bool
]  # (row, its tokens so far, whether it has ended) -> whether it shall go on


@torch.inference_mode()
def generate(
    model: MTAModel,
    prompts: Mapping[str, Tensor],
    max_new_tokens: int | Sequence[int],
    stop_tokens: Sequence[int] = (),
    watch: Watch | None = None,
    **options: Any,
) -> list[list[int]]:
    """Decodes an answer for every prompt, greedily unless ``options`` say otherwise.

    Args:
        model: in evaluation mode.
        prompts: ``input_ids`` and ``attention_mask`` [batch, seq], ``task_ids`` [batch]; left-padded for causal models.
        max_new_tokens: the longest answer, of all or of each.
        stop_tokens: end an answer beside the end-of-sequence token.
        watch: called with every new token of every row that has not ended, as ``watch(row, tokens, ended)``: the row's answer so
            far, and whether this was its last token. Where it returns False the row ends. Not with beams.
        options: for the backbone's ``generate``, such as ``num_beams``.

    Returns:
        for each prompt the answer's token ids, without the end-of-sequence token and padding.
    """
    model.set_examples(prompts)
    config, ends = model.backbone.generation_config, end_tokens(model.backbone, stop_tokens)
    pad = config.pad_token_id if config.pad_token_id is not None else min(ends)
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": pad, "eos_token_id": sorted(ends), **options}
    rows = len(prompts["input_ids"])
    limits = [max_new_tokens] * rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if watch is not None:
        settings["stopping_criteria"] = [_Watched(watch, limits, ends)]
    backbone: Any = model.backbone  # what generates is mixed into the model's own class
    with ThinProducts(model).of(rows * settings["num_beams"]):
        output = backbone.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=max(limits),
            **settings,
        )
    start = 1 if model.is_seq2seq else prompts["input_ids"].shape[1]
    return [_until(row[:limit], ends) for row, limit in zip(output[:, start:].tolist(), limits, strict=True)]


# Its class is not named here: accelerate comes with it, which a recipe's flags (of Generation) do without.
def end_tokens(backbone: Any, stop_tokens: Sequence[int]) -> set[int]:
    """The tokens that end an answer: those of a Hugging Face model itself, where it names any, and ``stop_tokens``."""
    config = backbone.generation_config
    end = config.eos_token_id if config.eos_token_id is not None else backbone.config.eos_token_id
    return {*(end if isinstance(end, list) else [end]), *stop_tokens} - {None}


class _Watched(StoppingCriteria):
    """Shows each row's new token as it comes, and ends the rows that are long enough or that nobody wants any more."""

    def __init__(self, watch: Watch, limits: Sequence[int], ends: set[int]) -> None:
        self.watch, self.limits, self.ends = watch, limits, ends
        self.tokens: list[list[int]] = [[] for _ in limits]
        self.open = [True] * len(limits)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self.open[row]:
                continue
            if token not in self.ends:
                self.tokens[row].append(token)
            ended = token in self.ends or len(self.tokens[row]) >= self.limits[row]
            self.open[row] = self.watch(row, self.tokens[row], ended) and not ended
        return torch.tensor([not going_on for going_on in self.open], device=input_ids.device)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
