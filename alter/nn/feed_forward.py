"""Finds the feed-forward blocks of a transformer by their structure, and chooses those that get adapters."""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import nn

from alter.errors import AlterError, did_you_mean
from alter.nn.block_roles import (
    Activation,
    Roles,
    activation_names,
    block_roles,
    inline_roles,
    known_roles,
    linears,
    runs_alone,
    wrong_inline,
)
from alter.nn.linear import sizes


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block: ``down(act(gate(x)) * up(x))`` where it is gated, else ``down(act(up(x)))``.

    Attributes:
        name: dotted path of the block; of the layer, where its linear maps stand in the layer itself.
        layer: counted over the whole model, the encoder's layers before the decoder's.
        stack: dotted path of the list of layers it belongs to.
        index: of its layer in that stack.
        inline: its linear maps have no module of their own, as in BART; ``name`` cannot be called as the block.
        gate: name of the linear map under the activation, in ``name``; None where the block has two maps only.
        up: name of the other one into the intermediate width.
        down: name of the one back.
        activation: act.
        hidden_size: d, of the block's input and output.
        intermediate_size: h.
    """

    name: str
    layer: int
    stack: str
    index: int
    inline: bool
    gate: str | None
    up: str
    down: str
    activation: Activation
    hidden_size: int
    intermediate_size: int


def find_feed_forwards(model: nn.Module, pattern: str | None = None) -> list[FeedForward]:
    """Finds the feed-forward blocks of a model.

    In every layer of every stack, it looks for two linear maps d -> h -> d, or three with a gate, and an activation.
    What it takes for a block is run once and compared with the formula, so that one of another function is not taken.

    Args:
        model: a transformer.
        pattern: names the blocks' modules instead: a glob or regular expression over the whole dotted path, or its end.

    Raises:
        AlterError: nothing is found.
    """
    blocks = _by_structure(model) if pattern is None else _by_pattern(model, pattern)
    if not blocks:
        raise AlterError(
            f"ffn: no feed-forward block of {type(model).__name__} is found by its structure; name the blocks in the "
            "recipe, for example ffn: '*.mlp', or take another backbone."
        )
    return _numbered(model, blocks)


def select_layers(found: list[FeedForward], layers: str | list[int]) -> list[FeedForward]:
    """Chooses the blocks that get adapters.

    Args:
        found: what ``find_feed_forwards`` returned.
        layers: ``all``; ``last:4`` or ``last:40%`` (rounded up), of each stack; or a list of indices over the whole model.

    Raises:
        AlterError: ``layers`` is malformed or asks for a layer that is not there.
    """
    if isinstance(layers, str):
        return found if layers == "all" else _last(found, layers)
    known = {block.layer for block in found}
    if not layers or any(isinstance(index, bool) or not isinstance(index, int) for index in layers):
        raise AlterError(f"layers: {layers!r} names no layer; write all, last:4 or a list of indices such as [0, 5].")
    if wrong := sorted(set(layers) - known):
        raise AlterError(
            f"layers: the backbone has no feed-forward block in layer {', '.join(map(str, wrong))}; its layers are "
            f"{min(known)} to {max(known)}."
        )
    return [block for block in found if block.layer in layers]


def _last(found: list[FeedForward], layers: str) -> list[FeedForward]:
    match = re.fullmatch(r"last:\s*(\d+)(%?)", layers.strip())
    if match is None or int(match[1]) == 0:
        raise AlterError(
            f"layers: '{layers}' is not understood; write all, last:4 or a list of indices such as [0, 5]."
            f"{did_you_mean(layers, ['all', 'last:4'])}"
        )
    stacks: dict[str, list[int]] = {}
    for block in found:
        stacks.setdefault(block.stack, []).append(block.layer)
    sizes = {stack: len(set(indices)) for stack, indices in stacks.items()}
    shortest, number = min(sizes.values()), int(match[1])
    counts = {stack: math.ceil(number * size / 100) if match[2] else number for stack, size in sizes.items()}
    if any(counts[stack] > sizes[stack] for stack in stacks):
        raise AlterError(
            f"layers: '{layers}' asks for more layers than the backbone's {shortest}"
            f"{' in a stack' if len(stacks) > 1 else ''}; write last:{shortest} or fewer, or all."
        )
    chosen = {layer for stack, indices in stacks.items() for layer in sorted(set(indices))[-counts[stack] :]}
    return [block for block in found if block.layer in chosen]


# -- where to look ----------------------------------------------------------------------------------------------------


def _by_structure(model: nn.Module) -> list[tuple[str, Roles]]:
    blocks, names = [], activation_names(model)
    known: dict[Hashable, Roles] = {}
    for stack, layers in _stacks(model):
        for index, layer in enumerate(layers):
            inside = _blocks_of_layer(f"{stack}.{index}", layer, names, known)
            if len(inside) == 1:  # several are a mixture of experts already, whose blocks see some tokens only
                blocks += inside
    wrong = wrong_inline(model, blocks)
    return [block for block in blocks if block[0] not in wrong]


def _blocks_of_layer(
    prefix: str, layer: nn.Module, names: list[str], known: dict[Hashable, Roles]
) -> list[tuple[str, Roles]]:
    inside = [(name, known_roles(module, names, known)) for name, module in layer.named_modules() if name]
    blocks = [(f"{prefix}.{name}", roles) for name, roles in inside if roles is not None]
    if blocks:
        return blocks
    roles = inline_roles(layer)
    return [] if roles is None else [(prefix, roles)]


def _by_pattern(model: nn.Module, pattern: str) -> list[tuple[str, Roles]]:
    matches = _matcher(pattern)
    matched = {name: module for name, module in model.named_modules() if name and matches(name)}
    if not matched:
        ends = {name.rpartition(".")[2] for name, module in model.named_modules() if len(list(module.children())) > 1}
        raise AlterError(
            f"ffn: '{pattern}' matches no module of {type(model).__name__}; name the feed-forward blocks, for example "
            f"'*.mlp'.{did_you_mean(pattern.rpartition('.')[2], ends)}"
        )
    names, blocks = activation_names(model), []
    for name, module in matched.items():
        roles = block_roles(module, names) or (None if runs_alone(module) else inline_roles(module))
        if roles is not None:
            blocks.append((name, roles))
        elif len(linears(module)) > 1:  # matched on purpose, unlike parts that a wide pattern also matches
            raise AlterError(f"ffn: '{pattern}' matches {name}, {_not_a_block(module)}")
    if not blocks:
        name, module = next(iter(matched.items()))
        raise AlterError(f"ffn: '{pattern}' matches {name}, {_not_a_block(module)}")
    for name in sorted(wrong_inline(model, blocks)):
        raise AlterError(f"ffn: '{pattern}' matches {name}, {_not_a_block(model.get_submodule(name))}")
    return blocks


def _not_a_block(module: nn.Module) -> str:
    return (
        f"but {type(module).__name__} does not compute down(act(up(x))) or down(act(gate(x)) * up(x)) with linear maps "
        "of its own; name the modules that do, or take another backbone."
    )


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Takes the pattern as the end of a path, as a glob, and as a regular expression where it is one."""
    try:
        regex = re.compile(pattern)
    except re.error:
        regex = None

    def matches(name: str) -> bool:
        if f".{name}".endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern):
            return True
        return regex is not None and regex.fullmatch(name) is not None

    return matches


def _stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules, which in a transformer are its stacks of layers."""
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer, _ in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            stacks.append((name, module))
    return stacks


def _numbered(model: nn.Module, blocks: list[tuple[str, Roles]]) -> list[FeedForward]:
    """Counts layers over all stacks that have blocks; a block outside of any stack is a layer of its own."""
    lengths = {stack: len(layers) for stack, layers in _stacks(model)}
    places, loose = [], itertools.count()
    for name, _ in blocks:
        stack = next((stack for stack in lengths if name.startswith(f"{stack}.")), "")
        places.append((stack, int(name[len(stack) + 1 :].split(".")[0]) if stack else next(loose)))
    starts, total = {}, 0
    for stack in dict.fromkeys(stack for stack, _ in places):
        starts[stack] = total
        total += lengths.get(stack, len(blocks))
    found = []
    for (name, roles), (stack, index) in zip(blocks, places, strict=True):
        parts = (roles.inline, roles.gate, roles.up, roles.down, roles.activation)
        found.append(
            FeedForward(
                name, starts[stack] + index, stack, index, *parts, *sizes(model.get_submodule(f"{name}.{roles.up}"))
            )
        )
    return found
