"""Which points a sweep has, how they change a recipe, and what is refused before anything starts."""

import itertools
import math
from pathlib import Path

import pytest
import yaml

from alter.errors import AlterError
from alter.recipe import read_recipe
from alter.sweep.points import Range, check_points, drawn, grid, lay_over, read_points, read_sets
from alter.yaml_file import dump
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, project, template  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2.5,1e-4", [1, 2.5, 1e-4]),
        ("alter.nn.TopK,alter.nn.TokenGate", ["alter.nn.TopK", "alter.nn.TokenGate"]),
        ("last:2,all", ["last:2", "all"]),
        ("[1,2],[3]", [[1, 2], [3]]),
        ("'one, two',three", ["one, two", "three"]),
        ("null,true", [None, True]),
        ("0,false,1,true", [0, False, 1, True]),
        ("1.2.3e4,1.e3,.5e1", ["1.2.3e4", 1000.0, 5.0]),
        ("{class_path: alter.nn.TopK, init_args: {k: 2}},alter.nn.TokenGate",
         [{"class_path": "alter.nn.TopK", "init_args": {"k": 2}}, "alter.nn.TokenGate"]),
    ],
)  # fmt: skip
def test_values_are_the_items_of_a_yaml_list(text, values):
    assert read_sets([f"data.x={text}"]) == {"data.x": values}


def test_a_grid_is_the_product_in_the_order_given():
    sets = read_sets(["a=1,2", "b=x,y,z", "c=0"])
    expected = [{"a": a, "b": b, "c": 0} for a, b in itertools.product([1, 2], "xyz")]
    assert grid(sets) == expected


def test_points_at_random_differ_keep_to_their_ranges_and_come_back_with_the_seed():
    sets = read_sets(["lr=log(1e-5,1e-2)", "t=uniform(-1,1)", "k=int(1,3)", "r=A,B"])
    points = drawn(sets, 200, 13)
    assert points == drawn(sets, 200, 13) != drawn(sets, 200, 14)
    assert len({tuple(point.values()) for point in points}) == 200
    assert {point["k"] for point in points} == {1, 2, 3}
    assert {point["r"] for point in points} == {"A", "B"}
    assert all(1e-5 <= point["lr"] <= 1e-2 and -1 <= point["t"] <= 1 for point in points)
    middle = sorted(point["lr"] for point in points)[100]
    assert math.log10(middle) == pytest.approx(-3.5, abs=0.4)  # even on the log scale; evenly it would be 5e-3
    assert isinstance(sets["lr"], Range)


@pytest.mark.parametrize(
    ("sets", "count", "words_of_it"),
    [
        (["data.temperature"], None, "is not KEY=VALUES"),
        (["data.temperature="], None, "is not KEY=VALUES"),
        (["a=[1"], None, "cannot be read; the values are those of a YAML list without its brackets"),
        (["a=1,1"], None, "twice"),
        (["a=1", "a=2"], None, "given twice"),
        (["a=log(1,2)"], None, "add --random N"),
        (["a=log(0,2)"], 3, "above 0 for log"),
        (["a=uniform(2,x)"], 3, "no numbers"),
        (["a=int(1.2,1.8)"], 3, "holds no whole number"),
        (["a=int(1,inf)"], 3, "is empty"),
        (["a=uniform(-inf,inf)"], 3, "is empty"),
        (["a=1,2"], 3, "only 2 different points"),
    ],
)
def test_what_says_nothing_is_one_sentence(sets, count, words_of_it):
    with pytest.raises(AlterError, match=words_of_it.replace("(", r"\(")):
        grid(read_sets(sets)) if count is None else drawn(read_sets(sets), count, 1)


def test_points_from_a_file(tmp_path):
    points = [{"data.temperature": 2, "stage2.model.router": "alter.nn.TokenGate"}, {"data.temperature": 5}]
    file = tmp_path / "points.yaml"
    file.write_text(yaml.safe_dump(points))
    assert read_points(file) == points
    file.write_text("a: 1")
    with pytest.raises(AlterError, match="expected a list of points"):
        read_points(file)
    file.write_text("- a: 1\n- 3")
    with pytest.raises(AlterError, match="point 2 is 3"):
        read_points(file)


@pytest.fixture
def config(project):  # noqa: F811
    """A complete recipe whose stage 2 has a router with an argument set."""
    change(project, stage2__model__init_args__router=template("SharedGate", hidden=32))
    return read_recipe(["--config", "recipe.yaml"]).config


def router(config):
    return config["stage2"]["model"]["init_args"]["router"]


