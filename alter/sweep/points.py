"""The points of a sweep: values of recipe keys, as a grid, drawn at random or from a file, and checked before anything starts."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alter.data import load_tasks
from alter.errors import AlterError
from alter.recipe_file import STAGES, check_content
from alter.recipe_values import check_ranges, check_values
from alter.schema import same_class
from alter.yaml_file import read_yaml

Config = dict[str, Any]
Point = dict[str, Any]  # values by the keys that the user wrote
NOT_SWEPT = ("run", "config", "test")  # the sweep's own
RULE = "the values are those of a YAML list without its brackets, such as 1,2,5 or [a,b],[c] or 'one, two',three"
_RANGE = re.compile(r"(uniform|log|int)\(([^,()]+),([^,()]+)\)")
_ATTEMPTS = 1000  # at drawing a point that is new


class Range:
    """Values between two ends, drawn evenly (``uniform``), evenly on a log scale (``log``) or as whole numbers (``int``)."""

    def __init__(self, kind: str, low: float, high: float) -> None:
        self.kind, self.low, self.high = kind, low, high

    def draw(self, chance: random.Random) -> float:
        """A value, to three digits."""
        if self.kind == "int":
            return chance.randint(math.ceil(self.low), math.floor(self.high))
        if self.kind == "log":
            return float(f"{math.exp(chance.uniform(math.log(self.low), math.log(self.high))):.3g}")
        return float(f"{chance.uniform(self.low, self.high):.3g}")


def read_sets(sets: Sequence[str]) -> dict[str, list[Any] | Range]:
    """What each ``--set KEY=VALUES`` says.

    Raises:
        AlterError: with every one that says nothing.
    """
    found: dict[str, list[Any] | Range] = {}
    problems = []
    for text in sets:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            problems.append(f"--set: '{text}' is not KEY=VALUES; write for example data.temperature=1,2,5.")
        elif key in found:
            problems.append(f"--set {key}: given twice; put all values behind one.")
        else:
            try:
                found[key.strip()] = _range(key, values) or _list(key, values)
            except AlterError as error:
                problems += error.messages
    if problems:
        raise AlterError(*problems)
    return found


def _range(key: str, text: str) -> Range | None:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        return None
    try:
        low, high = float(match[2]), float(match[3])
    except ValueError as error:
        raise AlterError(
            f"--set {key}: '{text}' has ends that are no numbers; write for example log(1e-5,1e-3)."
        ) from error
    if not (low < high and math.isfinite(high - low)) or (match[1] == "log" and low <= 0):
        raise AlterError(f"--set {key}: '{text}' is empty; the first end is below the second, and above 0 for log.")
    if match[1] == "int" and math.ceil(low) > math.floor(high):
        raise AlterError(f"--set {key}: '{text}' holds no whole number; write for example int(1,8).")
    return Range(match[1], low, high)


def _list(key: str, text: str) -> list[Any]:
    try:
        values = _plain(yaml.safe_load(f"[{text}]"))
    except (yaml.YAMLError, ValueError) as error:
        raise AlterError(f"--set {key}: '{text}' cannot be read; {RULE}.") from error
    if not values:
        raise AlterError(f"--set {key}: '{text}' holds no value; {RULE}.")
    if len(set(map(repr, values))) < len(values):  # by equality false would be 0
        raise AlterError(f"--set {key}: '{text}' names a value twice; leave one out.")
    return values


def grid(sets: Mapping[str, list[Any] | Range]) -> list[Point]:
    """Every combination, the last key varying fastest.

    Raises:
        AlterError: a range, of which there are too many values.
    """
    ranges = [key for key, values in sets.items() if isinstance(values, Range)]
    if ranges:
        raise AlterError(*(f"--set {key}: a range is drawn from; add --random N, or list values." for key in ranges))
    lists = [values for values in sets.values() if isinstance(values, list)]
    return [dict(zip(sets, values, strict=True)) for values in itertools.product(*lists)]


def drawn(sets: Mapping[str, list[Any] | Range], count: int, seed: int) -> list[Point]:
    """Different points at random.

    Raises:
        AlterError: there are not so many.
    """
    chance = random.Random(seed)
    points: list[Point] = []
    for _ in range(_ATTEMPTS * count):
        if len(points) == count:
            break
        point = {k: v.draw(chance) if isinstance(v, Range) else chance.choice(v) for k, v in sets.items()}
        if point not in points:
            points.append(point)
    if len(points) < count:
        raise AlterError(
            f"--random {count}: there are only {len(points)} different points; ask for fewer, or for the grid."
        )
    return points


def read_points(file: Path) -> list[Point]:
    """The points of a YAML file: a list of mappings from keys to values.

    Raises:
        AlterError: it is something else.
    """
    content = read_yaml(file)
    if not isinstance(content, list) or not content:
        raise AlterError(f"{file}: expected a list of points, each a mapping such as 'data.temperature: 2'.")
    for i, point in enumerate(content):
        if not isinstance(point, dict) or not point or not all(isinstance(key, str) for key in point):
            raise AlterError(
                f"{file}: point {i + 1} is {point!r}, not a mapping such as 'data.temperature: 2'; correct it."
            )
    return _plain(content)


def _plain(value: Any) -> Any:
    """A value as JSON has it; 1e-4 is a number, which YAML takes for text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


