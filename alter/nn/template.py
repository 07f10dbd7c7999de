"""Templates: modules described by plain hyperparameters, given their tensors once the sizes of a layer are known."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from typing import Any, Self

from torch import nn

from alter.errors import AlterError, did_you_mean


class Template(nn.Module):
    """A module whose ``__init__`` takes hyperparameters alone and whose ``build`` makes the parameters.

    Every ``__init__`` argument is kept under its own name (as scikit-learn's estimators do), so that a template can be
    named in a recipe, copied for every layer, and written into JSON.
    """

    _given: dict[str, Any]

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Notes the arguments that are given by name."""
        made = super().__new__(cls)
        object.__setattr__(made, "_given", given)  # some may be for a base class alone, by its subclass's **kwargs
        return made

    def fresh(self) -> Self:
        """Returns an unbuilt copy, for one more layer."""
        return copy.deepcopy(self)

    def check(self) -> None:
        """Says what makes no sense, whatever the sizes; called before ``build``, and for a recipe before anything trains.

        Raises:
            AlterError: an argument is out of its range; here and not in ``__init__``, whose errors jsonargparse hides.
        """

    def _require(self, key: str, fits: bool, remedy: str) -> None:
        """Raises AlterError where an argument does not fit.

        Args:
            key: its name, under which it is kept.
            fits: whether it does.
            remedy: the rest of the sentence, "give ...".
        """
        if not fits:
            raise AlterError(f"{type(self).__name__}: {key} is {getattr(self, key)}; {remedy}.")

    def describe(self) -> dict[str, Any]:
        """Returns ``{"class_path", "init_args"}``, enough to make this template again."""
        # a class without an __init__ of its own has torch's, with *args and **kwargs
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(type(self)).parameters.values()
        names = dict.fromkeys([*(parameter.name for parameter in parameters if parameter.kind in named), *self._given])
        module = type(self).__module__
        return {  # ALTER's own by their public name, so that a model outlives a change of files
            "class_path": f"{'alter.nn' if module.startswith('alter.nn.') else module}.{type(self).__qualname__}",
            "init_args": {name: getattr(self, name) for name in names},
        }


def make_template(description: dict[str, Any], base: type[Template], where: str) -> Any:
    """Makes a template from its description.

    Only ALTER's own classes are imported; any other must have been imported before by the user's own recipe or
    program, so that a model folder from elsewhere cannot run code.

    Args:
        description: what ``Template.describe`` returned.
        base: the class that it must be a subclass of.
        where: the file, for the message.

    Raises:
        AlterError: the class is unknown, not imported by the user, of another kind, or its arguments do not fit.
    """
    class_path = str(description.get("class_path"))
    module_name, _, name = class_path.rpartition(".")
    if module_name in _OWN_MODULES:
        module = importlib.import_module(module_name)
    elif module_name in sys.modules and not module_name.startswith("alter."):
        module = sys.modules[module_name]
    else:
        raise AlterError(
            f"{where}: the class '{class_path}' is not part of ALTER; import its module before loading if you trust it "
            "(on the command line: --import MODULE)."
        )
    found = getattr(module, name, None)
    if not (inspect.isclass(found) and issubclass(found, base)):
        known = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
        raise AlterError(f"{where}: '{class_path}' is not a {base.__name__}.{did_you_mean(name, known)}")
    try:
        return found(**description.get("init_args", {}))
    except TypeError as error:
        raise AlterError(f"{where}: '{class_path}' does not take these init_args: {error}.") from error


_OWN_MODULES = ("alter.nn", "alter.nn.experts", "alter.nn.routers")
