"""Checks a mapping from YAML against the constructor it is for, and says everything that is wrong at once."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alter.errors import AlterError, did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def find_classes_in(folder: Path) -> None:
    """Lets a recipe name a class of a module that lies in a folder: beside it, or where one is."""
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def named_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name, those that it hands on to its base classes as ``**kwargs`` among them."""
    found: dict[str, inspect.Parameter] = {}
    for maker in _makers(cls):
        for name, parameter in list(inspect.signature(maker.__init__).parameters.items())[1:]:  # type: ignore[misc]
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(name, parameter)
    return found


def _makers(cls: type) -> Iterator[type]:
    """The class and its base classes down to the first that takes no ``**kwargs``, whose ``__init__`` sees the arguments."""
    for base in cls.__mro__:
        if "__init__" in vars(base):
            yield base
            kinds = [parameter.kind for parameter in inspect.signature(base.__init__).parameters.values()]  # type: ignore[misc]
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                return


def check(
    cls: type, given: Mapping[str, Any], where: str, skip: Collection[str] = (), required: bool = True
) -> list[str]:
    """Finds all mistakes in the arguments for a class.

    Args:
        cls: a class or dataclass with type hints.
        given: its arguments as they stand in the file.
        where: file and section, which every sentence begins with.
        skip: arguments that the file must not set.
        required: whether arguments without a default must be there.

    Returns:
        a sentence for each unknown key, missing key and value that does not fit its type.
    """
    parameters = {name: parameter for name, parameter in named_arguments(cls).items() if name not in skip}
    problems = []
    for key, value in given.items():
        if key not in parameters:
            problems.append(
                f"{where}: unknown key '{key}'; the keys are {', '.join(parameters)}.{did_you_mean(str(key), parameters)}"
            )
        else:
            problems += _check_value(cls, key, value, where)
    if required:
        own = inspect.signature(cls).parameters  # it may give its base classes some itself
        missing = [n for n, p in parameters.items() if n in own and p.default is p.empty and n not in given]
        problems += [f"{where}: the key '{name}' is missing; add it." for name in missing]
    return problems


def _check_value(cls: type, key: str, value: Any, where: str) -> list[str]:
    base = template_base(cls, key)
    if base is not None and isinstance(value, Mapping):
        return check_class(value, base, f"{where}.{key}")
    hint = _hints(cls).get(key, cls.__annotations__.get(key))
    whole = _hints(cls, include_extras=True).get(key)  # an Annotated may say more than the type
    options = typing.get_args(whole) if typing.get_origin(whole) in (typing.Union, types.UnionType) else (whole,)
    if type(value) in options:
        return []  # as most are; the parser, which knows every hint, takes longer
    try:
        parsed = _parser(cls, key).parse_object({key: value})[key]
        # The parser takes a number in quotation marks and an empty key for any type; the class would get them as they are.
        quoted = isinstance(value, str) and isinstance(parsed, (int, float)) and str not in typing.get_args(hint)
        empty = value is None and hint is not Any and type(None) not in typing.get_args(hint)
        if quoted or empty:
            raise TypeError
    except Exception:
        wanted = (
            hint.__name__
            if isinstance(hint, type)
            else str(hint).replace("typing.", "").replace("collections.abc.", "")
        )
        return [f"{where}: the key '{key}' is {value!r}, which is not {wanted}; correct it."]
    return []


