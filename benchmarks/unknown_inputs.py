"""How many inputs of another domain a run reports as not clear, instead of guessing a task.

python benchmarks/unknown_inputs.py RUN FILE:COLUMN [FILE:COLUMN ...]
"""

import argparse
import random
from itertools import islice
from pathlib import Path

import alter
from alter.data.files import read_file

ROWS = 200  # of each file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("texts", nargs="+", metavar="FILE:COLUMN")
    arguments = parser.parse_args()
    model = alter.load(arguments.run)
    for given in arguments.texts:
        file, _, column = given.rpartition(":")
        texts = [str(row[column]) for row in islice(read_file(Path(file)), 100_000)]
        drawn = random.Random(13).sample(texts, min(ROWS, len(texts)))
        unclear = [found.task is None for found in model.guess(drawn)]
        print(f"{sum(unclear) / len(unclear):>6.1%} of {len(unclear)} not clear: {given}")


if __name__ == "__main__":
    main()
