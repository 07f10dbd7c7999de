"""A task proposed from a table: what the model reads, what it answers, and how rows are split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alter.errors import AlterError
from alter.init.columns import MOST_VALUES, NO_ANSWER, Column, as_text

# Columns that are answers by their usual names, the likelier first.
ANSWERS = (
    "label", "labels", "target", "answer", "answers", "class", "category", "intent", "sentiment", "output", "response",
    "summary", "completion", "translation", "entities", "slots", "spans", "ner", "topic", "relation", "tag", "tags",
    "gold", "y", "department", "priority", "status", "score", "rating", "stars", "assistant",
)  # fmt: skip
# Two texts to compare have names of one of these pairs, or alike but for a number or letter at the end, or are about as long.
PAIRS = (
    {"premise", "hypothesis"},
    {"question", "sentence"},
    {"question", "passage"},
    {"query", "document"},
    {"claim", "evidence"},
)
ALIKE = 2  # how many times as long the longer is, at the most
TYPE_KEYS = ("type", "label", "slot", "entity", "tag", "category", "class")
TEXT_KEYS = ("text", "value", "span", "mention", "word", "name", "entity")
NO_VARIABLES = {
    "and", "e", "else", "false", "if", "in", "is", "loop", "none", "not", "or", "row", "self", "t", "true",
}  # words of templates, and what those that are written here name  # fmt: skip
PERSON = re.compile(r"(?i)patient|subject|person|mrn|customer|client|user|member|account")  # whose rows belong together
MOST_CHOICES = 200
LONGEST_CHOICE = 60  # characters
MOST_FIELDS = 6


@dataclass
class TaskGuess:
    """A proposed task.

    Attributes:
        kind: classification, pair, extraction or generation.
        inputs: columns that the prompt shows.
        target: column of the answer.
        answer: the template of the answer.
        choices: of a classification or a pair.
        metrics: of an extraction; else the usual ones of the kind.
        rows: how many there are.
        group: column, or several together, whose equal values stay in one split.
        ungrouped: rows without a value there.
        left_out: columns that are not used, with the reason.
        reason: why this target.
    """

    kind: str
    inputs: list[Column]
    target: Column
    answer: str
    rows: int
    choices: list[str] | None = None
    metrics: list[str] | None = None
    group: str | list[str] | None = None
    ungrouped: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def longest_input(self) -> Column:
        """The input that is shortened where a prompt is too long."""
        return max(self.inputs, key=lambda column: column.mean)

    @property
    def max_prompt_tokens(self) -> int:
        """Room for the prompt, a power of two up to 512."""
        names = len(self.question) + sum(len(column.name) + 2 for column in self.inputs)
        return _room(names // 2 + sum(column.tokens for column in self.inputs), 64, 512)

    @property
    def max_target_tokens(self) -> int:
        """Room for the answer and its end; of choices, which have to fit whole, one token a byte."""
        if self.choices:
            return _room(max(len(choice.encode()) for choice in self.choices) + 2, 4, 256)
        return _room(self.target.tokens + 2, 16, 256)

    @property
    def max_example_tokens(self) -> int:
        """Room for a prompt with its answer; of choices, which have a few tokens each, that for the prompt."""
        return self.max_prompt_tokens + (0 if self.choices else self.max_target_tokens)

    @property
    def prompt(self) -> str:
        """The prompt's template: each input behind its name, then the question."""
        lines = [f"{_spoken(column.name)}: {{{{ {self._expression(column)} }}}}" for column in self.inputs]
        return "\n".join([*lines, f"{self.question}:"])

    @property
    def question(self) -> str:
        """The prompt's last line: the answer's name, for a pair of texts with the choices where they are short."""
        name = _spoken(self.target.name)
        full = f"{name}, one of {', '.join(self.choices or [])}"
        return full if self.kind == "pair" and len(full) <= 80 and "{" not in full else name

    def _expression(self, column: Column) -> str:
        """What a prompt shows of a column; only the longest is shortened by tokens, so the others are by characters."""
        room = int(self.max_prompt_tokens // 2 / max(len(self.inputs) - 1, 1) * column.characters_a_token)
        filters = ["default('', true)"] if column.filled < self.rows else []
        field = _field(column.name)
        if column.lists:  # of words; who asks later may have a text
            field = f"{field} if {field} is string else {field}"
            filters += ["join(' ')"]
        elif column is not self.longest_input and column.longest > room:
            filters += ["string", f"truncate({room}, true)"]
        return " | ".join([field, *filters])


def _room(tokens: int, least: int, most: int) -> int:
    room = least
    while room < min(tokens, most):
        room *= 2
    return room


def _field(name: str) -> str:
    """The name as a Jinja template reads it."""
    return name if _is_variable(name) else f"row[{name!r}]"


def _is_variable(name: str) -> bool:
    return name.isidentifier() and name.lower() not in NO_VARIABLES


def _spoken(name: str) -> str:
    """A column's name as a prompt says it."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").replace("-", " ").split()
    text = " ".join(words).replace("{", "").replace("}", "") or "Text"
    return text[:1].upper() + text[1:]


def guess_task(
    columns: Mapping[str, Column],
    rows: int,
    where: str,
    sample: Iterable[Mapping[str, Any]],
    answer: str | None = None,
) -> TaskGuess:
    """Proposes a task.

    Args:
        columns: of the table.
        rows: how many there are.
        where: the file, for messages.
        sample: some rows, to see whether answers stand in the inputs.
        answer: the column to learn, where it is known.

    Raises:
        AlterError: the table has too little to learn from.
    """
    sample = list(sample)
    left_out, ids, useful = dict[str, str](), list[Column](), list[Column]()
    for column in columns.values():
        reason = None if column.name == answer else _useless(column, rows)
        if reason is None:
            useful.append(column)
        elif reason == "group":
            ids.append(column)
            left_out[column.name] = "it is an id"
        else:
            left_out[column.name] = reason
    if len(useful) < 2:
        shown = ", ".join(f"{name} ({left_out[name]})" if name in left_out else name for name in columns)
        separated = where.lower().endswith((".csv", ".tsv")) and len(columns) == 1
        hint = "a CSV file has commas, semicolons or tabs between its columns" if separated else "add what is missing"
        raise AlterError(
            f"{where}: one column to read and one to answer are needed, and only {len(useful)} of {len(columns)} can be used: "
            f"{shown}; {hint}."
        )
    codes = [column for column in useful if column.name != answer and _is_code(column, rows)]
    if len(useful) - len(codes) >= 2:  # else nothing is left to learn from without them
        useful = [column for column in useful if column not in codes]
        left_out |= {column.name: "a code of its own in every row" for column in codes}
    told = answer is not None and answer in columns
    target, reason = (columns[str(answer)], "as told") if told else _target(useful, rows)
    if target.filled < rows:
        raise AlterError(
            f"{where}: the answer, the column '{target.name}', is empty in {rows - target.filled} of {rows} rows; fill it in, "
            "remove these rows, or name another column by --answer."
        )
    if target.mappings and target.answers < target.filled:
        raise AlterError(
            f"{where}: the answer, the column '{target.name}', is a mapping; write its text into a column of its own, or name "
            "another column by --answer."
        )
    words = _tagged_words(target, useful, sample)
    texts = [c for c in useful if c is not target and not _is_numeric(c) and not c.lists and not c.mappings]
    inputs = texts or ([words] if words else [])
    if not inputs:
        enough = "; beside tags such as B-Drug, I-Drug and O a list of as many words is enough" if target.lists else ""
        raise AlterError(f"{where}: beside '{target.name}' no column holds text to read; add one{enough}.")
    for column in useful:
        if column not in (target, words, *inputs):
            left_out[column.name] = "a list" if column.lists else "a mapping" if column.mappings else "numbers"
    for column in inputs[MOST_FIELDS:]:
        left_out[column.name] = f"more than {MOST_FIELDS} columns to read"
    group = min(ids, key=lambda column: (PERSON.search(column.name) is None, column.kinds), default=None)
    found = TaskGuess("generation", inputs[:MOST_FIELDS], target, _answer(target), rows)
    if group is not None:
        found.group, found.ungrouped = group.name, rows - group.filled
        left_out |= {other.name: "an id, and not all rows of one stay together" for other in ids if other is not group}
    found.left_out, found.reason = left_out, reason
    if group is None:
        # Not dates or amounts; rows of one text may differ in them, and in what is left out.
        read = [column.name for column in found.inputs if column.codes < column.filled]
        names = read or [column.name for column in found.inputs]
        found.group = names[0] if len(names) == 1 else names
    if words:
        found.kind, found.answer, found.metrics = "extraction", _spans(target.name, words.name), ["span_f1"]
        return found
    return _typed(found, rows, where, sample)


def _useless(column: Column, rows: int) -> str | None:
    """Why a column is neither read nor answered; ``group`` for ids that repeat; None where it is of use."""
    if not column.filled:
        return "empty"
    if column.mappings and column.answers < column.filled:
        return "a mapping"
    if column.others and not column.items:
        return "a list of numbers; tags are texts such as B-Drug and O"
    if column.lists:
        return "not the same kind of list in every row" if column.lists < column.filled or column.others else None
    is_id = re.search(r"(?i:(^|[_\W])(id|uuid|guid|mrn|index|idx|key)$)|(?<=[a-z])(Id|ID)$|^Unnamed|^$", column.name)
    counted = sum(column.values.values())  # rows of the values that are kept
    # A person's rows belong together however few they are.
    most = counted - 1 if PERSON.search(column.name) else 0.8 * counted
    if is_id and 10 <= column.kinds <= most:
        return "group"
    if is_id:
        return "it is an id"
    if column.kinds == 1:
        return "the same in every row" if column.filled == rows else "the same in every row that has one"
    if column.number == column.filled and column.kinds == min(rows, MOST_VALUES) and rows > 20:
        return "a number of its own in every row"
    return None


def _is_code(column: Column, rows: int) -> bool:
    """Whether it is one word with a digit, another in every row, as ids are; what is named as answers are is none."""
    differ = column.kinds == min(rows, MOST_VALUES) and rows > 20
    return differ and column.codes == column.filled == rows and column.name.lower() not in ANSWERS


def _is_numeric(column: Column) -> bool:
    return not column.lists and column.number == column.filled


def _is_choice(column: Column, rows: int) -> bool:
    """Whether it can be a label: few, short values, each of which repeats."""
    return (
        not column.lists
        and not column.lines
        and 2 <= column.kinds <= min(MOST_CHOICES, rows / 3)
        and column.longest <= LONGEST_CHOICE
        and column.filled == rows
    )


def _target(useful: list[Column], rows: int) -> tuple[Column, str]:
    names = {column.name.lower(): column for column in reversed(useful)}
    for name in ANSWERS:
        if name in names:
            return names[name], "by its name"
    for name in ANSWERS[:8]:  # such as intent_label
        for column in useful:
            if re.search(rf"[_\W]{name}$", column.name.lower()):
                return column, "by its name"
    if lists := [column for column in useful if column.lists]:
        return lists[-1], "a list of things found"
    if choices := [column for column in useful if _is_choice(column, rows)]:
        best = min(reversed(choices), key=lambda column: column.kinds)
        if len(choices) < len(useful):  # else nothing is left to read
            return best, "few different values"
    texts = [column for column in useful if not _is_numeric(column)] or useful
    return texts[-1], "the last column of text"


def _answer(target: Column) -> str:
    """The template of an answer, on one line, since an answer ends where its line does."""
    first = f"['text'][0] | default('{NO_ANSWER}')" if target.answers else ""
    flat = " | string | replace('\\n', ' ')" if target.lines else ""
    return f"{{{{ {_field(target.name)}{first}{flat} }}}}"


def _typed(found: TaskGuess, rows: int, where: str, sample: Iterable[Mapping[str, Any]]) -> TaskGuess:
    """Says which kind of task it is, with what belongs to the kind."""
    target = found.target
    if target.lists:
        return _extraction_of_lists(found, where)
    if _is_choice(target, rows):
        found.choices = sorted(target.values)
        long = [column for column in found.inputs if not _is_choice(column, rows)]
        found.kind = "pair" if len(long) == 2 and _are_alike(*long) else "classification"
        return found
    names = [column.name for column in found.inputs]
    inside = [_is_inside(row, names, target.name) for row in sample if as_text(row.get(target.name)) != NO_ANSWER]
    if target.longest <= 200 and sum(inside) > 0.9 * len(inside):
        found.kind, found.metrics = "extraction", ["exact_match", "token_f1"]
    return found


def _is_inside(row: Mapping[str, Any], inputs: list[str], target: str) -> bool:
    text = " ".join(str(row.get(name, "")) for name in inputs).casefold()
    return as_text(row.get(target)).casefold() in text


def _are_alike(one: Column, other: Column) -> bool:
    """Whether two columns of text are of a like kind, and so a pair to compare; a title and its text are not."""
    names = [re.sub(r"[\W_]+", " ", column.name).strip() for column in (one, other)]
    stems = [re.sub(r"\d+$|(?<=[a-z])[A-Z]$| [A-Za-z]$", "", name) for name in names]
    return (
        {name.lower() for name in names} in PAIRS
        or (stems[0] == stems[1] and bool(stems[0]))
        or max(one.mean, other.mean) <= ALIKE * min(one.mean, other.mean)
    )


def _tagged_words(target: Column, useful: list[Column], sample: list[Mapping[str, Any]]) -> Column | None:
    """The words that the target's tags belong to: a list of as many texts in each row; None where the target has no tags."""
    if not 0 < target.tags == target.items or target.others or target.lists < target.filled:
        return None
    lists = [column for column in useful if column is not target and column.lists and not column.keys]
    lists.sort(key=lambda column: -column.mean)  # words are longer than what else is said of them
    return next((c for c in lists if all(_size(row, c.name) == _size(row, target.name) for row in sample)), None)


def _size(row: Mapping[str, Any], name: str) -> int:
    return len(value) if isinstance(value := row.get(name), list) else 0


def _spans(tags: str, words: str) -> str:
    """The template that writes the spans of tagged words as ``Drug: aspirin; Disease: colon cancer``, or none."""
    tags, words = _field(tags), _field(words)
    inside = "t[:2] == 'I-' and not loop.first and loop.previtem[2:] == t[2:]"
    return (
        f"{{% for t in {tags} %}}{{% if {inside} %}} {{{{ {words}[loop.index0] }}}}{{% elif t != 'O' %}}"
        f"{{{{ '; ' if {tags}[:loop.index0] | reject('eq', 'O') | list else '' }}}}{{{{ t[2:] }}}}: {{{{ {words}[loop.index0] }}}}"
        f"{{% endif %}}{{% endfor %}}{{{{ '' if {tags} | reject('eq', 'O') | list else '{NO_ANSWER}' }}}}"
    )


def _extraction_of_lists(found: TaskGuess, where: str) -> TaskGuess:
    found.kind = "extraction"
    name = _field(found.target.name)
    keys = [key for key, count in found.target.keys.items() if count == found.target.items]  # that every item has
    kind = next((key for key in TYPE_KEYS if key in keys), None)
    text = next((key for key in TEXT_KEYS if key in keys and key != kind), None)
    if found.target.keys and text is None:
        raise AlterError(
            f"{where}: the column '{found.target.name}' is a list of mappings with {', '.join(found.target.keys)}; which of "
            f"them is the text cannot be told: name it one of {', '.join(TEXT_KEYS)}, in every one."
        )
    label = f"{{{{ e[{kind!r}] }}}}" if kind and text else _spoken(found.target.name)
    item = f"{label}: {{{{ e{f'[{text!r}]' if text else ''} }}}}"
    found.answer = f"{{% for e in {name} %}}{item}{{{{ '' if loop.last else '; ' }}}}{{% else %}}none{{% endfor %}}"
    found.metrics = ["span_f1"]
    return found
