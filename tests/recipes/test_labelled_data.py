"""The recipes over labelled data that ALTER does not carry; ALTER_TEST_DATA names the folder, as data.root would."""

import json
import os
from pathlib import Path

import pytest

from alter.data.encode import encode_task
from alter.data.sources import SPLITS
from alter.data.task import load_tasks
from alter.errors import AlterError
from alter.metrics import metric, spans
from alter.recipe import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TASKS = [
    pytest.param(file, id=file.stem)
    for recipe in ("biomedical", "customer_service")
    for file in sorted((RECIPES / "tasks" / recipe).glob("*.yaml"))
]
MOST_TRUNCATED = {"mts_header": 0.06, "mts_section": 0.06, "meqsum": 0.03}  # long dialogues and letters
SIZES = {  # rows of each split
    "pubmedqa": (450, 50, 500),
    "ncbi_disease_ner": (5424, 923, 940),
    "bc5cdr_ner": (4560, 4581, 4797),
    "bc2gm_ner": (12574, 2519, 5038),
    "rqe": (8588, 302, 230),
    "meqsum": (700, 100, 200),
    "mts_header": (1201, 100, 200),
    "mts_section": (1201, 100, 200),
    "medquad_qa": (10734, 555, 593),
    "banking77": (8999, 1003, 3080),
    "clinc150": (15100, 3100, 5500),
    "restaurant8k_slots": (7379, 819, 3731),
    "snips_intent": (13084, 700, 700),
    "snips_slots": (13084, 700, 700),
    "product_data2text": (12165, 4056, 4056),
}


@pytest.fixture(scope="module")
def root():
    return os.environ.get("ALTER_TEST_DATA") or pytest.skip(
        "no labelled data: ALTER_TEST_DATA names no folder with medical/ and customer_service/"
    )


@pytest.fixture(scope="module")
def tokenizer(root, request):
    from transformers import AutoTokenizer

    # Asked for here, so that without data no backbone is fetched.
    return AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("file", TASKS)
def test_a_task_encodes_and_its_own_targets_score_full_marks(file, root, tokenizer, tmp_path):
    import datasets

    (task,) = load_tasks([str(file)], RECIPES, root)
    folder = encode_task(task, tokenizer, False, tmp_path, 13)
    for split, size in zip(SPLITS, SIZES[task.name], strict=True):
        rows = datasets.Dataset.from_file(str(folder / split / "data.arrow"))
        assert len(rows) == min(size, task.limit.get(split, size))
        truncated = json.loads((folder / "stats.json").read_text())[split]["truncated"]
        assert truncated / len(rows) <= MOST_TRUNCATED.get(task.name, 0.01)
        targets = rows["target"][:]
        if task.choices:
            assert set(targets) <= set(task.choices)
            assert rows["choice"][:] == [task.choices.index(target) for target in targets]
        if split == "test":
            for name in task.metrics:
                assert metric(name, targets, targets, task.choices).value() == pytest.approx(1), name
    if task.choices:
        train = set(datasets.Dataset.from_file(str(folder / "train" / "data.arrow"))["target"][:])
        assert train == set(task.choices)


@pytest.mark.data
@pytest.mark.parametrize("file", [task for task in TASKS if "ner" in task.id or "slots" in task.id])
def test_a_list_of_spans_is_read_back_as_the_rows_own(file, root):
    """All but the few spans with a `;` in them."""
    (task,) = load_tasks([str(file)], RECIPES, root)
    different = total = 0
    for row in task.opened.rows("test"):
        entries = row["entities"] if "entities" in row else row["slots"]
        pairs = [(e.get("type", e.get("slot")), e.get("text", e.get("value"))) for e in entries]
        plain = [(" ".join(kind.casefold().split()), " ".join(text.casefold().split())) for kind, text in pairs]
        different += spans(task.render_target(row)) != plain
        total += 1
    assert total
    assert different <= 0.002 * total


@pytest.mark.parametrize("name", ["biomedical", "customer_service"])
def test_files_that_are_missing_are_told_with_the_key_that_names_their_folder(name, tmp_path):
    recipe = read_recipe(["--config", str(RECIPES / f"{name}.yaml"), "--data.root", str(tmp_path)])
    for task in recipe.tasks:
        with pytest.raises(AlterError) as error:
            next(iter(task.opened.rows("train")))
        (message,) = error.value.messages
        assert str(tmp_path) in message
        assert "train.parquet by the recipe's key data.root (--data.root FOLDER)" in message
    assert recipe.config["data"]["root"] == str(tmp_path)