@cache  # making one takes longer than what it is used for, and a domain's tasks all have the same keys
def _parser(cls: type, key: str) -> ArgumentParser:
    """A parser of one argument of a class."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    owner = next((maker for maker in _makers(cls) if key in inspect.signature(maker.__init__).parameters), cls)  # type: ignore[misc]
    others = set(named_arguments(owner)) - {key}
    parser.add_class_arguments(owner, skip=others, instantiate=False, fail_untyped=False)
    return parser


@cache  # asked for each key of a class
def _hints(cls: type, include_extras: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for maker in reversed(list(_makers(cls))):
        found |= typing.get_type_hints(maker.__init__, include_extras=include_extras)  # type: ignore[misc]
    return found


def template_base(cls: type, key: str) -> type | None:
    """The class that an argument must be a subclass of, where the argument is named by ``class_path``."""
    hint = _hints(cls).get(key)
    options = [o for o in (typing.get_args(hint) or (hint,)) if inspect.isclass(o)]
    own = [o for o in options if o.__module__.startswith("alter.nn")]
    return own[0] if own else None


def check_class(
    given: Mapping[str, Any], base: type, where: str, default: type | None = None, skip: Collection[str] = ()
) -> list[str]:
    """Finds all mistakes in a ``class_path`` with ``init_args``.

    Args:
        given: the mapping.
        base: what the class must be a subclass of.
        where: file and section.
        default: the class where ``class_path`` is left out.
        skip: arguments that the file must not set.
    """
    allowed = ("class_path", "init_args")
    problems = [
        f"{where}: unknown key '{key}'; arguments of the class stand under init_args.{did_you_mean(str(key), allowed)}"
        for key in given
        if key not in allowed
    ]
    cls = default
    if default is None or "class_path" in given:
        try:
            cls = import_name(str(given.get("class_path")), f"{where}.class_path", base)
        except AlterError as error:
            return [*problems, *error.messages]
    arguments = given.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        return [*problems, f"{where}.init_args: expected a mapping of arguments, got {arguments!r}."]
    assert cls is not None
    return problems + check(cls, arguments, where, skip, required=False)


TRUSTED: set[str] = set()  # modules that the user has named on the command line


def same_class(one: Any, other: Any) -> bool:
    """Whether two ``class_path`` name the same class of ``alter.nn`` or of elsewhere, by its short or its long name."""
    return bool(_named(one) == _named(other))


def _named(path: Any) -> Any:
    """The class that a path names; the path where there is none."""
    try:
        return import_name(path if "." in str(path) else f"alter.nn.{path}", "")
    except AlterError:
        return path


def import_name(path: str, where: str, base: type | None = None) -> Any:
    """Imports what a dotted ``class_path`` names; a name without dots is looked for beside ``base``.

    Raises:
        AlterError: there is no such module or name, or it is no subclass of ``base``.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name and base is not None:
        module_name = base.__module__
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise AlterError(
            f"{where}: '{path}' cannot be imported ({error}); give module.name, reachable from here."
        ) from error
    except ValueError as error:
        raise AlterError(f"{where}: '{path}' is not a dotted name; give module.name.") from error
    found = getattr(module, name, None)
    wrong = base is not None and not (inspect.isclass(found) and issubclass(found, base))
    if found is None or wrong:
        known = [
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and (base is None or (inspect.isclass(v) and issubclass(v, base)))
        ]
        what = f"is not a {base.__name__}" if base is not None and found is not None else f"is not in {module_name}"
        raise AlterError(
            f"{where}: '{path}' {what}; known there: {', '.join(sorted(known)[:12])}.{did_you_mean(name, known)}"
        )
    return found


def refuse_foreign_sources(tasks: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A run folder may come from elsewhere: the sources that it names are ALTER's own, or the user has named their module.

    Args:
        tasks: of the run's recipe.
        file: the recipe.

    Raises:
        AlterError: a task's source is of another module.
    """
    for task in tasks:
        module = foreign_module(task["source"])
        if module and module not in TRUSTED:
            raise AlterError(
                f"{file}: task '{task['name']}' reads its rows by '{task['source']['class_path']}', which is not part of ALTER; "
                f"import its module first if you trust it (on the command line: --import {module})."
            )


def foreign_module(source: Mapping[str, Any]) -> str | None:
    """The module of a task's source that is not ALTER's own; None where it is."""
    module = str(source.get("class_path", "")).rpartition(".")[0]
    return module if module and module.split(".")[:2] != ["alter", "data"] else None
