"""Finds the feed-forward blocks of a transformer by their structure, and says what each of their parts does."""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter.errors import AlterError, did_you_mean

Activation = Callable[[Tensor], Tensor]


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


@dataclass(frozen=True)
class _Roles:
    """What the linear maps of one module do."""

    gate: str | None
    up: str
    down: str
    activation: Activation
    inline: bool


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear map, quantised or not; None for another module."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(int, module.in_features), cast(int, module.out_features)
    if type(module).__name__ == "Conv1D":  # GPT-2's linear map, which keeps its weight as [in, out]
        fan_in, fan_out = _weight(module).shape
        return fan_in, fan_out
    return None


def _weight(linear: nn.Module) -> Tensor:
    return cast(Tensor, linear.weight)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(in, out) features of what is known to be a linear map."""
    shape = linear_shape(linear)
    assert shape is not None
    return shape


def dense_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A linear map as plain tensors, whatever its precision.

    Args:
        linear: what ``linear_shape`` knows.

    Returns:
        copies of the weight [out, in] and the bias [out] or None, in fp32.
    """
    bias = None if linear.bias is None else cast(Tensor, linear.bias).detach().float().clone()
    if _weight(linear).is_floating_point():
        weight = _weight(linear).detach().float()
        return (weight.t() if type(linear).__name__ == "Conv1D" else weight).clone(
            memory_format=torch.contiguous_format
        ), bias
    # Quantised weights have layouts of their own; the map itself says what it computes.
    with torch.no_grad():
        unit = torch.eye(sizes(linear)[0], device=_weight(linear).device)
        weight = linear(unit).float() - linear(torch.zeros_like(unit[:1])).float()
    return weight.t().contiguous(), bias


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


def _by_structure(model: nn.Module) -> list[tuple[str, _Roles]]:
    blocks, names = [], _activation_names(model)
    known: dict[Hashable, _Roles] = {}
    for stack, layers in _stacks(model):
        for index, layer in enumerate(layers):
            inside = _blocks_of_layer(f"{stack}.{index}", layer, names, known)
            if len(inside) == 1:  # several are a mixture of experts already, whose blocks see some tokens only
                blocks += inside
    wrong = _wrong_inline(model, blocks)
    return [block for block in blocks if block[0] not in wrong]


def _blocks_of_layer(
    prefix: str, layer: nn.Module, names: list[str], known: dict[Hashable, _Roles]
) -> list[tuple[str, _Roles]]:
    inside = [(name, _known_roles(module, names, known)) for name, module in layer.named_modules() if name]
    blocks = [(f"{prefix}.{name}", roles) for name, roles in inside if roles is not None]
    if blocks:
        return blocks
    roles = _inline_roles(layer)
    return [] if roles is None else [(prefix, roles)]


def _by_pattern(model: nn.Module, pattern: str) -> list[tuple[str, _Roles]]:
    matches = _matcher(pattern)
    matched = {name: module for name, module in model.named_modules() if name and matches(name)}
    if not matched:
        ends = {name.rpartition(".")[2] for name, module in model.named_modules() if len(list(module.children())) > 1}
        raise AlterError(
            f"ffn: '{pattern}' matches no module of {type(model).__name__}; name the feed-forward blocks, for example "
            f"'*.mlp'.{did_you_mean(pattern.rpartition('.')[2], ends)}"
        )
    names, blocks = _activation_names(model), []
    for name, module in matched.items():
        roles = _block_roles(module, names) or (None if _runs_alone(module) else _inline_roles(module))
        if roles is not None:
            blocks.append((name, roles))
        elif len(_linears(module)) > 1:  # matched on purpose, unlike parts that a wide pattern also matches
            raise AlterError(f"ffn: '{pattern}' matches {name}, {_not_a_block(module)}")
    if not blocks:
        name, module = next(iter(matched.items()))
        raise AlterError(f"ffn: '{pattern}' matches {name}, {_not_a_block(module)}")
    for name in sorted(_wrong_inline(model, blocks)):
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


def _numbered(model: nn.Module, blocks: list[tuple[str, _Roles]]) -> list[FeedForward]:
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


# -- what the parts do ------------------------------------------------------------------------------------------------


