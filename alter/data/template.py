"""Prompt and target templates: the part of Jinja that cannot hang, fill the memory or leave its row.

Tasks come with downloaded models too, so a template is code of somebody else's. The sandbox keeps it from Python; what is left out here
(assignments, macros, ranges, powers, padding) keeps its work and its output in proportion to itself and its row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alter.data.files import is_missing

MAX_LOOPS = 2  # within one another
MAX_CHARACTERS = 10_000_000  # of what a replacement makes
NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice,
    nodes.Filter, nodes.Test, nodes.CondExpr, nodes.If, nodes.For, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not,
    nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Concat, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv,
    nodes.Mod, nodes.Neg, nodes.Pos, nodes.Call, nodes.Keyword, nodes.Continue, nodes.Break,
)  # fmt: skip
FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
OF_TEXT = (  # filters that make or take a text
    "capitalize", "d", "default", "e", "escape", "lower", "replace", "safe", "string", "title", "trim", "truncate", "upper",
    "wordcount",
)  # fmt: skip
AS_TEXT, FILLED = "as text", "or empty"  # filters that no template can name
JUDGED: dict[type[nodes.Node], str] = {  # what of them is true or false
    nodes.If: "test", nodes.CondExpr: "test", nodes.For: "test", nodes.And: "left", nodes.Or: "left", nodes.Not: "node",
}  # fmt: skip
OF_MAPPINGS = ("get", "items", "keys", "values")
METHODS = (
    "capitalize", "count", "endswith", "find", "get", "index", "isalpha", "isdigit", "isnumeric", "items", "join", "keys", "lower",
    "lstrip", "removeprefix", "removesuffix", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper", "values",
)  # fmt: skip


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "%"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(_filled(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(_filled(obj), argument)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        for concatenation in source.find_all(nodes.Concat):  # which would write None
            concatenation.nodes = [nodes.Filter(part, AS_TEXT, [], [], None, None) for part in concatenation.nodes]
        for kind, key in JUDGED.items():  # where NaN would be true
            for node in source.find_all(kind):
                if (judged := getattr(node, key)) is not None:
                    setattr(node, key, nodes.Filter(judged, FILLED, [], [], None, None))
        return super()._generate(source, *arguments, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(side, (int, float)) for side in (left, right)):
            raise SecurityError(f"'{operator}' is for numbers alone")
        return super().call_binop(context, operator, left, right)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    if len(text) + (text.count(old) * len(new) if old else (len(text) + 1) * len(new)) > MAX_CHARACTERS:
        raise SecurityError(f"replace would make more than {MAX_CHARACTERS} characters")
    return text.replace(old, new, -1 if count is None else count)


def _json(value: Any, indent: int | None = None) -> str:
    """JSON as a model reads it; Jinja's own filter writes ``&`` and ``\u00f6`` for a web page."""
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=True)


def _filled(value: Any) -> Any:
    """An empty text in place of an empty cell of Parquet, or JSON's null or NaN, as of an empty cell of CSV."""
    return "" if is_missing(value) else value


def _text(value: Any) -> Any:
    """What is written of a value, or handed to what makes a text of it.

    Raises:
        ValueError: nothing that can be read.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError("it writes bytes that are not UTF-8") from error
    if callable(value) and not isinstance(value, StrictUndefined):
        raise ValueError(
            "it writes a method instead of calling it; add (), or write ['its name'] for a field of that name"
        )
    return _filled(value)


def _of_text(make: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is given a text, whatever stands in the row."""
    place = int(hasattr(make, "jinja_pass_arg"))  # behind what Jinja hands some of its own

    @wraps(make)
    def made(*arguments: Any, **options: Any) -> Any:
        return make(*arguments[:place], _text(arguments[place]), *arguments[place + 1 :], **options)

    return made


def _of_words(join: Callable[..., Any]) -> Callable[..., Any]:
    """``join``, which leaves a text that is given in place of its words, as on the page of ``alter serve``, as it is."""

    @wraps(join)
    def joined(context: Any, words: Any, *arguments: Any, **options: Any) -> Any:
        words = _text(words)
        return words if isinstance(words, str) else join(context, map(_text, words), *arguments, **options)

    return joined


def environment() -> _Environment:
    """The environment of all templates."""
    made = _Environment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_text)
    made.globals.clear()
    made.filters = {name: made.filters[name] for name in FILTERS}
    made.filters["replace"] = _replace
    made.filters |= {name: _of_text(made.filters[name]) for name in OF_TEXT}
    made.filters["join"] = _of_words(made.filters["join"])
    made.filters |= {AS_TEXT: _text, FILLED: _filled}
    made.filters["tojson"] = _json
    return made


def problems(template: nodes.Template) -> Iterator[str]:
    """What a parsed template does that templates here may not."""
    yield from _problems(template, 0)


def _problems(node: nodes.Node, loops: int) -> Iterator[str]:
    name = type(node).__name__.lower()
    if not isinstance(node, NODES):
        yield f"'{name}' is not part of a template here"
    if isinstance(node, nodes.For):
        loops += 1
        if loops > MAX_LOOPS or node.recursive:
            yield f"more than {MAX_LOOPS} loops within one another, or a recursive one"
    if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Getattr) and node.node.attr in METHODS):
        yield f"a call that is not one of the methods {', '.join(METHODS)}"
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        yield f"the filter '{node.name}' is not one of {', '.join(FILTERS)}"
    called = node.node if isinstance(node, nodes.Call) else None
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.Getattr) and child.attr in OF_MAPPINGS and child is not called:
            yield f"'.{child.attr}' is a method that is not called (add (), or write ['{child.attr}'] for a field of that name)"
        yield from _problems(child, loops)
