"""A backbone as training sees it: encoder, decoder and head, each by itself, and the trunks that need not run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from alter.nn.attention import trainable_attention
from alter.nn.feed_forward import FeedForward
from alter.nn.trunk import Trunk, replaced_forward
from alter.nn.trunk_cache import CachedTrunk, TrunkCache, example_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100


class Body:
    """Runs the parts of a causal or seq2seq language model; holds no parameters of its own.

    Args:
        backbone: a Hugging Face language model with its head.
        adapted: its feed-forward blocks that have adapters.
    """

    def __init__(self, backbone: PreTrainedModel, adapted: Sequence[FeedForward]) -> None:
        self.backbone = backbone
        self.adapted = adapted
        self.is_seq2seq = bool(backbone.config.is_encoder_decoder)
        self.decoder: nn.Module = backbone.get_decoder()
        self.encoder: nn.Module | None = backbone.get_encoder() if self.is_seq2seq else None
        self.vocabulary = self._head_weight.shape[0]
        self.cached: dict[str, CachedTrunk] = {}
        self.uncached = "not asked for"

    @property
    def head_trains(self) -> bool:
        """Whether the output embeddings do, as in full fine-tuning."""
        return self._head_weight.requires_grad

    @property
    def _head_weight(self) -> Tensor:
        return cast(Tensor, self.backbone.get_output_embeddings().weight)

    def stack(self, name: str) -> nn.Module:
        """The ``encoder`` or the ``decoder``."""
        found = self.decoder if name == "decoder" else self.encoder
        assert found is not None
        return found

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The encoder's output, [batch, seq, d]."""
        return self.stack("encoder")(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def decode(self, input_ids: Tensor, **options: Any) -> Any:
        """The decoder's output, its ``last_hidden_state`` [batch, seq, d].

        Args:
            input_ids: [batch, seq].
            options: for the decoder: ``attention_mask``, ``encoder_hidden_states``, ``use_cache`` and so on.
        """
        return self.decoder(input_ids=input_ids, **{"use_cache": False, **options})

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile does not follow a forward that is replaced for a while
    def logits(self, hidden_states: Tensor) -> Tensor:
        """The head, with whatever the model does before and after it (scaling, capping, biases).

        Args:
            hidden_states: [tokens, d], the decoder's output at some positions.

        Returns:
            [tokens, vocabulary].
        """
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

        states = hidden_states.unsqueeze(0)
        token = torch.zeros(1, 1, dtype=torch.long, device=states.device)
        encoded = BaseModelOutput(last_hidden_state=states)
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)
        encoded.router_logits = output.router_logits = (
            None  # where blocks have experts of their own, as in Switch Transformers
        )
        inputs = {"encoder_outputs": encoded, "decoder_input_ids": token} if self.is_seq2seq else {"input_ids": token}
        with replaced_forward(self.decoder, lambda *_, **__: output):
            return self.backbone(**inputs, use_cache=False).logits.squeeze(0)

    def last_hidden_states(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The decoder's output for a training batch, padded on the right; trunks that are cached are not run.

        Args:
            input_ids: [batch, seq].
            attention_mask: [batch, seq].
            labels: [batch, target], the decoder's targets; looked at for seq2seq alone.

        Returns:
            [batch, seq or target, d].
        """
        lengths = attention_mask.sum(1)
        prompts = {"input_ids": input_ids, "attention_mask": attention_mask}
        if not self.is_seq2seq:
            return self._run("decoder", prompts, (input_ids, lengths))
        encoded = self._run("encoder", prompts, (input_ids, lengths))
        inputs = {
            "input_ids": self.shift_right(labels),
            "encoder_hidden_states": encoded,
            "encoder_attention_mask": attention_mask,
        }
        return self._run("decoder", inputs, (input_ids, lengths), (labels, (labels != IGNORED).sum(1)))

    def _run(self, name: str, inputs: dict[str, Tensor], *example: tuple[Tensor, Tensor]) -> Tensor:
        stack = self.stack(name)
        options = {"use_cache": False} if name == "decoder" else {}
        if name not in self.cached:
            with trainable_attention(self._head_weight):
                return stack(**inputs, **options).last_hidden_state
        cached = self.cached[name]
        states = cached.states(*example_keys(*example), inputs)
        if cached.trunk.whole:
            return states
        with cached.trunk.replaced_by(states), trainable_attention(self._head_weight):
            return stack(**inputs, **options).last_hidden_state

    def shift_right(self, labels: Tensor) -> Tensor:
        """Decoder inputs from labels: the start token, then every label but the last."""
        config = self.backbone.config
        start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id)], dim=1)

    # -- trunks -----------------------------------------------------------------------------------------------------

    def trunks(self) -> dict[str, Trunk]:
        """The trunks that compute the same at every step: below the first adapter, and fed by nothing that moves."""
        first: dict[str, int] = {}
        for block in self.adapted:
            first[block.stack] = min(block.index, first.get(block.stack, block.index))
        stacks = {name: cast(nn.ModuleList, self.backbone.get_submodule(name)) for name in first if name}
        if len(stacks) != len(first):
            return {}
        found = {}
        if self.is_seq2seq:
            own = {name for name, blocks in stacks.items() if _holds(self.stack("encoder"), blocks)}
            if len(own) > 1 or any(first[name] == 0 for name in own):
                return {}
            if own:  # the encoder's output moves, so nothing of the decoder is constant
                (name,) = own
                return {"encoder": Trunk(self.stack("encoder"), stacks[name], first[name])}
            found["encoder"] = Trunk(self.stack("encoder"), (), 0)
        own = {name for name, blocks in stacks.items() if _holds(self.decoder, blocks)}
        if len(own) == 1 and first[name := own.pop()] > 0:
            found["decoder"] = Trunk(self.decoder, stacks[name], first[name])
        return found

    def cache_trunks(self, cache: TrunkCache, identity: str) -> dict[str, CachedTrunk]:
        """Keeps the states of the trunks from now on.

        Args:
            cache: where and how.
            identity: of the backbone's function: its fingerprint and precision.

        Returns:
            what is cached, by stack; empty where nothing below the adapters is constant.
        """
        self.cached, self.uncached = {}, ""
        if not cache.enabled:
            self.uncached = "trunk_cache.enabled is false"
        elif any(map(_drops, self.backbone.modules())):
            self.uncached = "the backbone has dropout, so its states change"
        elif not (trunks := self.trunks()):
            self.uncached = "no block stands below the first adapter"
        if self.uncached:
            return self.cached
        width, dtype = cast(Tensor, self.backbone.get_input_embeddings().weight).shape[1], self.backbone.dtype
        for name, trunk in trunks.items():
            if any(p.requires_grad for p in trunk.parameters()):
                self.uncached = f"the {name}'s blocks below the first adapter train"
                break  # it moves, and what is above it
            if not trunk.whole and not trunk.works(**self._sample(name)):
                self.uncached = f"{type(trunk.stack).__name__} does not start from given states"
                break
            store = cache.open(f"{identity} {name} {'whole' if trunk.whole else trunk.cut}", width, dtype)
            self.cached[name] = CachedTrunk(trunk, store, dtype)
        return self.cached

    def stored_bytes(self, prompts: int, targets: int) -> int:
        """How much the states of examples take on disk, of as many tokens of prompts and of targets."""
        tokens = {"encoder": prompts, "decoder": targets} if self.is_seq2seq else {"decoder": prompts + targets}
        return sum(tokens[name] * cached.store.row_bytes for name, cached in self.cached.items())

    def _sample(self, name: str) -> dict[str, Tensor]:
        ids = torch.arange(12, device=self.backbone.device).view(2, 6) % self.vocabulary
        sample = {"input_ids": ids}
        if name == "decoder" and self.is_seq2seq:
            sample["encoder_hidden_states"] = self.encode(ids, torch.ones_like(ids))
        return sample


def _holds(stack: nn.Module, blocks: nn.Module) -> bool:
    return any(module is blocks for module in stack.modules())


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0
