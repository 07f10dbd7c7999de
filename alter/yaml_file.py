"""YAML from files that somebody else may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alter.errors import AlterError

MAX_BYTES = 10_000_000
MAX_NODES = (
    200_000  # with every alias written out: nine aliases of nine aliases of nine are a short file and fill the memory
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Makes plain values alone; a task's choices stay as they are written, whatever YAML would take them for."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            if key.value == "choices" and isinstance(value, yaml.SequenceNode):
                for item in value.value:
                    if isinstance(item, yaml.ScalarNode) and item.value:
                        item.tag = "tag:yaml.org,2002:str"  # `yes`, `true` and `007` are labels, not true, true and 7
        return dict(super().construct_mapping(node, deep))


def read_yaml(file: Path) -> Any:
    """Reads a YAML file of plain values.

    Raises:
        AlterError: it cannot be read, is too large or too deep, or is not YAML.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise AlterError(f"{file}: larger than {MAX_BYTES // 10**6} MB; name a recipe or a task file.")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AlterError(f"{file}: cannot be read ({error}); name a YAML file.") from error
    try:
        node = yaml.compose(text, _Loader)
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise AlterError(f"{file}: its aliases stand for more than {MAX_NODES:,} values; write it without them.")
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise AlterError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)}); mend it.") from error
    except (ValueError, TypeError, OverflowError) as error:  # a date or a number that is none, a list as a key
        raise AlterError(f"{file}: a value is not what it looks like ({error}); quote it.") from error
    except RecursionError as error:
        raise AlterError(f"{file}: nested too deeply; write it flatter.") from error


def dump(content: Mapping[str, Any]) -> str:
    """The YAML of plain values, such as a recipe's, in their order."""
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is, with every alias written out."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MAX_NODES + 1  # of a node within itself there is no end
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    known[id(node)] = min(1 + sum(_size(part, known) for part in parts), MAX_NODES + 1)
    return known[id(node)]
