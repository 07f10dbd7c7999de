"""What the linear maps of a feed-forward block do, found out by running it and comparing with the formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter.nn.linear import linear_shape, sizes, weight_of

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Roles:
    """What the linear maps of one module do."""

    gate: str | None
    up: str
    down: str
    activation: Activation
    inline: bool


def linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear maps that stand in a module itself, with their (in, out) features."""
    shapes = {name: linear_shape(child) for name, child in module.named_children()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _candidates(module: nn.Module) -> list[tuple[str | None, str, str]]:
    """(gate, up, down) as far as the shapes allow: the module's linear maps are d -> h, perhaps d -> h, and h -> d."""
    shapes, found = linears(module), []
    for order in itertools.permutations(shapes) if len(shapes) in (2, 3) else ():
        down, ups = order[-1], order[:-1]
        if all(shapes[up] == shapes[down][::-1] for up in ups):
            found.append((ups[0] if len(ups) == 2 else None, ups[-1], down))
    return found


def known_roles(module: nn.Module, names: list[str], known: dict[Hashable, Roles]) -> Roles | None:
    """``block_roles``, run once for all blocks of one class, shapes and settings, since running all takes long."""
    if not _candidates(module):
        return None
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (str, int, float, type(None)))}
    children = [(name, type(child)) for name, child in module.named_children()]
    key = (type(module), *sorted(settings.items(), key=str), *children, *linears(module).items())
    if key in known:
        return known[key]
    roles = block_roles(module, names)
    if roles is not None and not _has_state(roles.activation):
        known[key] = roles
    return roles


def _has_state(activation: Activation) -> bool:
    return isinstance(activation, nn.Module) and bool(activation.state_dict())


def block_roles(module: nn.Module, names: list[str]) -> Roles | None:
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
    return Roles(*roles, activation, inline=False) if error <= probe.tolerance else None


def runs_alone(module: nn.Module) -> bool:
    """Whether a module with the maps of a block runs on hidden states alone."""
    candidates = _candidates(module)
    with _frozen_evaluation(module):
        return bool(candidates) and _Probe.of(module, candidates[0]) is not None


def inline_roles(layer: nn.Module) -> Roles | None:
    """The same for linear maps that stand in a layer: it cannot be run as a block, so shapes and activation decide.

    Where d = h, the map that was made first comes first.
    """
    candidates = _candidates(layer)
    if not candidates or candidates[0][0] is not None:
        return None
    with _frozen_evaluation(layer):
        up = layer.get_submodule(candidates[0][1])
        activations = _own_activations(layer, torch.linspace(-3, 3, 8, device=weight_of(up).device))
    return Roles(*candidates[0], activations[0], inline=True) if activations else None


class _Probe:
    """One small input of a block and what the block makes of it."""

    def __init__(self, module: nn.Module, x: Tensor, entered: dict[str, Tensor], output: Tensor) -> None:
        self.module, self.x, self.entered, self.output = module, x, entered, output
        self.tolerance = _tolerance(module)

    @classmethod
    def of(cls, module: nn.Module, roles: tuple[str | None, str, str]) -> _Probe | None:
        """Runs the block, noting what enters its linear maps; None where it does not run on hidden states alone."""
        up = module.get_submodule(roles[1])
        x = torch.randn(1, 4, sizes(up)[0], generator=torch.Generator().manual_seed(0), device="cpu")  # the same on all
        x = x.to(weight_of(up).device, _input_dtype(up))
        try:
            # Large enough that the activation bends: near zero, a gate and its partner cannot be told apart.
            x = x * (2 / up(x).float().std().clamp(1e-6, 1e6)).to(x.dtype)
            with _entering({name: module.get_submodule(name) for name in linears(module)}) as entered:
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


def wrong_inline(model: nn.Module, blocks: list[tuple[str, Roles]]) -> set[str]:
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
    return weight_of(linear).dtype if weight_of(linear).is_floating_point() else torch.float32


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


def activation_names(model: nn.Module) -> list[str]:
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
