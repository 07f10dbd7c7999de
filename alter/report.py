"""``report.html``: one file about a run, and its pictures as PNG; drawn from the files in the run folder alone."""

from __future__ import annotations

import csv
import html
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from alter import markup, pictures
from alter.data import MultiTaskDataModule
from alter.inside import expert_similarity, gates_by_task
from alter.loading import load, still_answered
from alter.metrics import metric
from alter.predict import Predictor
from alter.results import REFERENCES, marked, spoken
from alter.run_folder import ADDED, records
from alter.writing import write_json, write_text
from alter.yaml_file import dump

WORST = 10
ANSWERS, INSIDE, REPORT, PICTURES = "answers.jsonl", "inside.json", "report.html", "report"
JOINING = {"added": "training", "tested": "test", "consolidated": "stage 2 again, and the test of all"}
KINDS = {
    "stage1": "The task experts, after stage 1",
    "experts": "The task experts, at the end",
    "shared": "The task experts' mixture and the shared experts, at the end",
}


def look_inside(
    run: Path, predictor: Predictor, data: MultiTaskDataModule, answers: Mapping[str, Sequence[str]]
) -> None:
    """Writes what a report needs beside the results: ``answers.jsonl`` and ``inside.json``.

    Args:
        run: the run folder.
        predictor: the trained model.
        data: set up.
        answers: to the test rows, by task.
    """
    with (run / ANSWERS).open("w", encoding="utf-8") as stream:
        for task, answered in answers.items():
            rows = data.examples(task, "test")
            for prompt, target, answer in zip(rows["prompt"], rows["target"], answered, strict=True):
                row = {"task": task, "prompt": prompt, "target": target, "answer": answer}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    routing, similarity = gates_by_task(predictor, data), expert_similarity(predictor, data)
    write_json(run / INSIDE, {**_trained_mixture(run, data), "routing": routing, "similarity": similarity})


def look_at_stage1(run: Path, data: MultiTaskDataModule, backbone: str) -> None:
    """Adds to ``inside.json`` how stage 1's model routes, where a second stage went on from it.

    Args:
        run: the run folder, which ``look_inside`` has written to.
        data: set up.
        backbone: its folder.
    """
    found = json.loads((run / INSIDE).read_text(encoding="utf-8"))
    trained_first = run / "stage1" / "model"
    if "shared" in found["routing"] and trained_first.is_dir() and still_answered(run, trained_first):
        first = load(run, backbone, stage="stage1")
        found["stage1"] = {"tasks": first.tasks, "routing": gates_by_task(first, data)["experts"]}
        write_json(run / INSIDE, found)


def _trained_mixture(run: Path, data: MultiTaskDataModule) -> dict[str, Any]:
    """What the stages drew from; by the run's notes, since tasks may have joined or left since then."""
    before = run / INSIDE  # notes of older runs do not have it
    for noted in (records(run).get("data", {}), json.loads(before.read_text()) if before.is_file() else {}):
        if "mixture" in noted:
            return {key: noted[key] for key in ("mixture", "draws")}
    return data.mixture()


def write_report(run: Path) -> Path:
    """Draws the pictures and writes the page.

    Args:
        run: the folder of a tested run.

    Returns:
        the page.
    """
    report = _Report(run)
    text = markup.page(f"Run {run.resolve().name}", list(report.parts()))
    file = run / REPORT
    write_text(file, text)
    return file


