"""A finished run answers where its recipe and the machine say."""

import pytest
import torch
import yaml

import alter
from alter.errors import AlterError
from alter.nn import Description
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.elsewhere import GPU, a_gpu
from tests.runs import add_newcomer, make_run
from tests.test_predict import INPUTS, TASKS, TEXTS


def asked(model):
    """What a user may ask of a model."""
    names = ["sort", "pick", "sort"]
    found = model.classify(TEXTS[:3], task=names, return_probs=True)
    return (
        model.generate(INPUTS, task=TASKS),
        [answer.text for answer in found],
        [list(answer.probabilities.values()) for answer in found],
        model.choice_scores("pick", [model.encode("w3 w4", "pick")]).flatten().tolist(),
        [
            list(gates.values())
            for layers in model.routing(INPUTS[:2], task=TASKS[:2])
            for kind in layers.values()
            for gates in kind.values()
        ],
    )


def written(model, names, texts):
    """Answers of rows that a server would let join one after the other."""
    answers = {}

    def watch(key, tokens, ended):
        if ended:
            answers[key] = model.decode(tokens)
        return True

    decoder = model.step_decoder(watch)
    for key, (name, text) in enumerate(zip(names, texts, strict=True)):
        model.join(decoder, [key], [name], [model.encode(text, name)], [model.task(name).max_target_tokens])
        decoder.step()
    while decoder.rows:
        decoder.step()
    return [answers[key] for key in range(len(texts))]


def close(one, other):
    if isinstance(one, float):
        return one == pytest.approx(other, abs=1e-4)
    return one == other if isinstance(one, str) else all(close(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("family", "router"), [("llama", None), ("t5", Description())])
def test_on_a_gpu_answers_are_those_of_the_cpu(family, router, tmp_path, words, monkeypatch):  # noqa: F811
    run = make_run(tmp_path, words, family, router=router)
    add_newcomer(run)
    expected, joined = asked(alter.load(run)), alter.load(run).generate(TEXTS[:2], task="new")
    monkeypatch.setattr("alter.answering.SCORED_FIRST", 2)  # "pick" has more choices
    monkeypatch.setattr("alter.nn.choices.SCORED_FIRST", 2)
    with a_gpu():
        model = alter.load(run)
        assert {tensor.device for tensor in model.model.parameters()} == {GPU}
        assert close(asked(model), expected)
        assert model.classify(TEXTS[:3], task=["sort", "pick", "sort"]) == expected[1]
        assert model.generate(TEXTS[:2], task="new") == joined
        if family == "llama":
            assert written(model, ["echo", "new"], TEXTS[:2]) == [*model.generate(TEXTS[:1], task="echo"), *joined[1:]]
        model.generation.num_beams = 2
        assert len(model.generate(TEXTS[:2], task="echo")) == 2


def test_a_device_that_is_not_there_is_a_sentence_and_no_bar_is_left_behind(tmp_path, words, capsys):  # noqa: F811
    from transformers.utils import logging

    run = make_run(tmp_path, words)
    for device in ("cuda", "gpu"):
        if device == "gpu" or not torch.cuda.is_available():
            with pytest.raises(AlterError, match=rf"^device: there is no '{device}' here \(.*; leave it out"):
                alter.load(run, device=device)
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        capsys.readouterr()
        alter.load(run, device="cpu")
        assert capsys.readouterr() == ("", "")
        assert logging.is_progress_bar_enabled()  # as the caller had it
    finally:
        if not before:
            logging.disable_progress_bar()


def test_a_run_for_the_cpu_answers_there(tmp_path, words):  # noqa: F811
    run = make_run(tmp_path, words)
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**content, "trainer": {"accelerator": "cpu"}}))
    with a_gpu():
        here, there = alter.load(run), alter.load(run, device="cuda")
        assert next(here.model.parameters()).device.type == "cpu"
        assert next(there.model.parameters()).device == GPU
        assert there.max_batch_tokens == 8 * here.max_batch_tokens  # few rows would leave a GPU idle
