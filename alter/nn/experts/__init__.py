"""Experts: E adapters of one shape, stacked in one tensor each, so that no loop runs over experts or examples.

An expert A_k adds to the frozen feed-forward F of a block: the layer computes ``F(x) + sum_k g_k A_k(x)``. Experts of
the kind that varies F itself (``LoRA`` and its like, ``FFNCopy``) have ``A_k(x) = F_k(x) - F(x)``; they return F_k(x) whole and say so
by ``contains_ffn``, so that F need not be computed where it cancels.
"""

from alter.nn.experts.base import Expert
from alter.nn.experts.bottleneck import Bottleneck
from alter.nn.experts.ffn_copy import FFNCopy
from alter.nn.experts.hydra_lora import HydraLoRA
from alter.nn.experts.lora import LoRA
from alter.nn.experts.mtl_lora import MTLLoRA

__all__ = ["Bottleneck", "Expert", "FFNCopy", "HydraLoRA", "LoRA", "MTLLoRA"]