class _Report:
    """The parts of the page."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        self.results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        self.progress, environment = records(run), run / "env.txt"  # a copied run may have left them behind
        self.inside = json.loads((run / INSIDE).read_text(encoding="utf-8"))
        self.environment = environment.read_text(encoding="utf-8") if environment.is_file() else "not known"
        self.tasks = {task["name"]: task for task in self.recipe["data"]["tasks"]}
        steps = {name: records(run / ADDED / name) for name in self.tasks}
        self.joined = {name: known for name, known in steps.items() if "added" in known}  # later, by add-task
        self.answers: dict[str, list[dict[str, str]]] = {}
        with (run / ANSWERS).open(encoding="utf-8") as stream:
            for row in map(json.loads, stream):
                self.answers.setdefault(row["task"], []).append(row)
        (run / PICTURES).mkdir(exist_ok=True)

    def parts(self) -> Iterator[str]:
        """The page from top to bottom."""
        sections: dict[str, Callable[[], Iterable[str]]] = {
            "Summary": self.summary,
            "Results": self.metrics,
            "Learning curves": self.curves,
            "Mixture": self.mixture,
            "Tasks that joined later": self.newcomers,
            "Routing": self.routing,
            "Similarity of the experts": self.similarity,
            "Confusion": self.confusion,
            "Worst answers": self.worst,
            "Parameters, time and memory": self.costs,
            "Recipe": lambda: [_text("recipe.yaml", dump(self.recipe))],
            "Environment": lambda: [_text("env.txt", self.environment)],
        }
        made = {title: list(section()) for title, section in sections.items()}
        made = {title: parts for title, parts in made.items() if parts}
        links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in made)
        yield f"<nav>{links}</nav>"
        for title, parts in made.items():
            yield f'<h2 id="{_anchor(title)}">{title}</h2>'
            yield from parts

    def summary(self) -> Iterator[str]:
        firsts = [next(iter(metrics.values())) for metrics in self.results["tasks"].values()]
        above = [self._clear(name) for name in REFERENCES]
        total = sum(seconds or 0.0 for seconds in self.results["seconds"].values())
        yield markup.bullets(
            [
                f"{len(self.tasks)} task{'s' if len(self.tasks) > 1 else ''} on {self.recipe['backbone']} ({self.recipe['precision']}).",
                f"Mean of the tasks' first metrics on the test split: {fmean(entry['value'] for entry in firsts):.3f}.",
                *filter(None, above),
                f"{self.results['trainable_parameters']:,} parameters trained, {total / 60:.1f} minutes in all, "
                f"{self.results['peak_memory_bytes'] / 2**30:.1f} GiB of memory at the peak.",
                *(
                    f"{name} joined later: {known['added']['trainable_parameters']:,} parameters trained in "
                    f"{known['added']['seconds'] / 60:.1f} minutes."
                    for name, known in self.joined.items()
                ),
            ]
        )

    def _clear(self, reference: str) -> str:
        """In how many tasks the model is above a reference by its first metric."""
        pairs = []
        for metrics in self.results["tasks"].values():
            entry = next(iter(metrics.values()))
            if (other := entry["references"].get(reference)) is not None:
                pairs.append((entry, other))
        if not pairs:
            return ""
        higher = sum(entry["value"] > other["value"] for entry, other in pairs)
        apart = sum(entry["low"] > other["high"] for entry, other in pairs)
        return f"Above {spoken(reference)} in {higher} of {len(pairs)} tasks, in {apart} with intervals apart."

    def metrics(self) -> Iterator[str]:
        head = ["task", "metric", "rows", "model", "95% interval", *REFERENCES.values()]
        rows = []
        for task, metrics in self.results["tasks"].items():
            for name, entry in metrics.items():
                others = [marked(entry, reference) for reference in REFERENCES]
                interval = f"{entry['low']:.3f} to {entry['high']:.3f}"
                rows.append([task, name, f"{entry['n']:,}", f"**{entry['value']:.3f}**", interval, *others])
        yield markup.table(head, rows)
        yield "<p>References on the same rows. * above the model; ~ the intervals overlap.</p>"

    def curves(self) -> Iterator[str]:
        lines: dict[str, list[tuple[float, float]]] = {}
        start, begins, stages = 0, None, [stage for stage in ("stage1", "stage2") if stage in self.progress]
        for stage in stages:
            if stage == "stage2" and start:
                begins = float(start)
            logged = _logged(self.run / stage / "metrics.csv")
            for name, points in logged.items():
                lines.setdefault(name, []).extend((start + step, value) for step, value in points)
            start += 1 + max((step for points in logged.values() for step, _ in points), default=0)
        both = {"_training": lines.get("train/loss", []), "validation": lines.get("val/loss", [])}
        tasks = {
            name.removeprefix("val/loss/"): points for name, points in lines.items() if name.startswith("val/loss/")
        }
        panels = {"loss per target token": both, "validation loss by task": tasks}
        panels = {
            title: {n: p for n, p in found.items() if p} for title, found in panels.items() if any(found.values())
        }
        if panels:
            yield self._picture("learning_curves", pictures.curves(panels, begins))

    def mixture(self) -> Iterator[str]:
        mixture = self.inside["mixture"]
        rows = [
            [
                name,
                task["kind"],
                *(f"{task[split]:,}" for split in ("train", "validation", "test")),
                f"{task['rate']:.1%}",
            ]
            for name, task in mixture.items()
        ]
        yield markup.table(["task", "kind", "train", "validation", "test", "share of the draws"], rows)
        title = f"share of {self.inside['draws']:,} draws an epoch, temperature {self.recipe['data']['temperature']:g}"
        yield self._picture("mixture", pictures.bars({name: task["rate"] for name, task in mixture.items()}, title))

    def newcomers(self) -> Iterator[str]:
        if not self.joined:
            return
        head = ["task", "kind", "train", "validation", "test", "draws", "validation loss"]
        rows = []
        for name, known in self.joined.items():
            facts = known["added"]
            counts = [f"{facts[key]:,}" if key in facts else "-" for key in ("train", "validation", "test", "draws")]
            loss = facts.get("validation_loss")
            rows.append([name, self._kind(name), *counts, "-" if loss is None else f"{loss:.3f}"])
        yield markup.table(head, rows)
        yield "<p>Each trained by itself, beside the tasks of the mixture, which stayed as they were.</p>"
        for name in self.joined:
            file = self.run / ADDED / name / "metrics.csv"
            logged = _logged(file)
            lines = {"_training": logged.get("train/loss"), "validation": logged.get("val/loss")}
            if drawn := {line: points for line, points in lines.items() if points}:
                yield self._picture(f"added_{name}", pictures.curves({f"{name}, loss per target token": drawn}, None))

    def _kind(self, name: str) -> str:
        return "classification" if self.tasks[name]["choices"] else "generation"

    def routing(self) -> Iterator[str]:
        found = {kind: (list(self.tasks), layers) for kind, layers in self.inside["routing"].items()}
        if first := self.inside.get("stage1"):
            found = {"stage1": (first["tasks"], first["routing"]), **found}
        for kind, (tasks, layers) in found.items():
            count = len(next(iter(layers.values()))[0])
            columns = ["e", *map(str, range(1, count))] if kind == "shared" else [str(i) for i in range(count)]
            own = "Expert 0 started as the first task's own, and so on." if count == len(tasks) else ""
            yield f"<h3>{KINDS[kind]}</h3>"
            yield self._picture(
                f"routing_{kind}",
                pictures.heatmaps(_by_block(layers), tasks, columns),
                "Mean gate of each task (rows) on each expert (columns), a picture a layer, on validation examples. "
                + ("Column e is the mixture of the task experts." if kind == "shared" else own),
            )

    def similarity(self) -> Iterator[str]:
        for kind, layers in self.inside["similarity"].items():
            names = [str(i) for i in range(len(next(iter(layers.values()))))]
            yield f"<h3>{'Task experts' if kind == 'experts' else 'Shared experts'}</h3>"
            yield self._picture(
                f"similarity_{kind}",
                pictures.heatmaps(_by_block(layers), names, names),
                "Mean cosine of what two experts add to the same tokens; below 0 is drawn as 0.",
            )

    def confusion(self) -> Iterator[str]:
        for name, rows in self.answers.items():
            if self.tasks[name]["choices"]:
                drawn = pictures.confusion([row["target"] for row in rows], [row["answer"] for row in rows])
                yield markup.folded(name, self._picture(f"confusion_{name}", drawn), opened=True)

    def worst(self) -> Iterator[str]:
        for name, rows in self.answers.items():
            found = worst_answers(rows, next(iter(self.results["tasks"][name])), self.tasks[name]["choices"])
            if found:
                cells = [[row["prompt"], row["target"], row["answer"], f"{score:.2f}"] for score, row in found]
                head = ["prompt", "right", "answered", next(iter(self.results["tasks"][name]))]
                yield markup.folded(f"{name}: {len(found)}", markup.table(head, cells, long=True), opened=True)

    def costs(self) -> Iterator[str]:
        rows = [_cost(step, record) for step, record in self.progress.items()]
        peak = self.results["peak_memory_bytes"] / 2**30
        rows.append(["test", f"{self.results['seconds']['test'] or 0:,.0f}", "-", "-", "-", f"{peak:.2f}"])
        for name, known in self.joined.items():
            rows += [_cost(f"{name}, {said}", known[step]) for step, said in JOINING.items() if step in known]
        head = ["step", "seconds", "parameters trained", "tokens", "tokens/s", "peak memory so far, GiB"]
        yield markup.table(head, rows)
        if self.results.get("peak_device_memory_bytes"):
            yield f"<p>Peak device memory: {self.results['peak_device_memory_bytes'] / 2**30:.2f} GiB.</p>"

    def _picture(self, name: str, figure: Any, caption: str = "") -> str:
        pictures.save(figure, self.run / PICTURES / f"{name}.png")
        return markup.figure(pictures.svg(figure), caption)


def _logged(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every metric in a log, which a stage without steps does not have."""
    lines: dict[str, list[tuple[int, float]]] = {}
    if not file.is_file():
        return lines
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            lines.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
    return lines


