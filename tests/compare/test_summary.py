"""The statistics against slow references, and the tables."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alter.compare.methods import METHODS
from alter.compare.summary import Answers, summarise
from alter.compare.tables import markdown, page, routing_pictures, with_heatmaps
from alter.data import Task
from alter.metrics import RESAMPLES

TASKS = [
    Task("t1", {"class_path": "Files", "init_args": {}}, "{{ x }}", "{{ y }}", choices=["a", "b"], metrics=["accuracy", "macro_f1"]),
    Task("t2", {"class_path": "Files", "init_args": {}}, "{{ x }}", "{{ y }}", metrics=["exact_match"]),
]  # fmt: skip


def write(folder, right, seed=0, rows=(40, 25), **facts):
    """A cell whose answers are right with some probability."""
    g = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tasks, lines, draws = {}, [], {}
    for task, count in zip(TASKS, rows, strict=True):
        hits = g.random(count) < right
        lines += [{"task": task.name, "target": "a", "answer": "a" if hit else "b"} for hit in hits]
        same = np.random.default_rng(len(hits))  # two methods' draws are of the same rows
        draws[task.name] = [hits[same.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
        tasks[task.name] = {name: float(hits.mean()) for name in task.metrics}
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.savez(folder / "test.npz", **draws)
    found = {
        "tasks": tasks,
        "trainable_parameters": 10,
        "tokens": 5,
        "tokens_per_second": 2.0,
        "peak_memory_bytes": 2**30,
        "hardware": "a processor",
        "commit": "abc",
    }
    (folder / "test.json").write_text(json.dumps(found | {"validation_loss": 1.0, "routing": {}} | facts))
    return folder


@pytest.fixture
def cells(tmp_path):
    right = {"untouched": 0.2, "full": 0.6, "alone": 0.5, "two_stage": 0.9, "stage1": 0.6}
    return {
        name: {s: write(tmp_path / name / str(s), p, 10 * i + s) for s in (1, 2, 3)}
        for i, (name, p) in enumerate(right.items())
    }


def test_every_machine_that_ran_a_cell_is_named(cells):
    file = cells["full"][2] / "test.json"
    assert summarise(cells, METHODS, TASKS, "test")["hardware"] == "a processor"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hardware": "a GPU"}))
    assert summarise(cells, METHODS, TASKS, "test")["hardware"] == "a processor; a GPU"


def test_means_deviations_and_the_best_baseline(cells):
    result = summarise(cells, METHODS, TASKS, "test")
    for name, own in cells.items():
        values = [json.loads((f / "test.json").read_text())["tasks"]["t1"]["accuracy"] for f in own.values()]
        found = result["methods"][name]["tasks"]["t1"]["accuracy"]
        assert found["seeds"] == values
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["sd"] == pytest.approx(np.std(values, ddof=1))
    averages = {n: m["average"]["mean"] for n, m in result["methods"].items()}
    assert result["best_baseline"] == max(("untouched", "full", "alone"), key=averages.get)
    best = result["methods"]["two_stage"]["vs_best_baseline"]
    assert best["difference"] == pytest.approx(averages["two_stage"] - averages[result["best_baseline"]])
    assert 0 < best["low"] < best["difference"] < best["high"]
    assert best["p"] < 0.01
    transfer = result["negative_transfer"]["stage1"]["t2"]
    assert transfer["difference"] == pytest.approx(
        result["methods"]["stage1"]["tasks"]["t2"]["exact_match"]["mean"]
        - result["methods"]["alone"]["tasks"]["t2"]["exact_match"]["mean"]
    )


@settings(max_examples=5, deadline=None)
@given(st.floats(0.1, 0.9), st.floats(0.1, 0.3), st.floats(0.7, 0.9), st.integers(0, 99))
def test_the_interval_agrees_with_a_slow_hierarchical_bootstrap(tmp_path_factory, first, low, high, seed):
    folder = tmp_path_factory.mktemp("cells")
    rates = {"full": (first, first), "two_stage": (low, high)}  # one seed of the second method does far better
    cells = {
        name: {s: write(folder / name / str(s), own[s - 1], 100 * seed + 10 * i + s, (60, 60)) for s in (1, 2)}
        for i, (name, own) in enumerate(rates.items())
    }
    metrics = {task.name: task.metrics[0] for task in TASKS}
    found = Answers(cells, metrics, "test").difference("two_stage", "full", [1, 2], ["t1", "t2"])

    def hits(name, s):
        rows = [json.loads(line) for line in (cells[name][s] / "test.jsonl").read_text().splitlines()]
        return [np.array([r["answer"] == r["target"] for r in rows if r["task"] == t], float) for t in ("t1", "t2")]

    pairs = {s: [b - a for a, b in zip(hits("full", s), hits("two_stage", s), strict=True)] for s in (1, 2)}
    g = np.random.default_rng(seed)
    drawn = [
        np.mean([np.mean([d[g.integers(60, size=60)].mean() for d in pairs[s]]) for s in g.integers(1, 3, size=2)])
        for _ in range(RESAMPLES)
    ]
    assert found.difference == pytest.approx(np.mean([d.mean() for own in pairs.values() for d in own]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.05)
    assert found.high == pytest.approx(high, abs=0.05)


def test_the_tables_say_what_was_found(cells):
    result = summarise(cells, METHODS, TASKS, "test")
    result["parameter_budget"] = 10
    result["methods"]["two_stage"]["routing"] = {"experts": {"layers.0": [[0.9, 0.1], [0.25, 0.75]]}}
    text = markdown(result)
    average = result["methods"]["two_stage"]["average"]
    assert f"**{100 * average['mean']:.1f} ± {100 * average['sd']:.1f}**" in text
    assert "Best baseline: full" in text
    assert "| untouched (baseline) |" in text
    document = page(result, "A <title>", routing_pictures(result))
    assert "A &lt;title&gt;" in document
    assert "<svg" in document
    assert ">0.75</text>" in document
    assert "src=" not in document  # nothing is loaded from elsewhere
    assert re.findall(r'href="[^#]', document) == []


def read_tables(text):
    """Every table of a Markdown or HTML text, by its head: the rows, by their first cell, with marks of bold left out."""
    if "<table" in text:
        grids = [
            [
                re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
                for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
            ]
            for table in re.findall(r"<table.*?</table>", text, re.DOTALL)
        ]
    else:
        blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        grids = [
            [line.strip("| ").split(" | ") for line in block.splitlines() if "---" not in line] for block in blocks
        ]
    return [{row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows} for head, *rows in grids]


def in_points(found):
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


@pytest.mark.parametrize("render", [markdown, lambda result: page(result, "", {})], ids=["markdown", "html"])
def test_the_transfer_table_holds_each_task_against_itself_alone(cells, render):
    result = summarise(cells, METHODS, TASKS, "test")
    result["negative_transfer"] = {  # above zero, below it, and on both sides
        "full": {
            "t1": {"difference": 0.2, "low": 0.1, "high": 0.3},
            "t2": {"difference": -0.2, "low": -0.3, "high": -0.1},
        },
        "stage1": {
            "t1": {"difference": 0.1, "low": -0.1, "high": 0.2},
            "t2": {"difference": 0.4, "low": 0.3, "high": 0.5},
        },
    }
    rendered = render(result)
    *_, table = read_tables(rendered)
    shown = {name: {task: re.sub(r"<.*?>|\*\*", "", cell) for task, cell in row.items()} for name, row in table.items()}
    assert shown == {
        name: {task: in_points(found) for task, found in own.items()}
        for name, own in result["negative_transfer"].items()
    }
    bold = {(name, task) for name, row in table.items() for task, cell in row.items() if "**" in cell or "<b>" in cell}
    assert bold == {("full", "t1"), ("full", "t2"), ("stage1", "t2")}
    del result["negative_transfer"]
    assert len(read_tables(render(result))) == 2


@pytest.mark.parametrize("render", [markdown, lambda result: page(result, "", {})], ids=["markdown", "html"])
def test_the_cost_table_holds_what_each_method_is_and_takes(cells, render):
    facts = {
        "trainable_parameters": 1234567,
        "tokens": 8765,
        "tokens_per_second": 4321.0,
        "peak_memory_bytes": 3 * 2**30,
    }
    for folder in cells["full"].values():
        file = folder / "test.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    _, cost, _ = read_tables(render(summarise(cells, METHODS, TASKS, "test")))
    assert list(cost) == list(cells)
    assert cost["full"] == {
        "what it is": METHODS["full"].about,
        "trained parameters": "1,234,567",
        "tokens seen": "8,765",
        "validation loss": "1.000",
        "tokens/s": "4,321",
        "peak memory": "3.0 GiB",
        "lr x": "1",
    }
    assert cost["alone"]["peak memory"] == "1.0 GiB"


def test_the_backbone_is_told_by_its_weights(cells):
    result = summarise(cells, METHODS, TASKS, "test")
    result["backbone"] = {"name": "some-t5", "parameters": 76961152, "fingerprint": "0123456789abcdef" * 4}
    assert "- Backbone: some-t5, 76,961,152 parameters, fingerprint 0123456789ab.\n" in markdown(result)


def test_of_a_finite_number_of_draws_the_least_p_is_told_as_a_bound(cells):
    result = summarise(cells, METHODS, TASKS, "test")
    result["methods"]["two_stage"]["vs_best_baseline"]["p"] = 2 / (RESAMPLES + 1)
    result["methods"]["stage1"]["vs_best_baseline"]["p"] = 4 / (RESAMPLES + 1)
    text = markdown(result)
    assert "bootstrap over seeds and rows" in text
    head, two_stage, stage1 = (
        next(line for line in text.splitlines() if line.startswith(start))
        for start in ("| method | average", "| two_stage |", "| stage1 |")
    )
    best = head.split(" | ").index("against full")
    assert [line.split(" | ")[best][-9:] for line in (two_stage, stage1)] == ["p ≤ 0.002", "p = 0.004"]


def test_every_method_is_set_against_the_two_stages(cells):
    result = summarise(cells, METHODS, TASKS, "test")
    methods = result["methods"]
    for method in methods.values():
        difference = method["average"]["mean"] - methods["two_stage"]["average"]["mean"]
        assert method["vs_two_stage"]["difference"] == pytest.approx(difference)
    best, other = methods[result["best_baseline"]]["vs_two_stage"], methods["two_stage"]["vs_best_baseline"]
    assert (best["low"], best["high"]) == pytest.approx((-other["high"], -other["low"]))
    assert "| method | average | against full | against two_stage | t1 (accuracy) |" in markdown(result)
    without = {name: own for name, own in cells.items() if name != "two_stage"}
    assert "against two_stage" not in markdown(summarise(without, METHODS, TASKS, "test"))
    alone = markdown(summarise({"full": cells["full"]}, METHODS, TASKS, "test"))
    assert "against" not in alone
    assert "bootstrap" not in alone


def test_the_markdown_links_to_its_heatmaps(cells, tmp_path):
    result = summarise(cells, METHODS, TASKS, "test")
    text = markdown(result)
    assert with_heatmaps(text, routing_pictures(result), tmp_path) == text
    result["methods"]["two_stage"]["routing"] = {"experts": {"layers.0": [[0.9, 0.1], [0.25, 0.75]]}}
    (link,) = re.findall(r"!\[two_stage: experts\]\((.+)\)", with_heatmaps(text, routing_pictures(result), tmp_path))
    assert ">0.75</text>" in (tmp_path / link).read_text()


def test_the_validation_loss_is_that_of_all_seeds(cells):
    for seed, folder in cells["full"].items():
        file = folder / "test.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"validation_loss": float(seed)}))
    result = summarise(cells, METHODS, TASKS, "test")
    assert result["methods"]["full"]["validation_loss"] == 2.0
    head, full = (
        next(line for line in markdown(result).splitlines() if line.startswith(start))
        for start in ("| method | what", "| full | all")
    )
    assert full.split(" | ")[head.split(" | ").index("validation loss")] == "2.000"


TEXT = re.compile(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)</text>')


def read_heatmaps(svg, names):
    """Each number of a picture, by the layer, the task and the expert that stand nearest to it."""
    texts = [(float(x), float(y), text) for x, y, text in TEXT.findall(svg)]
    layers = [(x, text) for x, _, text in texts if text.startswith("layers.")]
    tasks = [(y, text) for _, y, text in texts if text in names]
    experts = [(x, text) for x, _, text in texts if text.isdigit()]

    def nearest(place, marks):
        return min(marks, key=lambda mark: abs(mark[0] - place))[1]

    numbers = [(x, y, text) for x, y, text in texts if re.fullmatch(r"\d\.\d\d", text)]
    return {(nearest(x, layers), nearest(y, tasks), nearest(x, experts)): float(text) for x, y, text in numbers}


def test_the_heatmaps_show_each_tasks_gate_on_each_expert_by_layer(cells):
    result = summarise(cells, METHODS, TASKS, "test")
    routing = {
        "experts": {"layers.3": [[0.91, 0.09], [0.24, 0.76]], "layers.12": [[0.62, 0.38], [0.55, 0.45]]},
        "shared": {"layers.3": [[0.8, 0.15, 0.05], [0.1, 0.2, 0.7]]},
    }
    result["methods"]["two_stage"]["routing"] = routing
    folded = page(result, "", routing_pictures(result)).partition("<h2>Routing</h2>")[2]
    assert folded.count("<details") == 1
    assert ">two_stage<" in folded
    pictures = re.findall(r"<figure>(.*?)<figcaption>(\w+)</figcaption>", folded, re.DOTALL)
    assert [kind for _, kind in pictures] == ["experts", "shared"]
    for svg, kind in pictures:
        assert read_heatmaps(svg, ["t1", "t2"]) == {
            (layer, task, str(expert)): value
            for layer, table in routing[kind].items()
            for task, row in zip(["t1", "t2"], table, strict=True)
            for expert, value in enumerate(row)
        }


def test_methods_that_train_other_numbers_of_parameters_are_named(cells):
    result = summarise(cells, METHODS, TASKS, "test")
    result["parameter_budget"] = 10
    result["methods"]["untouched"]["trainable_parameters"] = 0  # it trains nothing, so it is no exception
    assert "every method that trains is within 10% of it." in markdown(result)
    result["methods"]["full"]["trainable_parameters"] = 400
    assert "every method that trains is within 10% of it, except full." in markdown(result)


def test_one_seed_has_no_deviation(tmp_path):
    cells = {name: {13: write(tmp_path / name, 0.5)} for name in ("full", "two_stage")}
    result = summarise(cells, METHODS, TASKS, "test")
    assert result["methods"]["full"]["average"]["sd"] is None
    assert "negative_transfer" not in result
    assert "±" not in markdown(result)
    assert "bootstrap over rows alone" in markdown(result)
    same = result["methods"]["two_stage"]["vs_best_baseline"]
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
