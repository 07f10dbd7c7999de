"""Greedy decoding a token at a time, of rows that come and go: a row joins while others are being answered, and leaves at its end.

Rows of a cache can be put beside each other where each layer keeps all keys and values, padded on the left under the mask. Layers
that keep a window or a state, encoder-decoders, and routers that keep a position's gates are left to ``decoding.generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from alter.nn.choices import CausalPrompts
from alter.nn.decoding import end_tokens
from alter.nn.model import MTAModel
from alter.nn.thin import ThinProducts

# What a backbone may have in its generation settings without changing a greedy answer.
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "do_sample",
    "temperature", "top_k", "top_p", "use_cache", "cache_implementation", "transformers_version", "_from_model_config",
    "output_attentions", "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip


class _Row(NamedTuple):
    """One prompt that is being answered."""

    key: Hashable
    limit: int
    tokens: list[int]


class StepDecoder:
    """The rows that are being answered, and their cache.

    Args:
        model: in evaluation mode; ``fits(model)`` must hold.
        stop_tokens: end an answer beside the end-of-sequence token.
        watch: called with each new token of each row, as ``watch(key, tokens, ended)``: the answer so far, and whether this was
            its last token. Where it returns False the row leaves.
    """

    def __init__(
        self, model: MTAModel, stop_tokens: Sequence[int], watch: Callable[[Hashable, list[int], bool], bool]
    ) -> None:
        self.model, self.watch = model, watch
        self.ends = end_tokens(model.backbone, stop_tokens)
        self.rows: list[_Row] = []
        self._cache = DynamicCache()
        device = next(model.parameters()).device
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=device)  # [rows, cached]
        self._task_ids = self._last = torch.zeros(0, dtype=torch.long, device=device)  # [rows]
        self._prompts = model.routing.prompt[:0].to(device)  # [rows, prompt_size]
        self._thin_products = ThinProducts(model)

    @staticmethod
    def fits(model: MTAModel) -> bool:
        """Whether this decoding answers as ``decoding.generate`` does."""
        if model.is_seq2seq or any(router.reads_sequence for router in model.routers()):
            return False
        if "past_key_values" not in inspect.signature(model.body.decoder.forward).parameters:
            return False  # it has no cache
        layers = DynamicCache(config=model.backbone.config).layers
        settings = set(model.backbone.generation_config.to_diff_dict())
        return all(type(layer) is DynamicLayer for layer in layers) and settings <= HARMLESS

    @torch.inference_mode()
    def join(self, keys: Sequence[Hashable], prompts: Mapping[str, Tensor], limits: Sequence[int]) -> None:
        """Reads prompts, writes the first token of each, and lets those that go on join.

        Args:
            keys: of the prompts, to tell them apart.
            prompts: as for ``decoding.generate``.
            limits: the most tokens of each answer.
        """
        read = CausalPrompts(self.model, prompts)
        tokens = read.first_tokens.argmax(-1)
        pooled = self.model.routing.prompt
        pooled = pooled if len(pooled) == len(keys) else pooled[:1].expand(len(keys), -1)  # nobody reads it
        length = max(self._mask.shape[1], read.mask.shape[1])
        old, new = [*self._cache], [*read.cache]
        if self.rows:
            pairs = [
                [torch.cat([_left(a, length), _left(b, length)]) for a, b in zip(one[:2], other[:2], strict=True)]
                for one, other in zip(old, new, strict=True)
            ]
        else:
            pairs = [layer[:2] for layer in new]
        self._cache = _cache(pairs)
        self._mask = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in (self._mask, read.mask)])
        self._task_ids = torch.cat([self._task_ids, prompts["task_ids"]])
        self._prompts = torch.cat([self._prompts, pooled])
        self._last = torch.cat([self._last, tokens])
        first = len(self.rows)
        self.rows += [_Row(key, limit, []) for key, limit in zip(keys, limits, strict=True)]
        self._note(first, tokens.tolist())

    @torch.inference_mode()
    def step(self) -> None:
        """Writes one token more of every row."""
        if not self.rows:
            return
        self._mask = F.pad(self._mask, (0, 1), value=1)
        self.model.routing.announce(self._task_ids, self._prompts)
        with self._thin_products.of(len(self._last)):
            output = self.model.body.decode(
                self._last.unsqueeze(1),
                attention_mask=self._mask,
                position_ids=self._mask.sum(1, keepdim=True) - 1,
                past_key_values=self._cache,
                use_cache=True,
            )
            self._last = self.model.body.logits(output.last_hidden_state[:, -1]).float().argmax(-1)
        self._note(0, self._last.tolist())

    def _note(self, first: int, tokens: Sequence[int]) -> None:
        """Tells the new tokens of the rows from ``first`` on, and lets rows that have ended leave."""
        stay = list(range(first))
        for place, token in enumerate(tokens, first):
            key, limit, written = self.rows[place]
            if token not in self.ends:
                written.append(token)
            ended = token in self.ends or len(written) >= limit
            if self.watch(key, written, ended) and not ended:
                stay.append(place)
        if len(stay) < len(self.rows):
            self._keep(stay)

    def _keep(self, places: list[int]) -> None:
        self.rows = [self.rows[place] for place in places]
        kept = torch.tensor(places, dtype=torch.long, device=self._mask.device)
        mask = self._mask[kept]
        start = int(mask.any(0).int().argmax()) if places else 0  # columns that were needed by those that left alone
        self._mask = mask[:, start:] if places else mask[:, :0]
        self._task_ids, self._prompts, self._last = self._task_ids[kept], self._prompts[kept], self._last[kept]
        pairs = [[states[kept][..., start:, :] for states in layer[:2]] for layer in self._cache] if places else []
        self._cache = _cache(pairs)


def _left(states: Tensor, length: int) -> Tensor:
    """Keys or values [rows, heads, seq, d], filled up on the left to ``length``."""
    return F.pad(states, (0, 0, length - states.shape[-2], 0))


def _cache(pairs: Iterable[Sequence[Tensor]]) -> DynamicCache:
    """A cache of each layer's keys and values."""
    found = DynamicCache()
    for index, (keys, values) in enumerate(pairs):
        found.update(keys, values, index)
    return found