def _cost(step: str, record: Mapping[str, Any]) -> list[str]:
    """A row of the table of costs."""
    trained, tokens = record.get("trainable_parameters"), record.get("tokens")
    memory, rate = record.get("peak_memory_bytes"), (tokens or 0) / (record.get("step_seconds") or 1)
    return [
        step,
        f"{record['seconds']:,.0f}",
        f"{trained:,}" if trained else "-",
        f"{tokens:,}" if tokens else "-",
        f"{rate:,.0f}" if tokens else "-",
        f"{memory / 2**30:.2f}" if memory else "-",
    ]


def worst_answers(
    rows: Sequence[Mapping[str, str]], name: str, choices: Sequence[str] | None
) -> list[tuple[float, Mapping[str, str]]]:
    """The rows that score lowest on a metric, of equals those whose mistake is made most often; none that is right.

    Args:
        rows: with ``target`` and ``answer``.
        name: of the metric; of a recall, accuracy stands for it.
        choices: of a classification.

    Returns:
        score and row, at most ten.
    """
    single = "accuracy" if choices else name
    scores = [metric(single, [row["answer"]], [row["target"]], choices).value() for row in rows]
    mistakes = Counter((row["target"], row["answer"]) for row in rows)
    wrong = [(score, row) for score, row in zip(scores, rows, strict=True) if score < 1.0]
    return sorted(wrong, key=lambda pair: (pair[0], -mistakes[pair[1]["target"], pair[1]["answer"]]))[:WORST]


def _by_block(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers under short names: ``model.layers.18.mlp`` is ``18`` where no other has this number."""
    short = {name: next((part for part in reversed(name.split(".")) if part.isdigit()), name) for name in layers}
    if len(set(short.values())) < len(short):  # an encoder and a decoder
        short = {name: f"{name.split('.')[0]} {number}" for name, number in short.items()}
    if len(set(short.values())) < len(short):
        short = {name: name for name in layers}
    return {f"layer {short[name]}": table for name, table in layers.items()}


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-").replace(",", "")


def _text(name: str, text: str) -> str:
    return markup.folded(name, f"<pre>{html.escape(text)}</pre>")