def _linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    shapes = {name: linear_shape(child) for name, child in module.named_children()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _candidates(module: nn.Module) -> list[tuple[str | None, str, str]]:
    """(gate, up, down) as far as the shapes allow: the module's linear maps are d -> h, perhaps d -> h, and h -> d."""
    shapes, found = _linears(module), []
    for order in itertools.permutations(shapes) if len(shapes) in (2, 3) else ():
        down, ups = order[-1], order[:-1]
        if all(shapes[up] == shapes[down][::-1] for up in ups):
            found.append((ups[0] if len(ups) == 2 else None, ups[-1], down))
    return found


def _known_roles(module: nn.Module, names: list[str], known: dict[Hashable, _Roles]) -> _Roles | None:
    """``_block_roles``, run once for all blocks of one class, shapes and settings, since running all takes long."""
    if not _candidates(module):
        return None
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (str, int, float, type(None)))}
    children = [(name, type(child)) for name, child in module.named_children()]
    key = (type(module), *sorted(settings.items(), key=str), *children, *_linears(module).items())
    if key in known:
        return known[key]
    roles = _block_roles(module, names)
    if roles is not None and not _has_state(roles.activation):
        known[key] = roles
    return roles


def _has_state(activation: Activation) -> bool:
    return isinstance(activation, nn.Module) and bool(activation.state_dict())


def _block_roles(module: nn.Module, names: list[str]) -> _Roles | None:
    """The roles with which the formula gives what the module gives, or None."""
    candidates = _candidates(module)
    if not candidates:
        return None
    with _frozen_evaluation(module):
        probe = _Probe.of(module, candidates[0])
        if probe is None:
            return None
        activations = [*_own_activations(module, probe.x), *_named_activations(names)]
        scored: list[tuple[float, int, tuple[str | None, str, str], Activation]] = []
        for activation, candidate in itertools.product(activations, candidates):
            scored.append((probe.error(candidate, activation), len(scored), candidate, activation))
            if scored[-1][0] == 0.0:
                break
    if not scored:
        return None
    error, _, roles, activation = min(scored)
    return _Roles(*roles, activation, inline=False) if error <= probe.tolerance else None


def _runs_alone(module: nn.Module) -> bool:
    candidates = _candidates(module)
    with _frozen_evaluation(module):
        return bool(candidates) and _Probe.of(module, candidates[0]) is not None


def _inline_roles(layer: nn.Module) -> _Roles | None:
    """The same for linear maps that stand in a layer: it cannot be run as a block, so shapes and activation decide.

    Where d = h, the map that was made first comes first.
    """
    candidates = _candidates(layer)
    if not candidates or candidates[0][0] is not None:
        return None
    with _frozen_evaluation(layer):
        up = layer.get_submodule(candidates[0][1])
        activations = _own_activations(layer, torch.linspace(-3, 3, 8, device=_weight(up).device))
    return _Roles(*candidates[0], activations[0], inline=True) if activations else None


class _Probe:
    """One small input of a block and what the block makes of it."""

    def __init__(self, module: nn.Module, x: Tensor, entered: dict[str, Tensor], output: Tensor) -> None:
        self.module, self.x, self.entered, self.output = module, x, entered, output
        self.tolerance = _tolerance(module)

    @classmethod
    def of(cls, module: nn.Module, roles: tuple[str | None, str, str]) -> _Probe | None:
        """Runs the block, noting what enters its linear maps; None where it does not run on hidden states alone."""
        up = module.get_submodule(roles[1])
        x = torch.randn(1, 4, sizes(up)[0], generator=torch.Generator().manual_seed(0))
        x = x.to(_weight(up).device, _input_dtype(up))
        try:
            # Large enough that the activation bends: near zero, a gate and its partner cannot be told apart.
            x = x * (2 / up(x).float().std().clamp(1e-6, 1e6)).to(x.dtype)
            with _entering({name: module.get_submodule(name) for name in _linears(module)}) as entered:
                output = module(x)
        except Exception:  # attention, say, which needs other arguments: not a block
            return None
        fits = isinstance(output, Tensor) and output.shape == x.shape
        return cls(module, x, entered, output.float()) if fits else None

    def error(self, roles: tuple[str | None, str, str], activation: Activation) -> float:
        """How far the formula is from the block, at the last map's input and at the output, relative to their size."""
        gate, up, down = roles[0], self.module.get_submodule(roles[1]), self.module.get_submodule(roles[2])
        try:
            bent = up(self.x) if gate is None else self.module.get_submodule(gate)(self.x)
            inner = activation(bent) if gate is None else activation(bent) * up(self.x)
            output = down(inner.to(_input_dtype(down)))
            return max(_distance(inner, self.entered[roles[-1]]), _distance(output, self.output))
        except Exception:  # of other shapes, or a map that the block does not use
            return float("inf")


