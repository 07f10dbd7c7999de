"""The report of a run: complete, of one file, and true to the results."""

import csv
import json
import struct
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

import alter
from alter import markup, pictures
from alter.cli import main
from alter.metrics import metric
from alter.pictures import confusion, heatmaps, svg
from alter.report import worst_answers, write_report
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import fit, project  # noqa: F401 (a fixture)

SECTIONS = [
    "Summary", "Results", "Learning curves", "Mixture", "Routing", "Similarity of the experts", "Confusion",
    "Worst answers", "Parameters, time and memory", "Recipe", "Environment",
]  # fmt: skip
EMPTY = {"meta", "br", "path", "use", "rect", "line", "image"}


class Page(HTMLParser):
    """Collects headings, links and texts, and checks that tags are closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.links, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "img", "iframe")
        self.links += [v for k, v in attributes.items() if k in ("href", "src", "xlink:href")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1:] == ["h2"]:
            self.sections.append(text)
        self.texts.append(text)


def drawn_curves(run, monkeypatch):
    """The points of each line of the learning curves, and where stage 2 begins."""
    drawn, draw = [], pictures.curves
    monkeypatch.setattr(pictures, "curves", lambda *given: drawn.append(given) or draw(*given))
    write_report(run)
    ((panels, begins),) = drawn
    return [{name.lstrip("_"): points for name, points in lines.items()} for lines in panels.values()], begins


def noted_losses(run):
    """The same from the log of the two stages, whose steps go on from one to the other."""
    rows, begins = [], 0
    for stage in ("stage1", "stage2"):
        with (run / stage / "metrics.csv").open(newline="") as stream:
            noted = [(row["metric"], int(row["step"]), float(row["value"])) for row in csv.DictReader(stream)]
        first = 1 + max(step for _, step, _ in rows) if rows else 0
        begins, rows = first, rows + [(metric, first + step, value) for metric, step, value in noted]

    def line(metric):
        return [(step, value) for name, step, value in rows if name == metric]

    tasks = {name.removeprefix("val/loss/") for name, *_ in rows if name.startswith("val/loss/")}
    both = {"training": line("train/loss"), "validation": line("val/loss")}
    return [both, {task: line(f"val/loss/{task}") for task in tasks}], begins


@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_a_run_ends_with_a_report_of_all_that_it_did(project, capsys, monkeypatch):  # noqa: F811
    fit()
    run = project / "run"
    assert "Report:  run/report.html" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.sections == SECTIONS
    assert all(link.startswith("#") for link in page.links)  # nothing is loaded from elsewhere
    assert "url(http" not in text
    assert "prefers" in text or "color-scheme: light dark" in text
    results = json.loads((run / "results.json").read_text())
    for task, metrics in results["tasks"].items():
        assert task in page.texts
        for entry in metrics.values():
            assert f"{entry['value']:.3f}" in page.texts
            assert f"{entry['low']:.3f} to {entry['high']:.3f}" in page.texts
            for other in filter(None, entry["references"].values()):
                value, low, high = (f"{other[key]:.3f}" for key in ("value", "low", "high"))
                assert any(text.startswith(f"{value} [{low}, {high}]") for text in page.texts)
    firsts = [next(iter(metrics.values())) for metrics in results["tasks"].values()]
    mean = sum(entry["value"] for entry in firsts) / len(firsts)
    assert f"Mean of the tasks' first metrics on the test split: {mean:.3f}." in page.texts
    majority = results["tasks"]["sort"]["accuracy"]["references"]["majority"]
    higher = results["tasks"]["sort"]["accuracy"]["value"] > majority["value"]
    assert any(text.startswith(f"Above the majority class in {int(higher)} of 1 tasks") for text in page.texts)
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    of_sort = [row for row in answers if row["task"] == "sort"]
    right = sum(row["answer"] == row["target"] for row in of_sort) / len(of_sort)
    assert right == pytest.approx(results["tasks"]["sort"]["accuracy"]["value"], abs=1e-6)
    assert {row["task"] for row in answers} == {"sort", "echo"}
    names = {
        "learning_curves", "mixture", "routing_stage1", "routing_experts", "routing_shared", "similarity_experts", "similarity_shared",
        "confusion_sort",
    }  # fmt: skip
    assert {file.stem for file in (run / "report").iterdir()} == names
    assert text.count("<svg") == len(names)
    for file in (run / "report").iterdir():
        head = file.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", head[16:24])) > 100
    inside = json.loads((run / "inside.json").read_text())
    # stage 1's gates are those of its own model
    first = alter.load(run, stage="stage1").model
    for layer, table in inside["stage1"]["routing"].items():
        for task, row in enumerate(table):
            assert row == pytest.approx(first.layers[layer].router.task_gates(task).tolist(), abs=1e-4)
    for layers in inside["routing"].values():
        for table in layers.values():
            assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in table)
    assert sum(task["rate"] for task in inside["mixture"].values()) == pytest.approx(1)
    assert all(f"{task['rate']:.1%}" in page.texts for task in inside["mixture"].values())
    for record in json.loads((run / "progress.json").read_text()).values():
        if record.get("trainable_parameters"):
            assert {f"{record['trainable_parameters']:,}", f"{record['tokens']:,}"} <= set(page.texts)
    assert drawn_curves(run, monkeypatch) == noted_losses(run)
    (run / "report.html").unlink()
    main(["test", "--run", "run"])
    assert Page((run / "report.html").read_text()).sections == SECTIONS


@pytest.mark.slow
def test_the_report_is_read_on_phones_and_screens_by_night_and_on_paper(project, browser):  # noqa: F811
    fit()
    file = (project / "run" / "report.html").as_uri()
    colours = {}
    for width, scheme in ((390, "light"), (1280, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        errors = []
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.goto(file)
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # what is wide scrolls by itself
        colours[scheme] = page.evaluate("getComputedStyle(document.querySelector('h1')).color")
        text = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert text == colours[scheme]
        assert not errors
        page.close()
    assert colours["light"] != colours["dark"]
    page = browser.new_page(viewport={"width": 718, "height": 1000})  # A4 within margins of 1 cm
    page.goto(file)
    page.emulate_media(media="print")
    edges = page.evaluate("[...document.querySelectorAll('table, svg')].map(e => e.getBoundingClientRect().right)")
    assert len(edges) > 10
    assert max(edges) <= 718.5  # nothing is cut
    assert page.locator("pre").first.is_visible()  # the recipe, which is folded on a screen
    page.close()


def test_a_run_of_one_stage_has_a_report_too(project):  # noqa: F811
    fit("--stages", "[stage1]", "--data.tasks", "[tasks/echo.yaml]")
    sections = Page((project / "run" / "report.html").read_text()).sections
    assert sections == [name for name in SECTIONS if name not in ("Similarity of the experts", "Confusion")]


ANSWERS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=40)


@given(ANSWERS)
def test_the_worst_answers_are_wrong_and_the_most_frequent_mistakes(pairs):
    rows = [{"target": target, "answer": answer} for target, answer in pairs]
    found = worst_answers(rows, "macro_f1", ["a", "b", "c"])
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(found) == min(10, len(wrong))
    frequent = sorted((wrong.count(pair) for pair in wrong), reverse=True)
    assert [wrong.count((row["target"], row["answer"])) for _, row in found] == frequent[: len(found)]


@given(st.lists(st.tuples(st.text("ab ", min_size=1), st.text("ab ")), min_size=1, max_size=15))
def test_of_written_answers_the_worst_score_lowest(pairs):
    rows = [{"target": target, "answer": answer} for target, answer in pairs]
    scores = sorted(metric("token_f1", [row["answer"]], [row["target"]]).value() for row in rows)
    found = worst_answers(rows, "token_f1", None)
    assert [score for score, _ in found] == [score for score in scores if score < 1][:10]


def test_a_confusion_counts_pairs_and_joins_rare_classes():
    drawn = confusion(["a", "a", "b"], ["a", "b", "b"])
    assert sorted(text.get_text() for text in drawn.axes[0].texts) == ["1", "1", "1"]
    many = [str(i) for i in range(40)]
    drawn = confusion(many, many, most=5)
    assert drawn.axes[0].get_yticklabels()[-1].get_text() == "35 others"
    assert "35" in [text.get_text() for text in drawn.axes[0].texts]
    drawn = confusion([*many, "7", "7", "33"], [*many, "7", "7", "33"], most=2)
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["33", "7", "38 others"]


@given(st.lists(st.text("$_^5 %{\\", min_size=1, max_size=6), min_size=2, max_size=4, unique=True))
def test_labels_are_drawn_as_they_are_written(labels):
    drawn = svg(confusion(labels, labels))
    for label in labels:
        assert f">{label}<" in drawn


def test_what_somebody_wrote_stays_as_it_is_written():
    assert '<td class="text">**Note** &lt;b&gt;</td>' in markup.table(["prompt"], [["**Note** <b>"]], long=True)
    assert "<b>0.5</b>" in markup.table(["metric"], [["**0.5**"]])


def test_a_picture_takes_the_colour_of_the_page_and_has_its_numbers():
    text = svg(heatmaps({"layer 1": [[0.25, 0.75]]}, ["task <&>"], ["0", "1"]))
    assert text.startswith("<svg")
    assert "currentColor" in text
    assert "#010203" not in text
    assert ">0.25</text>" in text
    assert "task &lt;&amp;&gt;" in text
