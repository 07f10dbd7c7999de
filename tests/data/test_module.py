from collections import Counter

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from alter.data import MultiTaskDataModule
from alter.errors import AlterError
from tests.data.conftest import task_dict, write_jsonl


def make(tmp_path, words, **changes):
    tasks = [task_dict(tmp_path, "small", 40), task_dict(tmp_path, "large", 160, choices=None, metrics=["rougeL"])]
    data = MultiTaskDataModule(
        **{"tasks": tasks, "tokenizer": str(words), "max_tokens": 64, "cache_dir": str(tmp_path / "cache"), **changes}
    )
    data.prepare_data()
    data.setup()
    return data


def test_rates_follow_the_sizes_the_temperature_the_cap_and_the_weights(tmp_path, words):
    np.testing.assert_allclose(make(tmp_path, words, temperature=1).rates, [0.2, 0.8])
    np.testing.assert_allclose(make(tmp_path, words, temperature=2).rates, [1 / 3, 2 / 3])
    np.testing.assert_allclose(make(tmp_path, words, temperature=1, cap=40).rates, [0.5, 0.5])


def test_an_epoch_draws_what_it_says_and_validation_sees_every_example_once(tmp_path, words):
    data = make(tmp_path, words, examples_per_epoch=90, temperature=2)
    counts = Counter(t for batch in data.train_dataloader() for t in batch["task_ids"].tolist())
    assert counts == {0: 30, 1: 60}
    assert Counter(t for batch in data.val_dataloader() for t in batch["task_ids"].tolist()) == {0: 6, 1: 6}


