"""Made-up rows with the columns of the public data sets that docs/data.md names, so that its commands can be run."""

import random
import re
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from alter.shipped import shipped_recipes

TASKS = shipped_recipes() / "tasks"
WORDS = [f"w{i}" for i in range(60)]


@cache
def _choices(task):
    (file,) = TASKS.rglob(f"{task}.yaml")
    return yaml.safe_load(file.read_text())["choices"]


def words_of_tasks(pages):
    """The words of the shipped task files, their prompts and choices among them, and of some pages, which write others."""
    files = [*TASKS.rglob("*.yaml"), *pages]
    return sorted({word for file in files for word in re.findall(r"\w+|[^\w\s]+", file.read_text())})


def _text(draw, length=8):
    return " ".join(draw.choices(WORDS, k=length))


def _entities(draw, *types):
    return [{"type": kind, "text": draw.choice(WORDS)} for kind in types]


def _labelled(task, **columns):
    choices = _choices(task)
    return lambda draw, i: {
        **{c: _text(draw) for c in columns.get("texts", ["text"])},
        columns["label"]: choices[i % len(choices)],
    }


ROWS = {
    "medical/pubmedqa": _labelled("pubmedqa", texts=["question", "context"], label="label"),
    "medical/ncbi_disease_ner": lambda draw, i: {"text": _text(draw), "entities": _entities(draw, "Disease")},
    "medical/bc5cdr_ner": lambda draw, i: {"text": _text(draw), "entities": _entities(draw, "Chemical", "Disease")},
    "medical/bc2gm_ner": lambda draw, i: {"text": _text(draw), "entities": _entities(draw, "Gene")},
    "medical/rqe": lambda draw, i: {
        "chq": _text(draw), "faq": _text(draw), "label": ["entailment", "not_entailment"][i % 2],
    },
    "medical/meqsum": lambda draw, i: {"question": _text(draw, 20), "summary": _text(draw)},
    "medical/mts_dialog": lambda draw, i: {
        "dialogue": _text(draw, 20), "section_header": _choices("mts_header")[i % 20], "section_text": _text(draw),
    },
    "medical/medquad_qa": lambda draw, i: {"question": _text(draw), "answer": _text(draw, 20)},
    "customer_service/banking77": _labelled("banking77", label="label"),
    "customer_service/clinc150": _labelled("clinc150", label="label"),
    "customer_service/restaurant8k_slots": lambda draw, i: {
        "text": _text(draw), "requested_slots": ["time"], "slots": [{"slot": "time", "value": draw.choice(WORDS)}],
    },
    "customer_service/snips_intent_slots": lambda draw, i: {
        "text": _text(draw), "intent": _choices("snips_intent")[i % 7], "slots": _entities(draw, "artist"),
    },
    "customer_service/product_data2text": lambda draw, i: {"meaning_representation": _text(draw), "text": _text(draw)},
}  # fmt: skip


def write(root):
    """Writes DATA/train, validation and test of each, as docs/data.md lays them out."""
    draw = random.Random(13)
    for name, row in ROWS.items():
        (root / name).mkdir(parents=True)
        for split, count in (("train", 160), ("validation", 40), ("test", 40)):
            rows = [row(draw, i) for i in range(count)]
            pq.write_table(pa.Table.from_pylist(rows), root / name / f"{split}.parquet")
