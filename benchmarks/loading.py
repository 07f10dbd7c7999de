"""Loading a trained model of eight tasks, against loading its backbone and tokenizer with transformers alone.

python benchmarks/loading.py --t5 FOLDER
"""

import gc
import tempfile
from pathlib import Path

import common
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import alter
from alter.nn import LoRA, SharedGate
from alter.nn.backbone import resolve_backbone

TASKS = 8


def measure(name, backbone, args):
    """One row: both stages of the recipe's kind of model, from files that the system has read before."""
    where = resolve_backbone(backbone)
    found = common.model(backbone, args.precision, TASKS, LoRA(rank=args.rank), layers=args.layers)
    found.add_shared(LoRA(rank=args.rank), 2, SharedGate())
    auto = AutoModelForSeq2SeqLM if found.is_seq2seq else AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        found.save_pretrained(run / "model", str(where))
        source = {"class_path": "Files", "init_args": {"train": "none.csv"}}
        task = {"source": source, "prompt": "{{ text }}", "target": "{{ text }}"}
        recipe = {"precision": args.precision, "data": {"tasks": [{"name": n, **task} for n in found.tasks]}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))

        def plain():
            auto.from_pretrained(where, dtype="float32"), AutoTokenizer.from_pretrained(where)

        gc.freeze()  # or a collection of all that the libraries hold falls on either side by chance, and costs more than it
        seconds = common.alternate(args.rounds, ours=lambda: alter.load(run), plain=plain)
    times = common.ratios(seconds["ours"], seconds["plain"])
    return [common.row(f"{name} {args.layers}: loading a model of {TASKS} tasks over its backbone", times, 1.2, True)]


def main():
    """Both backbones."""
    parser = common.options(__doc__)
    parser.add_argument("--layers", default="last:40%")
    parser.add_argument("--rank", type=int, default=16)
    parser.set_defaults(rounds=25)  # of half a second each
    args = parser.parse_args()
    common.both_backbones(measure, args)


if __name__ == "__main__":
    main()
