"""Puts the comparisons kept under benchmarks/results/compare/NAME.json into docs/results.md, between its markers.

    python benchmarks/results_page.py [runs/compare/NAME ...]

A folder of `alter compare` is copied there first.
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


def main():
    """Copies what is named, and renders the page."""
    KEPT.mkdir(parents=True, exist_ok=True)
    for folder in map(Path, sys.argv[1:]):
        shutil.copy(folder / "compare.json", KEPT / f"{folder.resolve().name}.json")
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
