"""What a constructor's arguments in a file are refused for."""

from typing import Annotated, Literal

import pytest
from annotated_types import Gt

from alter.schema import check


class Settings:
    def __init__(
        self,
        count: int = 1,
        share: float | None = None,
        name: str = "",
        kind: Literal["a", "b"] = "a",
        names: list[str] | None = None,
        above: Annotated[int, Gt(0)] = 1,
    ) -> None: ...


@pytest.mark.parametrize(
    ("key", "fits", "misfits"),
    [
        ("count", [3, -1], ["3", 1.5, True, None, [3], "many"]),
        ("share", [0.5, 1, None], ["0.5", "half", [0.5]]),
        ("name", ["x", "3"], [None, 3, ["x"]]),
        ("kind", ["a", "b"], ["c", 1, None]),
        ("names", [["x"], [], None], ["x", [1], {"x": 1}]),
        ("above", [1, 2], [0, -1, "2", 0.5]),
    ],
)
def test_a_value_is_refused_exactly_where_it_does_not_fit_its_hint(key, fits, misfits):
    assert [value for value in fits if check(Settings, {key: value}, "f.yaml: x")] == []
    for value in misfits:
        (said,) = check(Settings, {key: value}, "f.yaml: x")
        assert said.startswith(f"f.yaml: x: the key '{key}' is {value!r}, which is not ")


def test_arguments_that_are_handed_on_to_a_base_class_are_keys_too():
    class Own(Settings):
        def __init__(self, factor: float = 1.0, **kwargs) -> None:
            super().__init__(**{"count": 2, **kwargs})

    assert check(Own, {"factor": 2.0, "count": 3, "kind": "b"}, "f.yaml: x") == []
    said = check(Own, {"count": "3", "knid": "b"}, "f.yaml: x")
    assert said[0].startswith("f.yaml: x: the key 'count' is '3', which is not int")
    assert "unknown key 'knid'; the keys are factor, count, share" in said[1]


def test_what_a_class_gives_its_base_class_itself_is_not_missing():
    class Needy:
        def __init__(self, first: int, second: int = 2) -> None: ...

    class Giving(Needy):
        def __init__(self, name: str, **kwargs) -> None:
            super().__init__(first=1, **kwargs)

    assert check(Giving, {"name": "x", "second": 3}, "f.yaml") == []
    (said,) = check(Giving, {"second": 3}, "f.yaml")
    assert said == "f.yaml: the key 'name' is missing; add it."


def test_keys_that_are_unknown_or_missing_are_named():
    class Needy:
        def __init__(self, first: int, second: int = 2) -> None: ...

    said = check(Needy, {"frist": 1}, "f.yaml")
    assert len(said) == 2
    assert "unknown key 'frist'" in said[0]
    assert "Did you mean 'first'" in said[0]
    assert "the key 'first' is missing" in said[1]
    assert check(Needy, {}, "f.yaml", skip={"first"}) == []
