"""Inputs without a task's name, as a user gives them."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import alter
from alter.cli import main
from alter.errors import AlterError
from tests.data.conftest import make_words, task_dict, write_jsonl
from tests.runs import inside, make_run
from tests.test_cli import refused


def text(first, i):
    return " ".join(f"w{first + n * 31 % 90}" for n in range(i * 7, i * 7 + 7))


SORT, PICK, PAIR = text(20, 500), text(120, 501), text(320, 502)  # seen in no split


def asking(first):
    """The words in which a task's prompts ask for an answer."""
    return " ".join(f"w{first + n}" for n in range(9))


def write(folder, name, first, prompt, **changes):
    """A task whose texts are of words of its own, from ``first`` on."""
    task = task_dict(folder, name, prompt=prompt, max_prompt_tokens=40, **changes)
    for split, file in task["source"]["init_args"].items():
        rows = [
            {"text": text(first, i), "note": "w3", "label": ["yes", "no"][i % 2]}
            for i in range(len(split), len(split) + 200)
        ]
        write_jsonl(Path(file), rows)
    return task


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tested")
    made = make_run(folder, make_words(folder / "tokenizer"), router=None)
    content = yaml.safe_load((made / "recipe.yaml").read_text())
    names = [task["name"] for task in content["data"]["tasks"]]  # sort, pick, echo, pair
    content["data"]["tasks"] = [
        write(folder, names[0], 20, f"{asking(400)} {{{{ text }}}} :"),
        write(folder, names[1], 120, f"{asking(410)} {{{{ text }}}} :"),
        write(folder, names[2], 120, f"{asking(420)} {{{{ text }}}} :", choices=None),
        write(folder, names[3], 320, f"{asking(430)} {{{{ text }}}} {{{{ note }}}} :", choices=None),
    ]
    (made / "recipe.yaml").write_text(yaml.safe_dump(content))
    with inside(folder):
        main(["test", "--run", "run"])
    return folder


@pytest.fixture
def run(tested, tmp_path, monkeypatch):
    shutil.copytree(tested, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_each_input_goes_to_its_task_and_what_fits_two_alike_or_none_is_not_clear(run):
    model = alter.load("run")
    clear = [
        (SORT, "sort"),  # words of sort's texts alone
        (f"{asking(400)} {SORT} :", "sort"),  # a whole prompt
        (f"{asking(410)} {PICK} :", "pick"),  # the same texts, but told by the prompt
        (f"{asking(420)} {PICK} :", "echo"),
        ({"text": PAIR, "note": "w3"}, "pair"),  # told by its fields
    ]
    guesses = model.guess([text for text, _ in clear])
    assert [found.task for found in guesses] == [task for _, task in clear]
    assert [found.is_prompt for found in guesses] == [False, True, True, True, False]
    unclear = model.guess([PICK, "w450 w470 w480 w490", {"other": "w20"}])
    assert [found.task for found in unclear] == [None] * 3
    assert unclear[0].likeliest in ("pick", "echo")  # their texts are the same
    assert unclear[0].probability == pytest.approx(0.5, abs=0.2)
    assert unclear[1].typical < 0.01
    assert unclear[2].likeliest is None

    texts = [text for text, _ in clear]
    assert model.generate(texts[2:3]) == model.generate([PICK], task="pick")
    guessed, named = model.classify(texts[:1], return_probs=True), model.classify(texts[:1], "sort", return_probs=True)
    assert guessed == named
    with pytest.raises(AlterError, match=r"is not clear \(input 2: most like .*\); name one of sort, pick, echo, pair"):
        model.generate([texts[0], "w450 w470 w480 w490"])


def test_predict_without_a_task_tells_it_or_that_it_is_not_clear(run, capsys):
    (run.parent / "rows.jsonl").write_text(
        f'{{"text": "{SORT}"}}\n{{"text": "w450 w470 w480 w490"}}\n{{"text": "{PAIR}", "note": "w3"}}\n'
    )
    capsys.readouterr()
    main(["predict", "--run", "run", "--input", "rows.jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["task"] for line in lines] == ["sort", None, "pair"]
    assert lines[0]["answer"] in ("yes", "no")
    assert lines[0]["probabilities"].keys() == {"yes", "no"}
    assert lines[1]["answer"] is None
    assert "not clear: most like" in lines[1]["low_confidence"]


def test_the_cost_of_guessing_is_measured_a_task(run, capsys):
    main(["test", "--run", "run", "--no-task-id"])
    out = capsys.readouterr().out
    found = json.loads((run / "results.no_task_id.json").read_text())
    assert list(found) == ["sort", "pick", "echo", "pair"]
    model = alter.load("run")
    for name, task in found.items():
        assert task["n"] == 200
        assert task["prompt"]["right"] >= 0.9
        assert task["prompt"]["unknown"] > 0.5  # prompts with words that no other task has
        for view in ("prompt", "input"):
            assert task[view]["right"] + task[view]["wrong"] + task[view]["unclear"] == pytest.approx(1)
            for metric, entry in task[view]["metrics"].items():
                assert entry["value"] + entry["loss"] == pytest.approx(task["named"][metric]["value"])
        assert name in out
    assert found["sort"]["input"]["right"] >= 0.75
    assert found["pair"]["input"]["right"] >= 0.9
    assert found["pick"]["input"]["unclear"] > 0.5
    # The metric of one task by hand, from guesses and answers one at a time.
    rows = [json.loads(line) for line in Path("pick.test.jsonl").read_text().splitlines()]
    right = 0
    for row, found_task in zip(rows, model.guess([row["text"] for row in rows]), strict=True):
        if found_task.task is not None:
            right += model.generate([row["text"]], task=found_task.task)[0] == row["label"]
    assert found["pick"]["input"]["metrics"]["accuracy"]["value"] == pytest.approx(right / len(rows))


def test_a_run_without_a_task_predictor_asks_for_names(run, capsys):
    (run / "model" / "task_predictor.safetensors").unlink()
    (run.parent / "rows.jsonl").write_text('{"text": "w22"}\n')
    (sentence,) = refused(capsys, "predict", "--run", "run", "--input", "rows.jsonl")
    assert "has no task predictor, so name one of sort, pick, echo, pair" in sentence
    (run / "model" / "task_predictor.safetensors").write_bytes(b"\x80")
    (sentence,) = refused(capsys, "predict", "--run", "run", "--task", "sort", "--input", "rows.jsonl")
    assert "not a readable task predictor" in sentence