def _tolerance(module: nn.Module) -> float:
    """Half precision and quantised maps round; the right roles still come nearest."""
    return 1e-4 if all(parameter.dtype == torch.float32 for parameter in module.parameters()) else 3e-2


@contextmanager
def _entering(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Notes the first argument of each of these modules, by name."""
    entered: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: entered.update({name: args[0]})

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def _wrong_inline(model: nn.Module, blocks: list[tuple[str, _Roles]]) -> set[str]:
    """Runs the whole model once; the inline blocks whose last map is not entered by what the formula says."""
    owners = {name: (model.get_submodule(name), roles) for name, roles in blocks if roles.inline}
    config = getattr(model, "config", None)
    if not owners or config is None:
        return set()
    wrong, device = set(), next(model.parameters()).device
    inputs = {"input_ids": torch.arange(4, device=device).unsqueeze(0) % config.vocab_size}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    maps = {f"{n}/{m}": owner.get_submodule(m) for n, (owner, roles) in owners.items() for m in (roles.up, roles.down)}
    with _frozen_evaluation(model), _entering(maps) as entered:
        model(**inputs)
    with torch.no_grad():
        for name, (owner, roles) in owners.items():
            inner = roles.activation(owner.get_submodule(roles.up)(entered[f"{name}/{roles.up}"]))
            if _distance(inner, entered[f"{name}/{roles.down}"]) > _tolerance(owner):
                wrong.add(name)
    return wrong


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b."""
    if a.shape != b.shape:
        return float("inf")
    distance = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30))
    return float("inf") if math.isnan(distance) else distance


def _input_dtype(linear: nn.Module) -> torch.dtype:
    return _weight(linear).dtype if _weight(linear).is_floating_point() else torch.float32


@contextmanager
def _frozen_evaluation(module: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; every training flag is put back."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, flag in flags:
            part.training = flag


def _own_activations(module: nn.Module, x: Tensor) -> list[Activation]:
    """What the module holds that acts on each number alone and bends it; most likely ones first."""
    held = {**dict(module.named_children()), **{k: v for k, v in vars(module).items() if callable(v)}}
    held = {k: v for k, v in held.items() if not (isinstance(v, nn.Module) and linear_shape(v))}
    names = sorted(held, key=lambda name: "act" not in name)
    return [held[name] for name in names if _is_activation(held[name], x)]


def _is_activation(function: Activation, x: Tensor) -> bool:
    try:
        y, alone, double, negative = function(x), function(x[..., :1]), function(2 * x), function(-x)
    except Exception:  # a layer norm, say, or a rotary embedding
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(alone, y[..., :1], atol=1e-3):
        return False
    linear = torch.allclose(double, 2 * y) and torch.allclose(negative, -y)  # dropout, identity
    return not linear


def _activation_names(model: nn.Module) -> list[str]:
    """What the configuration calls its activations, for blocks that call one without holding it."""
    config = getattr(model, "config", None)
    values = [v for k, v in vars(config).items() if "act" in k and isinstance(v, str)] if config is not None else []
    return list(dict.fromkeys(values))


def _named_activations(names: list[str]) -> list[Activation]:
    known: dict[str, Activation] = {
        "gelu": F.gelu,
        "gelu_new": _tanh_gelu,
        "gelu_pytorch_tanh": _tanh_gelu,
        "relu": F.relu,
        "relu2": _squared_relu,
        "silu": F.silu,
        "swish": F.silu,
    }
    first = [known[name] for name in names if name in known]
    return list(dict.fromkeys([*first, *known.values()]))


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()
