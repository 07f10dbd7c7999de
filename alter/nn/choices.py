"""How likely each of some answers is: a prompt is read once, then its choices."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from alter.nn.body import IGNORED
from alter.nn.loss import token_losses
from alter.nn.model import MTAModel

SCORED_FIRST = 8  # of many choices, those with the likeliest first tokens
MAX_SCORED_POSITIONS = 4096  # rows x (prompt + choice) of one pass of a CPU; bounds the choices' caches and logits
MOST_PADDING = 64  # tokens of a prompt's choices in one pass of a CPU; a further pass takes about as long as so many
ON_GPU = 8  # times as much at once keeps a GPU busy


def at_once(most: int, device: torch.device) -> int:
    """How much a device does at once of what a CPU does ``most`` of."""
    return most * (ON_GPU if device.type == "cuda" else 1)


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
    return _scores(
        model, prompts, _padded(choices, prompts["input_ids"].device).expand(len(prompts["input_ids"]), -1, -1)
    )


@torch.inference_mode()
def own_choice_log_likelihoods(
    model: MTAModel, prompts: Mapping[str, Tensor], choices: Sequence[Sequence[Sequence[int]]]
) -> list[Tensor]:
    """The same for prompts that each have choices of their own, such as those of different tasks.

    Args:
        model: in evaluation mode.
        prompts: as for ``generate``.
        choices: of each prompt, as for ``choice_log_likelihoods``; about equally many, since all are filled up to the most.

    Returns:
        for each prompt the summed log-probabilities of its choices.
    """
    tokens, _ = _filled(choices, prompts["input_ids"].device)
    return [row[: len(own)] for row, own in zip(_scores(model, prompts, tokens), choices, strict=True)]


def _scores(model: MTAModel, prompts: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The log-likelihood of each row's own choices [batch, choices, length], -1 behind their ends; [batch, choices]."""
    groups = _by_length(tokens)
    found = torch.empty(tokens.shape[:2], device=tokens.device)
    size = min(_rows_at_once(prompts, *_taken(tokens, group).shape[1:]) for group in groups)
    for rows, part in _parts(prompts, size):
        read = _read(model, part)
        for group in groups:
            found[rows].scatter_(1, group[rows], read.score(_taken(tokens[rows], group[rows])))
    return found


def _by_length(tokens: Tensor) -> list[Tensor]:
    """Each row's choices in groups of like length, so that little is padding: which of them, each [batch, some]."""
    lengths, order = (tokens >= 0).sum(-1).sort(dim=1, descending=True, stable=True)
    most, groups, start, padding = at_once(MOST_PADDING, tokens.device), [], 0, 0
    longest = lengths.amax(0).tolist()  # of all rows, which stay together
    for place, length in enumerate(longest):
        padding += longest[start] - length
        if padding > most:
            groups.append(order[:, start:place])
            start, padding = place, 0
    return [*groups, order[:, start:]]


@torch.inference_mode()
def best_choices(
    model: MTAModel, prompts: Mapping[str, Tensor], choices: Sequence[Sequence[Sequence[int]]]
) -> list[int]:
    """Finds the likeliest of every prompt's own choices, the first of equals, without scoring all of many.

    A choice is at most as likely as its first token, which the prompt's own pass tells for all. So the few with the
    likeliest first tokens are scored, then the next as many again, until none of the others could be above the best.

    Args:
        model: in evaluation mode.
        prompts: as for ``generate``.
        choices: of each prompt, token ids of each choice, with the end-of-sequence token.

    Returns:
        for each prompt, which of its choices.
    """
    tokens, beyond = _filled(choices, prompts["input_ids"].device)
    size, found = _rows_at_once(prompts, SCORED_FIRST, tokens.shape[-1]), []
    for place, part in _parts(prompts, size):
        own, none, read = tokens[place], beyond[place], _read(model, part)
        bounds = read.first_tokens.gather(1, own[:, :, 0]).masked_fill(none, -torch.inf)
        order = bounds.argsort(dim=1, descending=True)
        chosen, done = order[:, :SCORED_FIRST], SCORED_FIRST
        scores = torch.full_like(bounds, -torch.inf).scatter(1, chosen, read.score(_taken(own, chosen)))
        while done < own.shape[1]:
            # rounding may make a bound seem lower than it is
            rows = (bounds.gather(1, order[:, done : done + 1]) >= scores.amax(1, keepdim=True) - 1e-3).nonzero()[:, 0]
            if not len(rows):
                break
            chosen = order[rows, done : 2 * done]
            rest = {name: value[rows] for name, value in part.items()}
            scores[rows.unsqueeze(1), chosen] = _scores(model, rest, _taken(own[rows], chosen))
            done *= 2
        found += scores.masked_fill(none, -torch.inf).argmax(1).tolist()
    return found


