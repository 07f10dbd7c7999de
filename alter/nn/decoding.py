"""Answers from a model: generated tokens, and the likelihood of given choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alter.errors import AlterError
from alter.nn.loss import token_losses
from alter.nn.model import IGNORED, MTAModel


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


MAX_SCORED_POSITIONS = 4096  # rows x (prompt + choice) of one pass; bounds the choices' caches and logits


@torch.inference_mode()
def generate(
    model: MTAModel,
    prompts: Mapping[str, Tensor],
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    **options: Any,
) -> list[list[int]]:
    """Decodes an answer for every prompt, greedily unless ``options`` say otherwise.

    Args:
        model: in evaluation mode.
        prompts: ``input_ids`` and ``attention_mask`` [batch, seq], ``task_ids`` [batch]; left-padded for causal models.
        max_new_tokens: the longest answer.
        stop_tokens: end an answer beside the end-of-sequence token.
        options: for the backbone's ``generate``, such as ``num_beams``.

    Returns:
        for each prompt the answer's token ids, without the end-of-sequence token and padding.
    """
    model.set_examples(prompts)
    config = model.backbone.generation_config
    end = config.eos_token_id if config.eos_token_id is not None else model.backbone.config.eos_token_id
    ends = {*(end if isinstance(end, list) else [end]), *stop_tokens}
    pad = config.pad_token_id if config.pad_token_id is not None else min(ends)
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": pad, "eos_token_id": sorted(ends), **options}
    output = model.backbone.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=max_new_tokens,
        **settings,
    )
    start = 1 if model.is_seq2seq else prompts["input_ids"].shape[1]
    return [_until(row, ends) for row in output[:, start:].tolist()]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


@torch.inference_mode()
def choice_log_likelihoods(model: MTAModel, prompts: Mapping[str, Tensor], choices: Sequence[Sequence[int]]) -> Tensor:
    """Scores every choice as the answer to every prompt; a prompt is read once for all its choices.

    Args:
        model: in evaluation mode.
        prompts: as for ``generate``.
        choices: token ids of each choice, with the end-of-sequence token.

    Returns:
        [batch, choices], the summed log-probability of the choice's tokens.
    """
    length = max(map(len, choices))
    tokens = torch.tensor([[*choice, *[-1] * (length - len(choice))] for choice in choices])
    per_prompt = len(choices) * (prompts["input_ids"].shape[1] + length)
    size = max(1, MAX_SCORED_POSITIONS // per_prompt)
    score = _score_seq2seq if model.is_seq2seq else _score_causal
    scores = []
    for start in range(0, len(prompts["input_ids"]), size):
        part = {name: value[start : start + size] for name, value in prompts.items()}
        scores.append(score(model, part, tokens.to(part["input_ids"].device)))
    return torch.cat(scores)


def _score_causal(model: MTAModel, prompts: Mapping[str, Tensor], choices: Tensor) -> Tensor:
    mask = prompts["attention_mask"]
    batch, (count, length) = len(mask), choices.shape
    model.set_examples(prompts)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    prompt = model.body.decode(prompts["input_ids"], attention_mask=mask, position_ids=places, use_cache=True)
    last = model.body.logits(prompt.last_hidden_state[:, -1])
    first = last.float().log_softmax(-1)[:, choices[:, 0]]  # [batch, choices]
    if length == 1:
        return first

    cache = prompt.past_key_values
    cache.batch_repeat_interleave(count)
    wanted = choices[:, 1:].repeat(batch, 1)
    inputs = choices[:, :-1].repeat(batch, 1)
    rest = model.body.decode(
        inputs.clamp_min(0),
        attention_mask=torch.cat([mask.repeat_interleave(count, 0), (inputs >= 0).to(mask.dtype)], dim=1),
        position_ids=mask.sum(1).repeat_interleave(count).unsqueeze(1) + torch.arange(length - 1, device=mask.device),
        past_key_values=cache,
        use_cache=True,
    )
    return first + _sum_by_row(model, rest.last_hidden_state, wanted).view(batch, count)


def _score_seq2seq(model: MTAModel, prompts: Mapping[str, Tensor], choices: Tensor) -> Tensor:
    mask = prompts["attention_mask"]
    batch, count = len(mask), len(choices)
    model.set_examples(prompts)
    encoded = model.body.encode(prompts["input_ids"], mask)
    wanted = choices.repeat(batch, 1)
    output = model.body.decode(
        model.body.shift_right(wanted.masked_fill(wanted < 0, IGNORED)),
        encoder_hidden_states=encoded.repeat_interleave(count, 0),
        encoder_attention_mask=mask.repeat_interleave(count, 0),
    )
    return _sum_by_row(model, output.last_hidden_state, wanted).view(batch, count)


def _sum_by_row(model: MTAModel, hidden_states: Tensor, wanted: Tensor) -> Tensor:
    """Sums log-probabilities of the wanted tokens [rows, length], -1 where none, into [rows]."""
    kept = wanted >= 0
    losses = token_losses(hidden_states[kept], wanted[kept], model.body.logits, model.body.vocabulary)
    return torch.zeros(len(wanted), device=losses.device).index_add(0, kept.nonzero()[:, 0], -losses)