# -- laying a point over the recipe ------------------------------------------------------------------------------------


def lay_over(config: Config, point: Point, base: Path) -> Config:
    """A complete recipe with a point's values in place; where a class changes, nothing of the old one's arguments stays.

    Args:
        config: complete and plain.
        point: its values.
        base: folder for the relative paths of task files.
    """
    changed, _ = _laid(config, point)
    if any(key.startswith("data.tasks") for key in point):
        tasks = load_tasks(changed["data"]["tasks"], base, changed["data"]["root"])
        changed["data"]["tasks"] = [task.to_dict() for task in tasks]
    return changed


def _laid(config: Config, point: Point) -> tuple[Config, list[list[str]]]:
    """The changed recipe, and where in it each value stands."""
    changed = copy.deepcopy(config)
    # A class before its arguments, whatever the order in which they were written.
    order = sorted(point, key=lambda key: len(key.removesuffix(".class_path").split(".")))
    return changed, [_put(changed, key, point[key]) for key in order]


def _put(config: Config, key: str, value: Any) -> list[str]:
    *path, last = key.split(".")
    node: Any = config
    place: list[str] = []
    for part in path:
        node, part = _into_arguments(node, part, place)
        child = _child(node, part, key)
        if child is None:
            child = {}
            _set(node, part, child, key)
        place.append(part)
        node = child
    if last == "class_path" and isinstance(node, dict):
        _set_class(node, {"class_path": value})
        return place
    node, last = _into_arguments(node, last, place)
    before = _child(node, last, key)
    place.append(last)
    if isinstance(before, dict) and "class_path" in before and isinstance(value, str | dict):
        _set_class(before, {"class_path": value} if isinstance(value, str) else value)
    else:
        _set(node, last, copy.deepcopy(value), key)
    return place


def _into_arguments(node: Any, part: str, place: list[str]) -> tuple[Any, str]:
    """Arguments of a class may be named without ``init_args``, as in flags."""
    if isinstance(node, dict) and "class_path" in node and part not in ("class_path", "init_args"):
        place.append("init_args")
        if node.get("init_args") is None:
            node["init_args"] = {}
        return node["init_args"], part
    return node, part


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        if not (part.isdecimal() and int(part) < len(node)):
            raise AlterError(f"--set {key}: '{part}' is no place in a list of {len(node)}; count from 0.")
        return node[int(part)]
    if not isinstance(node, dict):
        raise AlterError(f"--set {key}: '{part}' is asked of {node!r}, which has no keys; correct the key.")
    return node.get(part)


