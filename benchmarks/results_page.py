"""Keeps comparisons under benchmarks/results/compare/, and puts their tables into docs/results.md, between its markers.

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

from alter.compare.tables import markdown

HERE = Path(__file__).parent
KEPT = HERE / "results" / "compare"
PAGE = HERE.parent / "docs" / "results.md"


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


def render():
    """Puts every kept comparison into the page."""
    page = PAGE.read_text()
    for file in sorted(KEPT.glob("*.json")):
        marked = rf"(<!-- {file.stem} -->\n).*?(<!-- end -->)"
        if not re.search(marked, page, flags=re.S):
            sys.exit(f"{PAGE} has no place for {file.name}: write a line <!-- {file.stem} --> and a line <!-- end -->.")
        table = markdown(json.loads(file.read_text()))
        page = re.sub(marked, lambda m, t=table: f"{m[1]}{t}{m[2]}", page, flags=re.S)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
