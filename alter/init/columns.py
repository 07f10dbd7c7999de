"""What a table's columns hold, found in one pass over its rows."""

from __future__ import annotations

import numbers
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alter.data.files import is_missing

NO_ANSWER = "none"  # what is written where a row's mapping of answers has none
TAG = re.compile(r"O|[BI]-.+")  # of a word: outside, at the beginning of a span, or inside one
CODE = re.compile(r"(?=\S*\d)\S+")  # one word with a digit
MOST_VALUES = 1000  # different values of a column that are counted; more of them are no labels


@dataclass
class Column:
    """Facts about one column.

    Attributes:
        name: of the column.
        values: how often each value occurs, as text; stops growing at ``MOST_VALUES`` different ones.
        filled: rows in which it is not empty.
        texts: rows in which it is a text, a truth value included.
        number: rows in which it is a number, or a text that is one.
        codes: rows in which it is one word with a digit.
        mappings: rows in which it is a mapping.
        answers: rows in which it is a mapping whose ``text`` is a list of answers, as SQuAD has them; the first counts as its value.
        lists: rows in which it is a list.
        items: things in these lists: mappings or texts.
        others: things in these lists that are neither.
        tags: things in these lists that are tags of words.
        characters: of all its values as text.
        bytes: of all its values in UTF-8.
        longest: characters of the longest.
        tokens: of the longest in tokens, at the most.
        lines: rows in which it has more than one line.
        keys: of the mappings in its lists, with how many mappings have them.
    """

    name: str
    values: Counter[str] = field(default_factory=Counter)
    filled: int = 0
    texts: int = 0
    number: int = 0
    codes: int = 0
    mappings: int = 0
    answers: int = 0
    lists: int = 0
    items: int = 0
    others: int = 0
    tags: int = 0
    characters: int = 0
    bytes: int = 0
    longest: int = 0
    tokens: int = 0
    lines: int = 0
    keys: Counter[str] = field(default_factory=Counter)

    def add(self, value: Any) -> None:
        """Counts one row's value."""
        if isinstance(value, list):
            self._add_list(value)
            return
        text = as_text(value)
        if not text:
            return
        self.filled += 1
        self.mappings += isinstance(value, Mapping)
        self.answers += _has_answers(value)
        self.texts += isinstance(value, (str, bool))
        self.number += _is_number(value, text)
        self.codes += CODE.fullmatch(text) is not None
        self._measure(text)
        self.lines += "\n" in text
        if text in self.values or len(self.values) < MOST_VALUES:
            self.values[text] += 1

    def _add_list(self, items: list[Any]) -> None:
        self.filled += 1
        self.lists += 1
        for item in items:
            self.items += isinstance(item, (Mapping, str))
            self.others += not isinstance(item, (Mapping, str))
            self.tags += isinstance(item, str) and TAG.fullmatch(item) is not None
            self.keys.update(list(item) if isinstance(item, Mapping) else [])
        self._measure("; ".join(str(list(item.values()) if isinstance(item, Mapping) else item) for item in items))

    def _measure(self, text: str) -> None:
        size = len(text.encode())
        self.characters += len(text)
        self.bytes += size
        self.longest = max(self.longest, len(text))
        if size > self.tokens:  # else it has no more tokens
            self.tokens = max(self.tokens, most_tokens(text))

    @property
    def mean(self) -> float:
        """Mean characters of a value that is not empty."""
        return self.characters / max(self.filled, 1)

    @property
    def characters_a_token(self) -> float:
        """How many characters a token may have at the least: two letters of English, less of scripts of more bytes."""
        return 2 * self.characters / max(self.bytes, 1)

    @property
    def kinds(self) -> int:
        """How many different values there are, at most ``MOST_VALUES``."""
        return len(self.values)


def read_columns(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Column], int]:
    """Looks at every row once; memory is flat.

    Returns:
        the columns in their order, and how many rows there are.
    """
    columns: dict[str, Column] = {}
    count = 0
    for row in rows:
        count += 1
        for name, value in row.items():
            columns.setdefault(str(name), Column(str(name))).add(value)
    return columns, count


def most_tokens(text: str) -> int:
    """How many tokens a text has at the most: one for two bytes of letters, and one for each byte of digits and signs."""
    letters = sum(len(letter.encode()) for letter in text if letter.isalpha())
    return len(text.encode()) - letters // 2


def as_text(value: Any) -> str:
    """A value as a template writes it; of SQuAD's answers the first."""
    if _has_answers(value):
        value = next(iter(value["text"]), NO_ANSWER)
    return "" if is_missing(value) else str(value).strip()


def _has_answers(value: Any) -> bool:
    texts = value.get("text") if isinstance(value, Mapping) else None
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def _is_number(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, numbers.Number):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
