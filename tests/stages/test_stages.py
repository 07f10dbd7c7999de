"""What trains and what stays, stage by stage, with a real Trainer on a tiny backbone."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from lightning import Trainer
from torch.utils.data import DataLoader
from transformers import AutoConfig

from alter.callbacks import TaskMetrics
from alter.errors import AlterError
from alter.nn import Description, LoRA, ModSquad, MTAModel, Polytropon, TaskSelector, TopK, TrunkCache
from alter.stages import Stage1Module, Stage2Module
from tests.nn.tiny import tiny_model

TASKS = ["a", "b"]


@pytest.fixture(params=["llama", "t5"])
def backbone(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


def batches(seq2seq, count=6):
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(5, 90, (4, 8), generator=g)
        labels = torch.randint(5, 90, (4, 3), generator=g) if seq2seq else ids.masked_fill(torch.arange(8) < 5, -100)
        found.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
                "task_ids": torch.tensor([0, 1, 0, 1]),
            }
        )
    return found


def fit(module, seq2seq, folder, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )
    loader = DataLoader(batches(seq2seq), batch_size=None)
    trainer.fit(module, loader, loader)
    return trainer


def snapshot(model):
    return {part: [p.detach().clone() for p in group] for part, group in model.part_parameters().items()}


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("task_expert_lr", [0.0, 0.1])
def test_each_stage_trains_what_it_says_and_nothing_else(backbone, tmp_path, capsys, task_expert_lr):
    first = Stage1Module(backbone, TASKS, layers="last:1", expert=LoRA(rank=4))
    first.configure_model()
    before = snapshot(first.model)
    trainer = fit(first, first.model.is_seq2seq, tmp_path)
    after = snapshot(first.model)
    assert same(before["backbone"], after["backbone"])
    assert not same(before["experts"], after["experts"])
    assert not same(before["router"], after["router"])
    assert math.isfinite(trainer.callback_metrics["val/loss"])
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines() if line.split()[0] in after] == [
        "backbone",
        "experts",
        "router",
    ]

    first.model.save_pretrained(tmp_path / "stage1", backbone)
    second = Stage2Module(backbone, TASKS, start_from=str(tmp_path / "stage1"), task_expert_lr=task_expert_lr)
    second.configure_model()
    start = snapshot(second.model)
    fit(second, first.model.is_seq2seq, tmp_path)
    end = snapshot(second.model)
    untouched = MTAModel(tiny_model(backbone_family(first)), TASKS, "last:1").part_parameters()["backbone"]
    assert same(after["backbone"], end["backbone"])
    assert same(untouched, end["backbone"])
    assert same(after["router"], start["router"])
    assert same(start["experts"], end["experts"]) == (task_expert_lr == 0)
    assert same(start["router"], end["router"]) == (task_expert_lr == 0)
    assert second.trainable_parameters() == sum(
        p.numel() for part, group in second.model.part_parameters().items() for p in group
        if part in ("shared", "shared_router") or (task_expert_lr and part in ("experts", "router"))
    )  # fmt: skip


def test_states_of_another_backbone_or_precision_are_not_read(tmp_path):
    weights = tiny_model("llama")
    for name in ("one", "other"):
        weights.save_pretrained(tmp_path / name)
        weights.model.layers[0].mlp.up_proj.weight.data += 1.0
    cache = TrunkCache(folder=str(tmp_path / "trunk"), dtype="fp32")

    def stored(name, precision="fp32"):
        module = Stage1Module(
            str(tmp_path / name), TASKS, precision, layers="last:1", expert=LoRA(rank=4), trunk_cache=cache
        )
        module.configure_model()
        (found,) = module.model.body.cached.values()
        before = len(found.store)
        module.model(batches(False, 1)[0])
        return before

    assert stored("one") == 0
    assert stored("one") == 4
    assert stored("other") == 0
    assert stored("one", "bf16") == 0


def backbone_family(module):
    return "t5" if module.model.is_seq2seq else "llama"


def test_learning_rates_are_the_recipes_times_the_parts_factor(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    module = Stage1Module(
        str(tmp_path / "backbone"), TASKS, router_lr=5.0, schedule="constant", warmup=0.0,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01),
    )  # fmt: skip
    trainer = fit(module, False, tmp_path)
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"experts": pytest.approx(0.01), "router": pytest.approx(0.05)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_an_adam_step_is_fused_and_the_same(tmp_path, name, precision):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    found = {}
    for said in ({}, {"fused": False}, {"foreach": True}):
        torch.manual_seed(0)
        module = Stage1Module(
            str(tmp_path / "backbone"),
            TASKS,
            optimizer=lambda p, said=said: getattr(torch.optim, name)(p, lr=0.01, **said),
        )
        trainer = fit(module, False, tmp_path, gradient_clip_val=1.0, precision=precision)
        fused = [group["fused"] for group in trainer.optimizers[0].param_groups]
        assert fused == [said.get("fused", None if said else True)] * len(fused)
        found[str(said)] = torch.cat([p.detach().flatten() for p in module.model.part_parameters()["experts"]])
    plain, *others = found.values()
    for other in others:
        # a hundredth of a step; autocast makes more of rounding in single ones
        assert (plain - other).abs().mean() < 1e-4


@pytest.mark.parametrize("name", ["Adamax", "SGD", "Adagrad"])
def test_other_optimizers_are_left_alone(tmp_path, name):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    module = Stage1Module(str(tmp_path / "backbone"), TASKS, optimizer=lambda p: getattr(torch.optim, name)(p, lr=0.01))
    assert not any(group.get("fused") for group in fit(module, False, tmp_path).optimizers[0].param_groups)


def test_training_lowers_the_loss_and_an_example_average_weighs_short_answers_more(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    module = Stage1Module(str(tmp_path / "backbone"), TASKS, layers="all")
    module.configure_model()
    batch = batches(False, 1)[0]
    batch["labels"][0, :7] = -100  # one target token against three
    losses, rows, _ = module.model(batch)
    per_example = torch.stack([losses[rows == i].mean() for i in range(4)])
    module.log = module.log_dict = lambda *args, **kwargs: None
    assert module.training_step(batch, 0).item() == pytest.approx(losses.mean().item(), rel=1e-5)
    module.loss_average = "example"
    assert module.training_step(batch, 0).item() == pytest.approx(per_example.mean().item(), rel=1e-5)
    fit(module, False, tmp_path)
    with torch.no_grad():
        assert module.model(batches(False, 1)[0]).losses.mean() < losses.mean()


def test_a_loss_that_is_not_finite_stops_with_the_step_the_tasks_and_the_remedy(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    module = Stage1Module(
        str(tmp_path / "backbone"), TASKS, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e30), warmup=0.0
    )
    with pytest.raises(
        AlterError,
        match=r"step \d+ of Stage1Module, batch \d+ \(tasks in the batch: a, b; the batch is in .*\); lower its optimizer",
    ):
        fit(module, False, tmp_path)


def test_a_hard_selector_is_not_trained(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    module = Stage1Module(str(tmp_path / "backbone"), TASKS, router=TaskSelector(hard=True))
    fit(module, False, tmp_path)
    assert not any(p.requires_grad for p in module.model.part_parameters()["router"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_losses_train_are_logged_and_stay_out_of_validation(backbone, tmp_path, checkpointing):
    router = TopK(k=1, load_balance=0.5, z_loss=0.1)
    first = Stage1Module(
        backbone, TASKS, layers="last:1", expert=LoRA(rank=4), router=router, gradient_checkpointing=checkpointing
    )
    first.configure_model()
    before = snapshot(first.model)
    trainer = fit(first, first.model.is_seq2seq, tmp_path)
    assert not same(before["router"], snapshot(first.model)["router"])  # with one expert a token by its losses alone
    assert trainer.callback_metrics["train/auxiliary"] > 0.4
    first.eval()
    first.on_validation_epoch_start()
    for index, batch in enumerate(batches(first.model.is_seq2seq)):
        first.validation_step(batch, index)
    per_task = first._sums[0] / first._sums[1]
    torch.testing.assert_close(trainer.callback_metrics["val/loss"].double(), per_task.mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", [Polytropon(), ModSquad(k=1, noise=1.0), TopK(k=1)], ids=lambda r: type(r).__name__)
def test_a_frozen_router_draws_no_noise_and_has_no_loss(tmp_path, router):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    first = Stage1Module(str(tmp_path / "backbone"), TASKS, layers="last:1", router=router)
    fit(first, False, tmp_path)
    first.model.save_pretrained(tmp_path / "stage1", str(tmp_path / "backbone"))
    second = Stage2Module(
        str(tmp_path / "backbone"), TASKS, start_from=str(tmp_path / "stage1"), router=Description(supervision=0.5)
    )
    second.configure_model()
    before = {key: value.clone() for key, value in second.model.adapter_state().items() if ".router." in key}
    fit(second, False, tmp_path)  # with validation between its epochs
    state = second.model.adapter_state()
    assert all(torch.equal(value, state[key]) for key, value in before.items())
    batch = batches(False, 1)[0]
    second.zero_grad()
    values = [second.model(batch) for _ in range(2)]
    assert torch.equal(values[0].losses, values[1].losses)
    assert values[0].auxiliary > 0
    values[0].auxiliary.backward()
    assert {
        name for name, group in second.model.part_parameters().items() if any(p.grad is not None for p in group)
    } == {"shared_router"}


def test_the_number_of_experts_is_free_and_comes_back(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    counts = []
    for num_experts in (None, 2, 3):
        module = Stage1Module(str(tmp_path / "backbone"), TASKS, layers="last:1", num_experts=num_experts)
        module.configure_model()
        parts = module.model.part_parameters()
        assert module.trainable_parameters() == sum(p.numel() for name in ("experts", "router") for p in parts[name])
        counts.append(sum(p.numel() for p in parts["experts"]))
        module.model.save_pretrained(tmp_path / "stage1", str(tmp_path / "backbone"))
        second = Stage2Module(str(tmp_path / "backbone"), TASKS, start_from=str(tmp_path / "stage1"))
        second.configure_model()
        assert second.model.num_experts == (num_experts or 2)
    assert counts[0] == counts[1] == counts[2] / 3 * 2


@pytest.mark.parametrize("stage", [Stage1Module, Stage2Module])
def test_a_checkpoint_holds_the_adapters_alone_and_refuses_what_does_not_fit(stage, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    module = Stage1Module(str(tmp_path / "backbone"), TASKS, layers="last:1")
    module.configure_model()
    if stage is Stage2Module:
        module.model.save_pretrained(tmp_path / "stage1", str(tmp_path / "backbone"))
        module = Stage2Module(str(tmp_path / "backbone"), TASKS, start_from=str(tmp_path / "stage1"))
    trainer = fit(module, False, tmp_path)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    parts = {key.rsplit("mlp.", 1)[1].split(".")[0] for key in state}
    assert parts == {"experts", "router", *({"shared", "shared_router"} if stage is Stage2Module else ())}
    state.pop(next(iter(state)))
    with pytest.raises(AlterError, match="missing"):
        module.on_load_checkpoint(checkpoint)


def test_states_of_a_mixed_precision_are_not_read_in_another(backbone, tmp_path):
    losses = {}
    for name, folder, precision in (("plain", "a", "32-true"), ("mixed", "b", "bf16-mixed"), ("after", "b", "32-true")):
        cache = TrunkCache(folder=str(tmp_path / folder))
        module = Stage1Module(backbone, TASKS, layers="last:1", expert=LoRA(rank=4), trunk_cache=cache)
        torch.manual_seed(0)
        trainer = fit(module, AutoConfig.from_pretrained(backbone).is_encoder_decoder, tmp_path, precision=precision)
        losses[name] = trainer.callback_metrics["val/loss"]
    assert losses["after"] == losses["plain"]


def test_task_metrics_answer_rows_that_are_spread_over_the_validation(monkeypatch):
    """Files are sorted by the label, or have them in turn: the first rows, or every fourth, would all be of one."""
    asked, logged = {}, {}

    rows_of = {
        "validation": Dataset.from_dict(
            {"prompt_ids": [[i] for i in range(400)], "target": [str(i) for i in range(400)]}
        )
    }
    data = SimpleNamespace(
        tokenizer="nowhere",
        tasks=[SimpleNamespace(name="a", metrics=["exact_match"], choices=None)],
        examples=lambda name, split: rows_of[split],
    )

    class Answers:
        def __init__(self, *_): ...

        def answer(self, name, prompts, probabilities):
            asked[name] = [ids[0] for ids in prompts]
            return [SimpleNamespace(text=str(i)) for i in asked[name]]

    monkeypatch.setattr("alter.callbacks.task_metrics.Predictor", Answers)
    monkeypatch.setattr("alter.callbacks.task_metrics.load_tokenizer", lambda path: None)
    module = SimpleNamespace(
        model=None, log_dict=logged.update, log=lambda name, value, **_: logged.update({name: value})
    )
    for rows in (100, None, 999):
        TaskMetrics(rows).on_validation_epoch_end(SimpleNamespace(datamodule=data), module)
        assert asked["a"] == sorted(set(asked["a"]))
        assert len(asked["a"]) == min(rows or 400, 400)
        if rows == 100:
            of_half, of_class = Counter(i // 200 for i in asked["a"]), Counter(i % 4 for i in asked["a"])
            assert max(of_half.values()) < 65
            assert max(of_class.values()) < 40
        assert logged == {"val/exact_match/a": 1.0, "val/score": 1.0}
