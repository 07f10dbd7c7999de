"""A backbone that trains too: what is saved, resumed and refused, and that nothing changes where it does not."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from alter.errors import AlterError
from alter.nn import LoRA, TrunkCache
from alter.stages import Stage1Module, Stage2Module
from tests.nn.tiny import tiny_model
from tests.stages.test_stages import TASKS, backbone, batches, fit, same, snapshot  # noqa: F401 (a fixture)


def stage1(folder, **changes):
    torch.manual_seed(0)
    settings = {"layers": "last:1", "expert": LoRA(rank=4), "backbone_lr": 0.1, **changes}
    return Stage1Module(folder, TASKS, **settings)


def test_the_backbone_trains_at_its_factor_and_goes_on_into_stage_two(backbone, tmp_path):  # noqa: F811
    module = stage1(backbone)
    module.configure_model()
    before = snapshot(module.model)
    trainer = fit(module, module.model.is_seq2seq, tmp_path)
    groups = {group["name"]: group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert groups["backbone"] == pytest.approx(0.1 * groups["experts"])
    after = snapshot(module.model)
    assert not any(map(torch.equal, before["backbone"], after["backbone"])) or module.model.is_seq2seq
    assert not same(before["backbone"], after["backbone"])

    module.model.save_pretrained(tmp_path / "stage1", backbone)
    for factor in (0.0, 0.1):
        cache = TrunkCache(folder=str(tmp_path / "trunk"))
        second = Stage2Module(
            backbone, TASKS, start_from=str(tmp_path / "stage1"), backbone_lr=factor, trunk_cache=cache
        )
        second.configure_model()
        assert same(after["backbone"], snapshot(second.model)["backbone"])
        assert not second.model.body.cached
        fit(second, module.model.is_seq2seq, tmp_path)
        assert same(after["backbone"], snapshot(second.model)["backbone"]) == (factor == 0)
        second.model.save_pretrained(tmp_path / "stage2", backbone)
        assert second.model.from_pretrained(tmp_path / "stage2").has_own_backbone


def test_the_trunk_cache_is_off_with_its_reason(backbone, tmp_path, capsys):  # noqa: F811
    module = stage1(backbone, trunk_cache=TrunkCache(folder=str(tmp_path / "trunk")))
    module.configure_model()
    fit(module, module.model.is_seq2seq, tmp_path)
    out = capsys.readouterr().out
    assert "trunk cache: off (the backbone trains or has trained, so its states are its own)" in out
    assert not (tmp_path / "trunk").exists()


def test_the_backbone_has_no_dropout_while_it_trains(tmp_path):
    tiny_model("t5").save_pretrained(tmp_path / "backbone")
    module = stage1(str(tmp_path / "backbone"))
    module.configure_model()
    module.model.train()
    batch = batches(True, 1)[0]
    assert torch.equal(module.model(batch).losses, module.model(batch).losses)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    tiny_model("t5").save_pretrained(tmp_path / "backbone")
    loader = DataLoader(batches(True), batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

    def train(epochs, checkpoint=None):
        module = stage1(str(tmp_path / "backbone"), schedule="constant", warmup=0.0)
        trainer = Trainer(max_epochs=epochs, default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
        return module, trainer

    whole, _ = train(2)
    _, half = train(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    again, _ = train(2, tmp_path / "half.ckpt")
    expected, found = whole.model.trained_state(), again.model.trained_state()
    assert any(key.startswith("backbone.") for key in expected)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_backbone_that_trains_must_be_fp32(tmp_path, precision):
    module = stage1(str(tmp_path / "nowhere"), precision=precision)
    with pytest.raises(AlterError, match=f"backbone_lr 0.1.* needs fp32, not {precision}; write precision: fp32"):
        module.configure_model()


def test_a_frozen_backbone_is_neither_saved_nor_copied(backbone):  # noqa: F811
    module = stage1(backbone, backbone_lr=0.0)
    module.configure_model()
    assert not module.model.has_own_backbone
    assert module.model.trained_state().keys() == module.model.adapter_state().keys()
    assert not any(p.requires_grad for p in module.model.part_parameters()["backbone"])