def test_a_class_brings_its_own_arguments_and_an_argument_keeps_the_class(config):
    here = Path()
    assert router(lay_over(config, {"stage2.model.router.hidden": 8}, here))["init_args"]["hidden"] == 8
    assert (
        router(lay_over(config, {"stage2.model.init_args.router.init_args.hidden": 8}, here))["init_args"]["hidden"]
        == 8
    )
    for key in ("stage2.model.router.class_path", "stage2.model.router"):
        other = router(lay_over(config, {key: "alter.nn.TaskGate"}, here))
        assert other == {"class_path": "alter.nn.TaskGate", "init_args": {}}
        for name in ("alter.nn.SharedGate", "SharedGate", "alter.nn.routers.shared_gate.SharedGate"):
            assert router(lay_over(config, {key: name}, here)) == router(config), name  # by any name the same class
    # in whatever order they are given
    point = {"stage2.model.router.k": 1, "stage2.model.router.class_path": "alter.nn.TopK"}
    assert router(lay_over(config, point, here)) == {"class_path": "alter.nn.TopK", "init_args": {"k": 1}}
    assert router(config)["init_args"]["hidden"] == 32  # the recipe itself is as it was


def test_what_a_point_leaves_is_what_flags_leave(config, project):  # noqa: F811
    """A cell's recipe, read as any other, against flags of the same values."""
    point = {"stage1.model.optimizer.lr": 1e-4, "data.temperature": 5, "stage2.model.init_args.num_shared": 3}
    Path("cell.yaml").write_text(dump(lay_over(config, point, Path())))
    flags = [word for key, value in point.items() for word in (f"--{key}", str(value))]
    assert read_recipe(["--config", "cell.yaml"]).config == read_recipe(["--config", "recipe.yaml", *flags]).config


def test_tasks_are_found_where_the_recipe_is(config, project, monkeypatch):  # noqa: F811
    monkeypatch.chdir("/")
    (found,) = check_points(config, [{"data.tasks": ["tasks/sort.yaml"]}], project)
    assert [task["name"] for task in found["data"]["tasks"]] == ["sort"]


def test_every_mistake_is_told_before_anything_starts(config):
    wrong = {
        "data.temprature": 2,
        "data.temperature": "warm",
        "stage2.model.router.class_path": "alter.nn.SharedGat",
        "stage1.model.optimizer.lr": "fast",
        "precision": "fp23",
        "stage3.model.router": "alter.nn.TopK",
        "trainer.max_epochs": 1.5,
        "stage2.model.num_shared.deeper": 1,
    }
    with pytest.raises(AlterError) as error:
        check_points(config, [{"seed_everything": 1, key: value} for key, value in wrong.items()], Path())
    said = error.value.messages
    for words_of_it in (
        "unknown key 'temprature'", "Did you mean 'temperature'?", "'temperature' is 'warm'", "Did you mean 'SharedGate'?",
        "fast", "Did you mean 'fp32'?", "unknown key 'stage3'", "max_epochs", "which has no keys",
    ):  # fmt: skip
        assert any(words_of_it in line for line in said), (words_of_it, said)
    assert len(said) == len(wrong), said
    assert all(line.startswith("--set") for line in said)


def test_values_that_do_not_go_together_are_told(config):
    points = grid(
        read_sets(["stage2.model.router.class_path=alter.nn.TopK,alter.nn.TokenGate", "stage2.model.router.k=1"])
    )
    with pytest.raises(AlterError, match="unknown key 'k'") as error:
        check_points(config, points, Path())
    assert len(error.value.messages) == 1
    check_points(config, points[:1], Path())


def test_a_point_is_refused_where_a_recipe_of_its_values_would_be(config):
    sets = ["stage2.model.keep=0.5,1.5", "data.temperature=1,2,0", "trainer.strategy=ddp,fsdp2", "precision=fp32,int8"]
    with pytest.raises(AlterError) as error:
        check_points(config, grid(read_sets(sets)), Path())
    said = error.value.messages
    for words_of_it in ("keep: 1.5 is no share", "data.temperature: 0 is not above 0", "int8 cannot be sharded"):
        assert sum(words_of_it in line for line in said) == 1, (words_of_it, said)  # of many points the first
    assert len(said) == 3
    assert all(line.startswith("--set stage2.model.keep=") for line in said)


def test_values_that_are_right_together_alone_need_not_be(config):
    config["precision"] = "int8"
    (found,) = check_points(config, [{"trainer.strategy": "fsdp2", "precision": "bf16"}], Path())
    assert (found["trainer"]["strategy"], found["precision"]) == ("fsdp2", "bf16")


@pytest.mark.parametrize(
    ("points", "words_of_it"),
    [([{"run": "x"}], "the sweep sets it"), ([{"data.temperature": 1}] * 2, "the same as point 1")],
)
def test_points_that_cannot_be_run_apart_are_refused(config, points, words_of_it):
    with pytest.raises(AlterError, match=words_of_it):
        check_points(config, points, Path())
