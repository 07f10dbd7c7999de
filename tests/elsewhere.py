"""A device that needs no hardware: tensors that say that they lie on a GPU, and refuse to meet those of the CPU.

What goes wrong on a GPU alone is mostly that a tensor made on the CPU meets one of the model. Here that is an error on any
machine; values are computed on the CPU, so that they can be compared.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # a GPU takes places from the CPU
MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Elsewhere(torch.Tensor):
    """A tensor that lies on the pretended device.

    Attributes:
        held: its values, on the CPU.
    """

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout, device="meta")
        made.held = held
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __getitem__(self, index):
        return super().__getitem__(tree_map(_as_tensor, index, is_leaf=lambda part: isinstance(part, list)))

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; copy the tensor to host memory first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if there and function not in MOVES and not (function in INDEXED and isinstance(args[0], Elsewhere)):
        here = [tensor for tensor in tensors if tensor.dim() and not isinstance(tensor, Elsewhere)]
        assert not here, f"{function}: tensors of two devices meet"
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    result = function(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
    for argument, value in zip(function._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value  # it was changed in place
    goes = asked[0].type != "cpu" if asked else there
    return (
        tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, torch.Tensor) else leaf, result) if goes else result
    )


def _as_tensor(index):
    """A list of places, which torch would read onto the device that the wrapper is on for it."""
    return torch.tensor(index) if isinstance(index, list) else index


def _on_cpu(value):
    return (
        value.held
        if isinstance(value, Elsewhere)
        else torch.device("cpu")
        if isinstance(value, torch.device)
        else value
    )


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What a dispatch mode comes too late for: devices without a number, and ``torch.tensor``, which asks the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(_numbered, args), tree_map(_numbered, kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            return function(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        return function(*args, **kwargs)


def _numbered(value):
    return GPU if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value


def _no_gradient(self):
    """In place of inference mode, whose tensors cannot be wrapped."""
    self.instead = torch.no_grad()
    self.instead.__enter__()


def _gradient_again(self, *error):
    self.instead.__exit__(*error)


@contextmanager
def a_gpu():
    """Within it there is a GPU: the machine's, or a pretended one."""
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch.object(
            torch.inference_mode, "__enter__", lambda self: vars(self).setdefault("_none", torch.no_grad()).__enter__()
        ),
        mock.patch.object(torch.inference_mode, "__enter__", _no_gradient),
        mock.patch.object(torch.inference_mode, "__exit__", _gradient_again),
        _Calls(),
        _Operations(),
    ):
        yield