def test_a_part_of_the_validation_batches_has_rows_of_every_task(tmp_path, words):
    """As ``trainer.limit_val_batches`` takes; sorted by length, the first half of them would be of one task."""
    write = {"long": 14, "short": 2}
    tasks = [task_dict(tmp_path, name, 40, validation=60) for name in write]
    for name, length in write.items():
        lines = [{"text": " ".join(f"w{i + j}" for j in range(length)), "label": "yes"} for i in range(60)]
        write_jsonl(tmp_path / f"{name}.validation.jsonl", lines)
    data = make(tmp_path, words, tasks=tasks, eval_max_tokens=64)
    batches = [batch["task_ids"].tolist() for batch in data.val_dataloader()]
    assert Counter(task for batch in batches for task in batch) == {0: 60, 1: 60}
    half = Counter(task for batch in batches[: len(batches) // 2] for task in batch)
    assert half[0] == pytest.approx(30, abs=8)
    assert half[1] == pytest.approx(30, abs=15)  # batches of some 12 rows


def test_the_tokens_of_what_is_drawn_are_told(tmp_path, words):
    data = make(tmp_path, words, examples_per_epoch=30, temperature=2)
    loader, read = data.train_dataloader(), {}
    for epochs in (1, 2, 8):  # draws of 10, 20, 80 of 40 rows and of 20, 40, 160 of 160
        for epoch in range(epochs):
            loader.batch_sampler.set_epoch(epoch)
            read |= {pair: loader.dataset[pair] for pairs in loader.batch_sampler for pair in pairs}
        validation = [row for task in ("small", "large") for row in data.examples(task, "validation")]
        for part, told in zip(("prompt_ids", "target_ids"), data.drawn_tokens(epochs), strict=True):
            expected = sum(len(row[part]) for row in [*read.values(), *validation])
            assert told == pytest.approx(expected, rel=0 if epochs == 8 else 0.1)


def test_the_summary_tells_sizes_and_rates(tmp_path, words):
    lines = make(tmp_path, words, temperature=1, examples_per_epoch=2000).summary().splitlines()
    assert lines[1].split()[:6] == ["small", "classification", "40", "6", "6", "20.0%"]
    assert lines[2].split()[:6] == ["large", "generation", "160", "6", "6", "80.0%"]
    assert "2,000 draws an epoch, at temperature 1" in lines[3]
    assert "up to 64 tokens" in lines[4]
    assert max(map(len, lines)) <= 80


def test_the_summary_says_what_was_cut(tmp_path, words):
    data = make(tmp_path, words)
    assert "shortened" not in data.summary()
    tasks = [task_dict(tmp_path, "a", 40, max_prompt_tokens=4, truncate="text")]
    data = MultiTaskDataModule(tasks, str(words), cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup()
    *_, cut = data.summary().splitlines()[1].split()
    assert int(cut) > 0
    assert "max_prompt_tokens and was shortened" in data.summary()


def test_the_summary_says_which_targets_an_answer_cannot_be(tmp_path, words):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "w{i}", "label": "w1\\nw2"}}\n' for i in range(60)))
    source = {"class_path": "Files", "init_args": {"train": str(tmp_path / "x.jsonl"), "validation": 0.2, "test": 0.2}}
    several = {"name": "t", "source": source, "prompt": "{{ text }}", "target": "{{ label }}"}
    data = make(tmp_path, words, tasks=[several])
    assert "lines: 60 targets have several, and an answer ends with its first;" in data.summary()
    assert max(map(len, data.summary().splitlines())) <= 80
    one = make(tmp_path, words, tasks=[{**several, "target": "{{ label | replace('\n', ' ') }}"}])
    assert "several" not in one.summary()
    assert "max_target_tokens" not in one.summary()
    cut = make(tmp_path, words, tasks=[{**several, "max_target_tokens": 2, "truncate_target": True}])
    assert "targets: 60 are longer than max_target_tokens, and learned and answered as far" in cut.summary()
    assert max(map(len, cut.summary().splitlines())) <= 80


def test_mistakes_in_the_rows_of_all_tasks_come_at_once(tmp_path, words):
    tasks = [task_dict(tmp_path, "a", max_target_tokens=1), task_dict(tmp_path, "b", choices=["yes", "maybe"])]
    data = MultiTaskDataModule(tasks, str(words), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(AlterError) as error:
        data.prepare_data()
    assert "task 'a', train row 1" in str(error.value)
    assert "task 'b', train row 2" in str(error.value)


class Recorder(LightningModule):
    """Remembers the batches that it is trained on, and stops where it is told."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.stop_at = stop_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_at", [5, 9, 10, 18, 21])
def test_a_run_resumed_in_mid_epoch_sees_just_the_remaining_batches(tmp_path, words, workers, stop_at):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(module, checkpoint=None):
        data = make(tmp_path, words, examples_per_epoch=90, num_workers=workers)
        keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=1, save_top_k=0)
        trainer = Trainer(
            accelerator="cpu", max_epochs=3, callbacks=[keep], logger=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, reload_dataloaders_every_n_epochs=0,
        )  # fmt: skip
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except (KeyboardInterrupt, SystemExit):
            assert module.stop_at is not None
        return module.seen

    whole = run(Recorder())
    assert whole[: len(whole) // 3] != whole[len(whole) // 3 : 2 * len(whole) // 3]  # epochs differ
    for file in (tmp_path / "ckpt").iterdir():
        file.unlink()
    before = run(Recorder(stop_at))
    after = run(Recorder(), str(tmp_path / "ckpt" / "last.ckpt"))
    assert before + after == whole


def test_a_limit_for_all_tasks_is_not_above_a_tasks_own(tmp_path, words):
    small = task_dict(tmp_path, "small", 40, limit={"train": 10})
    large = task_dict(tmp_path, "large", 160, choices=None, metrics=["rougeL"])
    data = make(tmp_path, words, tasks=[small, large], limit={"train": 20, "test": 3})
    assert data.sizes == [10, 20]
    assert [len(data.examples(task, "test")) for task in ("small", "large")] == [3, 3]
    assert [len(data.examples(task, "validation")) for task in ("small", "large")] == [6, 6]


@pytest.mark.parametrize("limit", [{"test": 0}, {"tst": 3}])
def test_a_limit_that_is_none_is_refused(tmp_path, words, limit):
    with pytest.raises(AlterError, match="limit"):
        make(tmp_path, words, limit=limit)


def test_a_later_stage_goes_on_with_the_next_epochs_draws(tmp_path, words):
    def rows(data, epoch):
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        return list(loader.batch_sampler)

    data = make(tmp_path, words, examples_per_epoch=30)
    third, fourth = rows(data, 2), rows(data, 3)
    data.first_epoch = 2
    assert rows(data, 0) == third
    assert rows(data, 1) == fourth
    assert third != fourth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "data.temperature: 0.0 is not above 0"),
        ({"cap": 0}, "data.cap: 0 is below 1"),
        ({"num_workers": -1}, "data.num_workers: -1 is below 0"),
    ],
)
def test_by_itself_it_refuses_what_a_recipe_would(arguments, message):
    with pytest.raises(AlterError, match=message):
        MultiTaskDataModule(**arguments)
