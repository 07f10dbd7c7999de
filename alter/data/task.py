"""A task: where its rows come from, and how a row becomes a prompt and a target."""

from __future__ import annotations

import copy
import glob
import inspect
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.exceptions import SecurityError

from alter.data import sources, template
from alter.data.files import writable
from alter.data.sources import SPLITS, Fields, Function, Source
from alter.errors import AlterError, did_you_mean
from alter.metrics import recalled_choice
from alter.schema import check, import_name
from alter.yaml_file import read_yaml

CLASSIFICATION_METRICS = ("accuracy", "macro_f1")
GENERATION_METRICS = ("exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "span_f1")
AUTO = "auto"  # no task's name: in its place it leaves it to a server to find each input's task
_TEMPLATES = template.environment()


@dataclass
class Task:
    """A task, as about 20 lines of YAML.

    Attributes:
        name: unique in the mixture; not ``auto``, which clients of a server write where they name no task.
        source: ``class_path`` and ``init_args`` of a Source (``Files``, ``Hub``) or of a function ``f(split, ...)``.
        prompt: Jinja template over the fields of a row; ``row['a name']`` is for those that are no variable names.
        target: Jinja template of the answer.
        choices: the possible answers; present for a classification task, absent for a generation task.
        metrics: by default accuracy and macro_f1 for classification, rouge1, rougeL and exact_match for generation.
        truncate: the field that is shortened where the prompt is too long.
        max_prompt_tokens: longest prompt.
        max_target_tokens: longest target, and longest answer.
        truncate_target: whether to learn from the first ``max_target_tokens`` of a longer target, instead of refusing it;
            metrics compare with the whole of it.
        weight: multiplies the mixture rate.
        limit: most rows of a split, drawn by a seed.
        shots: learns from this many rows of each class, in place of the mixture's own.
        license: of the data, for the model card.
        where: the file it was read from, for messages.
    """

    name: str
    source: dict[str, Any]
    prompt: str
    target: str
    choices: list[str] | None = None
    metrics: list[str] = field(default_factory=list)
    truncate: str | None = None
    max_prompt_tokens: int = 512
    max_target_tokens: int = 128
    truncate_target: bool = False
    weight: float = 1.0
    limit: dict[str, int] = field(default_factory=dict)
    shots: int | None = None
    license: str | None = None
    where: str = "task"

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise AlterError(*problems)
        if not self.metrics:
            self.metrics = list(CLASSIFICATION_METRICS) if self.choices else ["rouge1", "rougeL", "exact_match"]

    def _problems(self) -> Iterator[str]:
        where = f"{self.where}: task '{self.name}'"
        for key in ("prompt", "target"):
            try:
                for problem in dict.fromkeys(template.problems(_TEMPLATES.parse(getattr(self, key)))):
                    yield f"{where}, key '{key}': {problem}; write the template without it."
            except RecursionError:
                yield f"{where}, key '{key}': the template is nested too deeply; write it flatter."
            except TemplateSyntaxError as error:
                yield (
                    f"{where}, key '{key}': not a Jinja template ({error.message}, line {error.lineno}); mend it. A column whose "
                    "name has spaces or signs is {{ row['its name'] }}."
                )
        known = (*CLASSIFICATION_METRICS, *GENERATION_METRICS, "recall[CHOICE]") if self.choices else GENERATION_METRICS
        for name in self.metrics:
            if self.choices and (recalled := recalled_choice(name)):
                if recalled not in self.choices:
                    yield (
                        f"{where}, key 'metrics': '{name}' is of no choice of the task; name one of its choices."
                        f"{did_you_mean(recalled, self.choices)}"
                    )
            elif name not in known:
                kind = "classification" if self.choices else "generation"
                yield f"{where}, key 'metrics': '{name}' is not a {kind} metric; known are {', '.join(known)}.{did_you_mean(name, known)}"
        if not self.name or self.name.startswith((".", "-")) or {"/", "\\", "\0"} & set(self.name):
            yield f"{where}, key 'name': files are named by it; give one without / and \\ that starts with no dot or dash."
        if self.name == AUTO:
            yield f"{where}, key 'name': a client of alter serve writes it where it names no task; give another."
        yield from limit_problems(self.limit, f"{where}, key 'limit'")
        if self.choices is not None and (len(self.choices) < 2 or len(set(self.choices)) < len(self.choices)):
            yield f"{where}, key 'choices': give at least two choices, each once."
        if self.choices and self.truncate_target:
            yield f"{where}, key 'truncate_target': a choice is scored whole; remove the key and raise max_target_tokens."
        if not 0 < self.weight < math.inf:
            yield f"{where}, key 'weight': {self.weight} is no number above 0; to leave the task out, remove it from the recipe."
        for key in ("max_prompt_tokens", "max_target_tokens", "shots"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                yield f"{where}, key '{key}': {getattr(self, key)} is below 1; give a positive number."

    @property
    def kind(self) -> str:
        """``classification`` where there are choices, else ``generation``."""
        return "classification" if self.choices else "generation"

    @cached_property
    def fields(self) -> list[str]:
        """The fields of a row that the prompt names, also as ``row['a name']`` and ``row.get('a name')``."""
        parsed = _TEMPLATES.parse(self.prompt)
        keys = [item.arg for item in parsed.find_all(nodes.Getitem) if _is_row(item.node)]
        gets = [
            call
            for call in parsed.find_all(nodes.Call)
            if isinstance(call.node, nodes.Getattr) and call.node.attr == "get" and _is_row(call.node.node)
        ]
        keys += [argument for call in gets for argument in call.args[:1]]
        named = {key.value for key in keys if isinstance(key, nodes.Const)}
        attributes = [item.attr for item in parsed.find_all(nodes.Getattr) if _is_row(item.node)]
        named |= {name for name in attributes if not hasattr(dict, name)}  # row.get and row.items are no fields
        return sorted(meta.find_undeclared_variables(parsed) - {"row"} | named)

    def inputs(self, row: Fields) -> Fields:
        """The part of a row that the prompt names."""
        return {name: row[name] for name in self.fields if name in row}

    def as_row(self, text: str | Fields, place: str) -> Fields:
        """A row of the task's fields: a mapping as it is, a text as the one field that the prompt names.

        Raises:
            AlterError: a text, and the prompt names none or several fields.
        """
        if not isinstance(text, str):
            return text
        if len(self.fields) != 1:
            raise AlterError(
                f"{place}: task '{self.name}' reads the fields {', '.join(self.fields) or '(none)'}; give a mapping with them "
                "instead of a text."
            )
        return {self.fields[0]: text}

    @cached_property
    def opened(self) -> Source:
        """The source, ready to read."""
        class_path, arguments = str(self.source.get("class_path", "")), self.source.get("init_args") or {}
        where = f"{self.where}: task '{self.name}', key 'source'"
        if "." not in class_path:
            found = getattr(sources, class_path, None)
            if not (inspect.isclass(found) and issubclass(found, Source)):
                known = ["Files", "Hub"]
                raise AlterError(
                    f"{where}: '{class_path}' is not one of {', '.join(known)} or a dotted class_path.{did_you_mean(class_path, known)}"
                )
        else:
            found = import_name(class_path, where)
        if inspect.isclass(found) and issubclass(found, Source):
            if problems := check(found, arguments, where):
                raise AlterError(*problems)
            try:
                return found(**arguments)
            except AlterError as error:
                raise AlterError(*(f"{where}: {message}" for message in error.messages)) from error
        has_known_code = callable(found) and hasattr(found, "__qualname__")  # unlike functools.partial
        if not has_known_code:
            raise AlterError(f"{where}: '{class_path}' is neither a Source nor a function; name one.")
        try:
            inspect.signature(found).bind("train", **arguments)
        except TypeError as error:
            raise AlterError(
                f"{where}: '{class_path}' does not take these init_args ({error}); correct them."
            ) from error
        return Function(found, **arguments)

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        return {key: _TEMPLATES.from_string(getattr(self, key)) for key in ("prompt", "target")}

    def render_prompt(self, row: Fields, place: str = "") -> str:
        """Renders the prompt of a row.

        Raises:
            AlterError: the template names a field that the row does not have, or does what the sandbox forbids.
        """
        return self._render("prompt", row, place).rstrip()

    def render_target(self, row: Fields, place: str = "") -> str:
        """Renders the target of a row.

        Raises:
            AlterError: as ``render_prompt``; or the target is empty or not one of the choices.
        """
        target = self._render("target", row, place).strip()
        if not target:
            raise AlterError(
                f"{self._place(place)}: the target is empty; mend or remove the row, or mend the key 'target'."
            )
        if self.choices and target not in self.choices:
            raise AlterError(
                f"{self._place(place)}: the label '{target}' is not one of the choices; add it to choices or mend the row."
                f"{did_you_mean(target, self.choices)}"
            )
        return target

    def _render(self, key: str, row: Fields, place: str) -> str:
        try:
            return writable(self._compiled[key].render({**row, "row": row}))
        except UndefinedError as error:
            # "'x' is undefined", or of row['x']: "'dict object' has no attribute 'x'"
            name = (re.findall(r"'([^']*)'", str(error)) or [""])[-1]
            raise AlterError(
                f"{self._place(place)}, key '{key}': the template names '{name}', which is not a field of the row; its fields "
                f"are {', '.join(map(str, row))}.{did_you_mean(name, map(str, row))}"
            ) from error
        except SecurityError as error:
            raise AlterError(
                f"{self._place(place)}, key '{key}': the sandbox forbids this template ({error})."
            ) from error
        except Exception as error:  # a filter given what it cannot take, a division by zero
            raise AlterError(
                f"{self._place(place)}, key '{key}': the template fails on this row ({error}); mend it."
            ) from error

    def _place(self, place: str) -> str:
        return f"{self.where}: task '{self.name}'" + (f", {place}" if place else "")

    @classmethod
    def from_dict(cls, mapping: Any, where: str, folder: Path | None = None, root: str | None = None) -> Task:
        """Makes a task from YAML's mapping.

        Args:
            mapping: the task's keys.
            where: the file, for messages.
            folder: that the paths of a Files source start from.
            root: the recipe's ``data.root``, where they are looked for first.

        Raises:
            AlterError: with every mistake found.
        """
        if not isinstance(mapping, Mapping):
            raise AlterError(f"{where}: a task is a mapping with name, source, prompt and target, not {mapping!r}.")
        given = {key: value for key, value in mapping.items() if value is not None}  # an empty key is the default
        mapping = {"where": where, **copy.deepcopy(given)}
        # from Python or a flag, where a choice such as `yes` or `1` may be no string; a file's are, by `read_yaml`
        if isinstance(mapping.get("choices"), list):
            names = {True: "yes", False: "no"}
            mapping["choices"] = [names[c] if isinstance(c, bool) else str(c) for c in mapping["choices"]]
        if hasattr(mapping.get("source"), "as_dict"):  # jsonargparse hands class_path on in a type of its own
            mapping["source"] = mapping["source"].as_dict()
        label = f"{where}: task '{mapping.get('name', '?')}'"
        problems = check(cls, {key: value for key, value in mapping.items() if key != "where"}, label, skip=("where",))
        source = mapping.get("source")
        if isinstance(source, dict) and _is_files(str(source.get("class_path"))):
            arguments = source.get("init_args") or {}
            if not isinstance(arguments, dict):
                raise AlterError(
                    *problems, f"{label}, key 'source': init_args is a mapping of arguments, not {arguments!r}."
                )
            if folder is not None:
                arguments = {"folder": str(folder.resolve()), **arguments}
            if root is not None:
                arguments = {**arguments, "root": str(Path(root).expanduser().resolve())}
            source["init_args"] = arguments
        if problems:
            raise AlterError(*problems)
        return cls(**mapping)

    @classmethod
    def from_run(cls, mapping: dict[str, Any], where: str) -> Task:
        """Makes a task from the recipe that a run has written, whose types have been checked, which takes long.

        Raises:
            AlterError: a key is unknown or missing, or a value makes no sense, after an edit by hand.
        """
        try:
            return cls(**{"where": where, **mapping})
        except TypeError:
            return cls.from_dict(mapping, where)

    @classmethod
    def from_file(cls, file: Path, root: str | None = None) -> Task:
        """Reads a task's YAML file; ``root`` as for ``from_dict``.

        Raises:
            AlterError: it cannot be read, or has mistakes.
        """
        content = read_yaml(file)
        if isinstance(content, Mapping) and "where" in content:  # a run's recipe has it
            raise AlterError(
                f"{file}: unknown key 'where'; rows are left out of the data file, or by a function as the source."
            )
        return cls.from_dict(content, str(file), file.parent, root)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``from_dict`` takes back."""
        content = asdict(self)
        if self.shots is None:  # as before there was it
            del content["shots"]
        return content


def load_tasks(entries: Sequence[str | dict[str, Any] | Task], folder: Path, root: str | None = None) -> list[Task]:
    """Makes the tasks of a mixture.

    Args:
        entries: paths of task files (``*`` allowed) relative to ``folder`` or to where we are, or tasks themselves.
        folder: of the recipe.
        root: the recipe's ``data.root``, where data files are looked for first.

    Raises:
        AlterError: with the mistakes of all tasks.
    """
    tasks, problems = [], list[str]()
    for entry in entries:
        try:
            if isinstance(entry, Task):
                tasks.append(entry)
            elif isinstance(entry, str):
                tasks += [Task.from_file(file, root) for file in _task_files(entry, folder)]
            else:
                tasks.append(
                    Task.from_dict(
                        entry,
                        str(entry.get("where", "data.tasks")) if isinstance(entry, dict) else "data.tasks",
                        folder,
                        root,
                    )
                )
        except AlterError as error:
            problems += error.messages
    for task in tasks:
        try:
            _ = task.opened
        except AlterError as error:
            problems += error.messages
    names = [task.name for task in tasks]
    problems += [
        f"data.tasks: two tasks are named '{name}'; give each its own name."
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    if problems:
        raise AlterError(*problems)
    return tasks


def _is_row(node: nodes.Node) -> bool:
    """Whether a template's expression is the row as a whole."""
    return getattr(node, "name", "") == "row"


def _is_files(class_path: str) -> bool:
    """Whether a source is ``Files``, by whichever of its names; nothing is imported, since a task may come from elsewhere."""
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module or sources.__name__), name, None) is sources.Files


def limit_problems(limit: Mapping[str, int], where: str) -> Iterator[str]:
    """What is wrong with the most rows of each split."""
    for split, rows in limit.items():
        if split not in SPLITS:
            yield f"{where}: '{split}' is not a split; splits are {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
        elif rows < 1:
            yield f"{where}: {split} is {rows}, below 1; give the most rows of the split."


def _task_files(entry: str, folder: Path) -> list[Path]:
    for base in (folder, Path()):
        if found := sorted(glob.glob(str(Path(glob.escape(str(base))) / entry))):
            return [Path(name) for name in found]
    near = [os.path.relpath(p, folder) for p in (folder / entry).parent.glob("*.yaml")]
    raise AlterError(
        f"data.tasks: there is no task file '{entry}' in {folder}; correct the path.{did_you_mean(entry, near)}"
    )
