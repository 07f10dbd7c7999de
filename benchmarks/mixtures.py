"""Real mixtures of tasks for the benchmarks: from the labelled data where they are, else the medical recipe's."""

from pathlib import Path

from alter.data import MultiTaskDataModule
from alter.nn.backbone import is_seq2seq, resolve_backbone

RECIPES = Path(__file__).parent.parent / "recipes"


def known(root, name):
    """The mixture that is meant: without the labelled data the medical recipe's."""
    return name if root else "medical"


def mixture(backbone, root=None, name="customer_service", max_tokens=1024, **options):
    """A data module, ready to load."""
    folder = resolve_backbone(backbone)
    files = [str(f) for f in sorted((RECIPES / "tasks" / known(root, name)).glob("*.yaml"))]
    data = MultiTaskDataModule(files, str(folder), is_seq2seq(folder), max_tokens=max_tokens, root=root, **options)
    data.prepare_data()
    data.setup()
    return data


def batches(backbone, root, count, max_tokens, name="customer_service"):
    """How many tasks there are, and training batches that stand for an epoch: from its lowest share of labels to its highest."""
    data = mixture(backbone, root, name, max_tokens)
    loader = data.train_dataloader()
    targets = [data.examples(task.name, "train")["target_ids"] for task in data.tasks]
    prompts = [data.examples(task.name, "train")["prompt_ids"] for task in data.tasks]

    def label_share(pairs):
        labels, others = (sum(len(rows[task][row]) for task, row in pairs) for rows in (targets, prompts))
        return labels / (labels + others)

    epoch = sorted(loader.batch_sampler, key=label_share)
    chosen = [epoch[(2 * i + 1) * len(epoch) // (2 * count)] for i in range(count)]
    return len(data.tasks), [loader.collate_fn([loader.dataset[pair] for pair in pairs]) for pairs in chosen]
