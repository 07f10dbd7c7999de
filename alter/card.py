"""Model cards: what the model does, what it was trained on and under which licences, how well it does, and its limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from alter.data import Task
from alter.loading import model_folder, run_recipe
from alter.nn.embedded import EMBEDDED
from alter.nn.files import read_config
from alter.schema import foreign_module

ALTER = "alter-mta"  # the library, as the hub names them
UNKNOWN = "not stated in the task file"
PLACES = ("folder", "root")  # arguments of a source that name folders of the machine it was trained on
FILES = ("train", "validation", "test")  # those that name files, or say a share


def model_card(
    run: Path, usage: str, tasks: Sequence[str] | None = None, library: str = ALTER, measured: bool = True
) -> ModelCard:
    """Writes the card of a model from what its run folder holds.

    Args:
        run: a run folder, or one that ``save_pretrained`` wrote.
        usage: Markdown that says how to load what the card is for.
        tasks: the tasks that it does; by default all.
        library: that loads it, as the hub names libraries.
        measured: whether the card is for the model that the run's results are of, and not for an earlier stage's.

    Returns:
        a card with the metadata that the hub reads: base model, licences, tasks and metrics.

    Raises:
        AlterError: the folder holds no finished run.
    """
    content, config = run_recipe(run), read_config(model_folder(run))
    all_tasks = [Task.from_dict(entry, str(run / "recipe.yaml")) for entry in content["data"]["tasks"]]
    chosen = [task for task in all_tasks if task.name in (tasks or config["tasks"])]
    results = _results(run) if measured else {}
    stages = " in two stages" if measured and config["num_shared"] else ""
    backbone = _backbone(str(config["backbone"]["name"]))
    measurements = list(_metric_table(chosen, results))
    name = f"{run.resolve().name}: " + (chosen[0].name if len(chosen) == 1 else f"{len(chosen)} tasks")
    data = ModelCardData(
        base_model=backbone if "/" in backbone else None,
        license="other",  # the backbone's, and each task's data's: the card's table
        license_name="backbone-and-data",
        library_name=library,
        pipeline_tag="text-generation",
        tags=["alter", "mixture-of-task-adapters"],
        model_name=name,
        eval_results=list(_eval_results(chosen, results)) or None,
    )
    parts = [
        f"# {name}",
        f"A small language model for {_list(task.name for task in chosen)}: `{backbone}` with task adapters that were "
        f"trained{stages} by [ALTER](https://arxiv.org/abs/2309.11042).",
        "## How to use it",
        usage.strip(),
        "## Tasks and data",
        "\n".join(_task_table(chosen)),
        "Read each licence at its source before you pass the model on. The backbone has a licence of its own"
        + (f" ({EMBEDDED[n].licence})." if (n := str(config["backbone"]["name"])) in EMBEDDED else "."),
        "## Metrics",
        "\n".join(measurements) or f"Not measured{'; `alter test` does' if measured else ' by itself'}.",
        "## Intended use",
        "Short answers to inputs of the kinds above, in the form of the prompts below, checked by somebody who can judge them.",
        "\n".join(line for task in chosen for line in (f"`{task.name}`:", "```", task.prompt.rstrip(), "```")),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(chosen, library, bool(measurements))),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _limits(tasks: Sequence[Task], library: str, measured: bool) -> Iterator[str]:
    only = (
        "It was measured on the test rows of the data above alone"
        if measured
        else "It learned from the data above alone"
    )
    yield f"{only}; other wording, other languages and other tasks are not what it was trained for."
    if any(task.choices for task in tasks):
        yield (
            "A classification always names one of its choices, also where none fits; its probabilities are calibrated on "
            "validation rows and mean little for inputs of another kind."
            if library == ALTER
            else "Outside ALTER it writes its answer to a classification and does not choose, so an answer may be none of the "
            "choices."
        )
    yield "A generated answer may be wrong and still read well. It is no medical, legal or financial advice."
    yield "What the backbone has learnt from its own training data, biases included, is in it."


def _backbone(name: str) -> str:
    """The backbone's name on the hub where it has one; the last part of a folder's."""
    if name in EMBEDDED:
        return EMBEDDED[name].hub_id
    folder = Path(name).is_absolute() or Path(name).is_dir() or name.count("/") != 1
    return Path(name).name if folder else name


def _results(run: Path) -> dict[str, Any]:
    file = run / "results.json"
    return json.loads(file.read_text())["tasks"] if file.is_file() else {}


def _eval_results(tasks: Sequence[Task], results: Mapping[str, Any]) -> Iterator[EvalResult]:
    for task in tasks:
        for metric, entry in results.get(task.name, {}).items():
            yield EvalResult(
                task_type="text-classification" if task.choices else "text-generation",
                dataset_type=task.name,
                dataset_name=task.name,
                dataset_split="test",
                metric_type=metric,
                metric_value=round(entry["value"], 4),
            )


def _task_table(tasks: Sequence[Task]) -> Iterator[str]:
    yield "| task | kind | rows from | licence of the data |"
    yield "|---|---|---|---|"
    for task in tasks:
        kind = f"classification, {len(task.choices)} choices" if task.choices else "generation"
        yield f"| {task.name} | {kind} | {_cell(_origin(task))} | {_cell(task.license or UNKNOWN)} |"


def _origin(task: Task) -> str:
    """Where the rows come from, as the published recipe tells."""
    source = published(task.source)
    arguments = source.get("init_args") or {}
    named = [str(value) for key, value in arguments.items() if key in ("train", "path", "name") and value]
    return " ".join([str(source.get("class_path", "")), *named])


def _is_place(path: Any) -> bool:
    return isinstance(path, str) and (path.startswith(("/", ".", "~")) or "\\" in path or Path(path).is_dir())


def published(source: dict[str, Any]) -> dict[str, Any]:
    """A source with files by name alone; of one that is not ALTER's, whose arguments may say anything, no more than its name."""
    if foreign_module(source):
        return {"class_path": source["class_path"]}
    arguments = {key: value for key, value in (source.get("init_args") or {}).items() if key not in PLACES}
    names = {key: Path(arguments[key]).name for key in FILES if isinstance(arguments.get(key), str)}
    if _is_place(arguments.get("path")):  # of a data set's folder, where a hub has ``owner/name``
        names["path"] = Path(arguments["path"]).name
    return {**source, "init_args": {**arguments, **names}}


def _metric_table(tasks: Sequence[Task], results: Mapping[str, Any]) -> Iterator[str]:
    if not any(task.name in results for task in tasks):
        return
    yield "On the test rows, with 95% bootstrap intervals over them; the references answer the same rows."
    yield ""
    yield "| task | metric | this model | rows | majority class | untouched backbone | TF-IDF + logistic regression |"
    yield "|---|---|---|---|---|---|---|"
    for task in tasks:
        for metric, entry in results.get(task.name, {}).items():
            beside = [entry["references"].get(name) for name in ("majority", "backbone", "tfidf")]
            values = ["-" if found is None else f"{found['value']:.3f}" for found in beside]
            own = f"**{entry['value']:.3f}** [{entry['low']:.3f}, {entry['high']:.3f}]"
            yield f"| {task.name} | {metric} | {own} | {entry['n']} | {' | '.join(values)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _list(names: Iterator[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