def _set(node: Any, part: str, value: Any, key: str) -> None:
    node[int(part) if isinstance(node, list) else part] = value


def _set_class(node: Config, given: Config) -> None:
    """Changes the class; its arguments are then those that are given and the new class's defaults."""
    same = "class_path" not in given or same_class(given["class_path"], node.get("class_path"))
    arguments = {**((node.get("init_args") or {}) if same else {}), **(given.get("init_args") or {})}
    others = {name: value for name, value in given.items() if name not in ("class_path", "init_args")}
    class_path = node["class_path"] if same and "class_path" in node else given["class_path"]
    node.clear()
    node |= {"class_path": class_path, "init_args": arguments, **others}


# -- checking ----------------------------------------------------------------------------------------------------------


def check_points(config: Config, points: Sequence[Point], base: Path) -> list[Config]:
    """Checks every value by itself, and every point as a recipe is checked.

    Returns:
        the complete recipe of each point.

    Raises:
        AlterError: with every mistake.
    """
    wrong_key = [
        key for key in dict.fromkeys(key for point in points for key in point) if key.split(".")[0] in NOT_SWEPT
    ]
    if wrong_key:
        raise AlterError(*(f"--set {key}: the sweep sets it for every point; leave it out." for key in wrong_key))
    checked: dict[str, list[str]] = {}  # by part, each of which many points have
    problems: dict[str, str] = {}  # as they are told, by what is wrong, which many points have too
    for i, point in enumerate(points):
        told = []
        for part in _parts(point):
            name = json.dumps(part, sort_keys=True)
            if name not in checked:
                checked[name] = _told(_check_part, config, part)
            told += checked[name]
        problems |= {problem: problem for problem in told}
        for problem in [] if told else _told(_check_whole, config, point, base):
            problems.setdefault(problem, f"{_where(point)}: {problem}")
        if points.index(point) != i:
            twice = f"point {i + 1}: the same as point {points.index(point) + 1}; leave one out."
            problems[twice] = twice
    if problems:
        raise AlterError(*problems.values())
    return [lay_over(config, point, base) for point in points]


def _told(check: Callable[..., list[str]], *arguments: Any) -> list[str]:
    try:
        return check(*arguments)
    except AlterError as error:
        return list(error.messages)


def _where(point: Point) -> str:
    return "--set " + " ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in point.items())


def _parts(point: Point) -> Iterator[Point]:
    """Each value by itself; an argument together with the class that the point gives it."""
    for key, value in point.items():
        owners = {k: v for k, v in point.items() if key.startswith(k.removesuffix(".class_path") + ".") and k != key}
        yield {**owners, key: value}


def _check_part(config: Config, point: Point) -> list[str]:
    """Checks the keys and values of those sections of a recipe that a point touches."""
    changed, places = _laid(config, point)
    content: Config = {}
    for place in places:
        depth = 4 if place[:3] == [place[0], "model", "init_args"] else 3 if place[0] in STAGES else 2
        _copy(changed, content, place[:depth])
    if "data" in content and isinstance(content["data"], dict):
        content["data"].setdefault("tasks", changed["data"]["tasks"])  # the one key that has to be there
    return check_content(content, "--set")


def _check_whole(config: Config, point: Point, base: Path) -> list[str]:
    """Checks what a point's values mean together."""
    whole = lay_over(config, point, base)
    return check_values(whole) or check_ranges(whole, len(whole["data"]["tasks"]))


def _copy(source: Any, target: Config, place: Sequence[str]) -> None:
    """Copies what stands at a place, with the classes on the way to it."""
    part, rest = place[0], place[1:]
    if isinstance(source, dict) and "class_path" in source:
        target.setdefault("class_path", source["class_path"])
    if not rest or not isinstance(source[part], dict):
        target[part] = source[part]
    else:
        _copy(source[part], target.setdefault(part, {}), rest)