def _filled(choices: Sequence[Sequence[Sequence[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each row's choices, filled up to the most by its shortest: [batch, choices, length], and which are beyond its own."""
    kinds = list({id(own): own for own in choices}.values())  # the rows of a task share theirs
    most = max(map(len, kinds))
    filled = [choice for own in kinds for choice in [*own, *[min(own, key=len)] * (most - len(own))]]
    tokens = _padded(filled, device).unflatten(0, (len(kinds), most))
    counts = torch.tensor([len(own) for own in kinds], device=device)
    beyond = torch.arange(most, device=device) >= counts.unsqueeze(1)
    places = {id(own): place for place, own in enumerate(kinds)}
    rows = torch.tensor([places[id(own)] for own in choices], device=device)
    return tokens[rows], beyond[rows]


def _taken(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Some of each row's choices, [batch, choices, length] at [batch, chosen], as long as the longest of them."""
    found = tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return found[..., : int((found >= 0).sum(-1).max())]


def _read(model: MTAModel, prompts: Mapping[str, Tensor]) -> CausalPrompts | _Seq2seqPrompts:
    return _Seq2seqPrompts(model, prompts) if model.is_seq2seq else CausalPrompts(model, prompts)


def _padded(choices: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[choices, length], -1 behind the end."""
    length = max(map(len, choices))
    return torch.tensor([[*choice, *[-1] * (length - len(choice))] for choice in choices], device=device)


def _rows_at_once(prompts: Mapping[str, Tensor], count: int, length: int) -> int:
    """How many prompts may be scored together with ``count`` choices each."""
    ids = prompts["input_ids"]
    return max(1, at_once(MAX_SCORED_POSITIONS, ids.device) // (count * (ids.shape[1] + length)))


def _parts(prompts: Mapping[str, Tensor], size: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The prompts, ``size`` at a time, and which of the batch's rows they are."""
    for start in range(0, len(prompts["input_ids"]), size):
        rows = slice(start, start + size)
        yield rows, {name: value[rows] for name, value in prompts.items()}


def _can_be_repeated(cache: Any) -> bool:
    """Whether each layer of a cache keeps keys and values alone; some keep a state, and some backbones have no cache."""
    return cache is not None and {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


class CausalPrompts:
    """Prompts that have been read once, to score choices behind them."""

    def __init__(self, model: MTAModel, prompts: Mapping[str, Tensor]) -> None:
        self.model, self.mask = model, prompts["attention_mask"]
        model.set_examples(prompts)
        places = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.ids = prompts["input_ids"]
        output = model.body.decode(self.ids, attention_mask=self.mask, position_ids=places, use_cache=True)
        self.cache: Any = getattr(output, "past_key_values", None)
        self.states = output.last_hidden_state[:, -1]

    @functools.cached_property
    def first_tokens(self) -> Tensor:
        """The log-probability of each token as an answer's first, [batch, vocabulary]."""
        return self.model.body.logits(self.states).float().log_softmax(-1)

    def score(self, choices: Tensor) -> Tensor:
        """The log-likelihood of each row's own choices [batch, choices, length], [batch, choices]."""
        batch, count, length = choices.shape
        first = self.first_tokens.gather(1, choices[:, :, 0])
        if length == 1:
            return first
        wanted, inputs = choices[:, :, 1:].flatten(0, 1), choices[:, :, :-1].flatten(0, 1)
        mask = torch.cat([self.mask.repeat_interleave(count, 0), (inputs >= 0).to(self.mask.dtype)], dim=1)
        behind = inputs.clamp_min(0)
        if _can_be_repeated(self.cache):
            hidden_states = self._go_on(behind, mask, count)
        else:
            whole = torch.cat([self.ids.repeat_interleave(count, 0), behind], dim=1)
            places = (mask.cumsum(1) - 1).clamp_min(0)
            output = self.model.body.decode(whole, attention_mask=mask, position_ids=places)
            hidden_states = output.last_hidden_state[:, 1 - length :]
        return first + _sum_by_row(self.model, hidden_states, wanted).view(batch, count)

    def _go_on(self, inputs: Tensor, mask: Tensor, count: int) -> Tensor:
        """What comes after the cached prompts, ``count`` times each, [batch * count, length, d]."""
        cache = copy.copy(self.cache)
        cache.layers = list(map(copy.copy, self.cache.layers))  # the prompts' own stays for other choices
        cache.batch_repeat_interleave(count)
        start = self.mask.sum(1).repeat_interleave(count).unsqueeze(1)
        output = self.model.body.decode(
            inputs,
            attention_mask=mask,
            position_ids=start + torch.arange(inputs.shape[1], device=mask.device),
            past_key_values=cache,
            use_cache=True,
        )
        return cast(Tensor, output.last_hidden_state)


class _Seq2seqPrompts:
    """The same for an encoder-decoder, whose choices are whole decoder sequences."""

    def __init__(self, model: MTAModel, prompts: Mapping[str, Tensor]) -> None:
        self.model, self.mask = model, prompts["attention_mask"]
        model.set_examples(prompts)
        self.encoded = model.body.encode(prompts["input_ids"], self.mask)

    @functools.cached_property
    def first_tokens(self) -> Tensor:
        """The log-probability of each token as an answer's first, [batch, vocabulary]."""
        start = self.model.body.shift_right(self.mask.new_zeros(len(self.mask), 1))
        output = self.model.body.decode(start, encoder_hidden_states=self.encoded, encoder_attention_mask=self.mask)
        return self.model.body.logits(output.last_hidden_state[:, -1]).float().log_softmax(-1)

    def score(self, choices: Tensor) -> Tensor:
        """The log-likelihood of each row's own choices [batch, choices, length], [batch, choices]."""
        batch, count, _ = choices.shape
        wanted = choices.flatten(0, 1)
        output = self.model.body.decode(
            self.model.body.shift_right(wanted.masked_fill(wanted < 0, IGNORED)),
            encoder_hidden_states=self.encoded.repeat_interleave(count, 0),
            encoder_attention_mask=self.mask.repeat_interleave(count, 0),
        )
        return _sum_by_row(self.model, output.last_hidden_state, wanted).view(batch, count)


def _sum_by_row(model: MTAModel, hidden_states: Tensor, wanted: Tensor) -> Tensor:
    """Sums log-probabilities of the wanted tokens [rows, length], -1 where none, into [rows]."""
    kept = wanted >= 0
    losses = token_losses(hidden_states[kept], wanted[kept], model.body.logits, model.body.vocabulary)
    return torch.zeros(len(wanted), device=losses.device).index_add(0, kept.nonzero()[:, 0], -losses)
