"""Keeps comparisons under benchmarks/results/compare/, and puts their tables between the markers of docs/results*.md.

    python benchmarks/results_page.py [runs/compare/NAME ...]
    python benchmarks/results_page.py --restore runs/compare/NAME

Of a folder of `alter compare`, what is complete is kept as numbers: compare.json, and of each cell what it measured. A grid
that takes longer than a machine can be had goes on elsewhere from there: --restore puts the cells back, and the same
command runs the others. Answers, which may hold texts of the data, stay where they were written.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean

from alter import pictures
from alter.compare.cell import cell_folder
from alter.compare.summary import Answers, against, over_seeds
from alter.compare.tables import markdown
from alter.writing import write_json

HERE = Path(__file__).parent
KEPT = HERE / "results" / "compare"
PAGES = [HERE.parent / "docs" / name for name in ("results.md", "results_tried.md")]


PICTURED = "all_blocks_longer"  # whose gates the page shows
NUMBERS = ("cell.json", "trained.json", "validation.json", "test.json", "validation.npz", "test.npz")  # of a cell


def main():
    """Keeps or restores what is named, and renders the page."""
    restore = sys.argv[1:2] == ["--restore"]
    for folder in map(Path, sys.argv[2 if restore else 1 :]):
        kept = KEPT / folder.resolve().name
        if restore:
            copy_cells(kept, folder)
            continue
        copy_cells(folder, kept)
        if (folder / "compare.json").is_file():
            shutil.copy(folder / "compare.json", kept.with_suffix(".json"))
    if not restore:
        render()


def copy_cells(source, target):
    """Copies the numbers of complete cells."""
    for done in sorted(source.glob("cells/*/*/t*.json")):  # test.json or trained.json
        cell = target / done.parent.relative_to(source)
        cell.mkdir(parents=True, exist_ok=True)
        for name in NUMBERS:
            if (done.parent / name).is_file():
                shutil.copy(done.parent / name, cell / name)


def completed(file):
    """A kept comparison, with what the `alter compare` of its day did not tell, from its kept cells."""
    result = json.loads(file.read_text())
    split, folder = result["split"], file.with_suffix("")
    if not folder.is_dir():
        return result
    cells = {
        name: {seed: cell_folder(folder, name, seed, method["learning_rate_factor"]) for seed in result["seeds"]}
        for name, method in result["methods"].items()
    }
    answers, tasks = Answers(cells, result["primary_metrics"], split), list(result["primary_metrics"])
    for key, other in (("vs_best_baseline", result["best_baseline"]), ("vs_two_stage", "two_stage")):
        for name, difference in against(other, cells, answers, tasks).items():
            result["methods"][name][key] = difference
    for name, own in cells.items():
        losses = [json.loads((cell / f"{split}.json").read_text()).get("validation_loss") for cell in own.values()]
        result["methods"][name]["validation_loss"] = over_seeds(fmean, losses)
    write_json(file, result)
    return result


def render():
    """Puts every kept comparison into the page that has a place for it."""
    pages = {page: page.read_text() for page in PAGES}
    for file in sorted(KEPT.glob("*.json")):
        marked = re.compile(rf"(<!-- {file.stem} -->\n).*?(<!-- end -->)", flags=re.S)
        page = next((page for page, text in pages.items() if marked.search(text)), None)
        if page is None:
            sys.exit(f"No page has a place for {file.name}: write a line <!-- {file.stem} --> and a line <!-- end -->.")
        table = markdown(completed(file))
        pages[page] = marked.sub(lambda m, t=table: f"{m[1]}{t}{m[2]}", pages[page])
    for page, text in pages.items():
        page.write_text(text)
    draw_gates(json.loads((KEPT / f"{PICTURED}.json").read_text()))


def draw_gates(result):
    """Who answers whom in every block after two stages: selectors and gates."""
    tasks = list(result["primary_metrics"])
    for kind, layers in result["methods"]["two_stage"]["routing"].items():
        blocks = {f"block {number}": gates for number, gates in enumerate(layers.values())}
        columns = [str(expert) for expert in range(len(next(iter(blocks.values()))[0]))]
        darkest = max(max(row) for gates in blocks.values() for row in gates)
        figure = pictures.heatmaps(blocks, tasks, columns, numbers=None, top=darkest, cell=pictures.SMALL_CELL)
        (PAGES[0].parent / f"results_{kind}.svg").write_text(pictures.svg(figure))


if __name__ == "__main__":
    main()
