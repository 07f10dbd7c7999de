"""A run's model as one folder for the Hugging Face hub, which ``alter.load`` reads too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from alter.card import model_card, published
from alter.data import Task
from alter.guess import TASK_PREDICTOR_FILE
from alter.loading import CALIBRATION_FILE, answered_tasks, model_folder, run_recipe
from alter.nn.files import CONFIG_FILE, WEIGHTS_FILE, read_config
from alter.writing import made_whole, write_json
from alter.yaml_file import dump

USAGE = """
```
pip install -c constraints.txt -e .  # in a checkout of ALTER
hf download OWNER/NAME --local-dir model
```

```python
import alter

model = alter.load("model")
print({call})
```
"""


def publish(run: Path, out: Path, stage: str | None = None) -> None:
    """Writes adapters, calibration, tasks, results and a model card into one new folder.

    Args:
        run: a run folder, or one that was written so before.
        out: a folder, new or empty.
        stage: whose model; by default that of the last, which alone has results.

    Raises:
        AlterError: ``run`` holds no finished run, or ``out`` holds something.
    """
    content = run_recipe(run)
    with made_whole(out) as beside:
        _publish(run, beside, content, stage)


def _publish(run: Path, out: Path, content: dict[str, Any], stage: str | None) -> None:
    folder = model_folder(run, stage)
    config, names = read_config(folder), answered_tasks(run, folder)
    # in an earlier stage's model a task that was removed later is not marked so
    removed = [name for name in config["tasks"] if name not in names]
    write_json(out / CONFIG_FILE, {**config, "retired": removed})
    for name in (WEIGHTS_FILE, CALIBRATION_FILE, TASK_PREDICTOR_FILE):
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    if not stage and (run / "results.json").is_file():
        shutil.copy(run / "results.json", out / "results.json")
    tasks = [task for task in content["data"]["tasks"] if task["name"] in names]
    write_recipe(out, content, tasks)
    first = Task.from_dict(tasks[0], str(run / "recipe.yaml"))
    call = f"model.{example_call(first, named=True)}"
    model_card(run, USAGE.replace("{call}", call), names, measured=not stage).save(out / "README.md")


def example_call(task: Task, named: bool = False) -> str:
    """How Python asks for a task's answer, for a card."""
    given = '"..."' if len(task.fields) == 1 else "{" + ", ".join(f'"{field}": "..."' for field in task.fields) + "}"
    return f"{'classify' if task.choices else 'generate'}([{given}]{f', task={task.name!r}' if named else ''})"


def write_recipe(out: Path, content: dict[str, Any], tasks: list[dict[str, Any]]) -> None:
    """Writes the part of a recipe that loading reads, without what only this machine's owner should know."""
    tasks = [{**task, "where": "recipe.yaml", "source": published(task["source"])} for task in tasks]
    kept: dict[str, Any] = {key: content[key] for key in ("precision", "generation") if key in content}
    text = dump({**kept, "data": {"tasks": tasks}})
    (out / "recipe.yaml").write_text(text, encoding="utf-8")
