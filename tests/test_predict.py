"""`alter.load`: what a user does with a trained model in Python."""

import json
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import alter
from alter.answering import line_ends
from alter.calibrate import BOUNDS, fit_temperature, mean_surprise
from alter.errors import AlterError
from alter.nn import Bottleneck, Description, FirstPositionGate
from alter.nn.decoding import Generation
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.runs import CHOICES, make_run

TEXTS = ["w11 w12 w13", "w14", "w15 w16", "w17 w18 w19 w20", "w21", "w22 w23"]
TASKS = ["echo", "sort", "pair", "echo", "pick", "pair"]
INPUTS = [text if task != "pair" else {"text": text, "label": "no"} for text, task in zip(TEXTS, TASKS, strict=True)]


@pytest.fixture(params=["llama", "t5"])
def model(request, tmp_path, words):  # noqa: F811
    return alter.load(make_run(tmp_path, words, request.param))


def test_a_mixed_batch_is_answered_as_each_input_by_itself(model, monkeypatch):
    assert model.tasks == ["sort", "pick", "echo", "pair"]
    mixed = model.generate(INPUTS, task=TASKS)
    alone = [model.generate([given], task=task)[0] for given, task in zip(INPUTS, TASKS, strict=True)]
    assert mixed == alone
    assert len(set(mixed)) > 2
    assert max(len(answer.split()) for answer, task in zip(mixed, TASKS, strict=True) if task == "echo") <= 3
    seen = []
    monkeypatch.setattr(
        "alter.answering.generate",
        lambda m, batch, *a, **k: seen.append(batch["task_ids"].tolist()) or [[5]] * len(batch["task_ids"]),
    )
    model.generate(INPUTS, task=TASKS)
    assert sorted(seen[0]) == [0, 1, 2, 2, 3, 3]  # one batch
    assert model.generate(INPUTS[:1], task="echo", max_new_tokens=1) == ["w2"]


def test_beams_of_tasks_with_other_limits_are_answered_as_each_alone(model):
    model.generation = Generation(num_beams=3)
    mixed = model.generate(INPUTS, task=TASKS)
    assert mixed == [model.generate(given, task=task)[0] for given, task in zip(INPUTS, TASKS, strict=True)]


def test_tasks_of_many_choices_share_a_batch(model, monkeypatch):
    names = ["sort", "pick", "sort", "pick", "pick"]
    alone = model.classify(TEXTS[:5], task=names)
    monkeypatch.setattr("alter.answering.SCORED_FIRST", 1)
    monkeypatch.setattr("alter.nn.decoding.SCORED_FIRST", 1)
    found, seen = alter.answering.best_choices, []
    monkeypatch.setattr(
        "alter.answering.best_choices",
        lambda m, batch, own: seen.append(batch["task_ids"].tolist()) or found(m, batch, own),
    )
    assert model.classify(TEXTS[:5], task=names) == alone
    assert sorted(seen[0]) == [0, 0, 1, 1, 1]


def test_probabilities_of_a_mixed_batch_are_the_softmax_of_likelihoods_over_the_temperature(model):
    names = ["sort", "pick", "sort", "pick", "pick"]
    model.temperatures = {"sort": 3.0}
    found = model.classify(TEXTS[:5], task=names, return_probs=True)
    for text, name, answer in zip(TEXTS, names, found, strict=False):
        task = model.task(name)
        ids = model.tokenizer(task.render_prompt({"text": text})).input_ids
        ids += [1] if model.model.is_seq2seq and ids[-1] != 1 else []
        scores = []
        for choice in task.choices:
            target = [*model.tokenizer(choice).input_ids, 1]
            batch = model.collator([{"prompt_ids": ids, "target_ids": target, "task_id": model.tasks.index(name)}])
            with torch.no_grad():
                scores.append(-model.model(batch).losses.sum())
        expected = (torch.stack(scores) / model.temperatures.get(name, 1.0)).softmax(0).tolist()
        assert list(answer.probabilities) == task.choices
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
        assert answer.text == task.choices[max(range(len(expected)), key=expected.__getitem__)]
    assert model.classify(TEXTS[:5], task=names) == [answer.text for answer in found]
    assert {len(answer.probabilities) for answer in found} == {2, len(CHOICES)}


def pieces_of_words():
    """As SentencePiece's: a line's end is a space, and so the piece of one."""
    found = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁a", -2.0), ("69", -3.0)], 0))
    found.normalizer = normalizers.Replace(Regex(r"\s"), " ")
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")


def pieces_of_bytes():
    """As GPT-2's: a line's end is a byte as others are."""
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    found = Tokenizer(models.BPE({**letters, "ĊĊ": len(letters)}, [("Ċ", "Ċ")]))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found)


@pytest.mark.parametrize(("tokenizer", "ends"), [(pieces_of_words(), []), (pieces_of_bytes(), ["Ċ", "ĊĊ"])])
def test_an_answer_ends_at_a_lines_end_and_at_no_space(tokenizer, ends):
    assert tokenizer.convert_ids_to_tokens(line_ends(tokenizer)) == ends
    assert tokenizer.decode(tokenizer("a 69").input_ids) == "a 69"


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_what_does_not_fit_is_refused_in_one_sentence(model):
    for call, message in [
        (lambda: model.generate(["w1"]), "no task predictor, so name one of sort, pick, echo, pair"),
        (lambda: model.generate(["w1"], task="eco"), "there is no task 'eco'.*Did you mean 'echo'"),
        (lambda: model.generate(["w1", "w2"], task=["echo"]), "1 tasks for 2 inputs"),
        (
            lambda: model.generate("w1", task="pair"),
            "input 1: task 'pair' reads the fields label, text; give a mapping",
        ),
        (lambda: model.generate([{"txt": "w1"}], task="echo"), "names 'text', which is not a field"),
        (lambda: model.classify(["w1"], task="echo"), "'echo' has no choices; call generate"),
    ]:
        with pytest.raises(AlterError, match=message):
            call()


def test_routing_tells_each_layers_gates(model):
    found = model.routing(INPUTS[:2], task=TASKS[:2], answers=["w30", "yes"])
    names = list(model.model.layers)
    for row, task in zip(found, TASKS, strict=False):
        assert list(row["experts"]) == names
        for layer in names:
            router = model.model.layers[layer].router
            expected = router.task_gates(model.tasks.index(task))
            assert row["experts"][layer] == pytest.approx(dict(zip(model.tasks, expected.tolist(), strict=True)))
            assert list(row["shared"][layer]) == ["task experts", "shared 1", "shared 2"]
            assert sum(row["shared"][layer].values()) == pytest.approx(1)
    assert found[0]["shared"] != found[1]["shared"]
    own = model.routing(INPUTS[:1], task="echo")
    assert own == model.routing(INPUTS[:1], task="echo", answers=model.generate(INPUTS[:1], task="echo"))


# -- as a transformers model ------------------------------------------------------------------------------------------


def test_hf_generates_through_transformers_as_the_model_does(model):
    with pytest.raises(AlterError, match="several tasks"):
        _ = model.hf
    expected = {task: model.generate(TEXTS[:3], task=task) for task in ("echo", "sort")}
    for task in ("echo", "sort", "echo"):
        model.use(task)
        assert model.generate(TEXTS[:3], task="sort") == expected["sort"]  # whatever hf is used for
        for text, answer in zip(TEXTS, expected[task], strict=False):
            inputs = model.tokenizer(model.prompt(text, task), return_tensors="pt")
            if model.model.is_seq2seq:
                inputs = {"input_ids": torch.tensor([[*inputs.input_ids[0].tolist(), 1]])}
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            output = model.hf.generate(**inputs, max_new_tokens=model.task(task).max_target_tokens, do_sample=False)
            start = 1 if model.model.is_seq2seq else inputs["input_ids"].shape[1]
            assert model.tokenizer.decode(output[0, start:], skip_special_tokens=True) == answer
    assert isinstance(model.hf, transformers.PreTrainedModel)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_hf_goes_through_a_pipeline(model):
    model.use("echo")
    pipe = transformers.pipeline("text-generation", model=model.hf, tokenizer=model.tokenizer)
    prompts = [model.prompt(text, "echo") for text in TEXTS[:2]]
    found = pipe(prompts, max_new_tokens=3, do_sample=False, return_full_text=False)
    assert [row[0]["generated_text"].strip() for row in found] == model.generate(TEXTS[:2], task="echo")
    model.use(["sort", "echo"])
    batch = model.tokenizer(["w11 :", "w9 w11 :"], return_tensors="pt", padding=True, padding_side="left")
    both = model.hf.generate(**batch, max_new_tokens=3, do_sample=False)[:, batch.input_ids.shape[1] :]
    assert model.tokenizer.batch_decode(both, skip_special_tokens=True) == [
        model.generate("w11", task=task, max_new_tokens=3)[0] for task in ("sort", "echo")
    ]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    "special", [{"router": Description()}, {"shared": FirstPositionGate(hidden=4)}], ids=["prompt", "position"]
)
def test_hf_serves_routers_that_read_the_prompt_or_a_position(family, special, tmp_path, words):  # noqa: F811
    model = alter.load(make_run(tmp_path, words, family, Bottleneck(rank=4), **special))
    model.use("echo")
    for text in TEXTS[:3]:
        ids = model.tokenizer(model.prompt(text, "echo"), return_tensors="pt").input_ids
        if model.model.is_seq2seq:
            ids = torch.cat([ids, torch.tensor([[1]])], 1)
        output = model.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, num_beams=2, do_sample=False
        )
        start = 1 if model.model.is_seq2seq else ids.shape[1]
        model.generation = Generation(num_beams=2)
        assert (
            model.tokenizer.decode(output[0, start:], skip_special_tokens=True) == model.generate(text, task="echo")[0]
        )


# -- calibration ------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), temperature=st.floats(0.2, 8.0), choices=st.integers(2, 6))
def test_temperature_scaling_finds_the_temperature_that_labels_were_drawn_with(seed, temperature, choices):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * temperature * torch.randn(4000, choices, generator=generator)
    labels = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator).squeeze(1)
    found = fit_temperature(scores, labels)
    assert found == pytest.approx(temperature, rel=0.15)
    for other in (found * 0.9, found * 1.1, 1.0):
        assert mean_surprise(scores, labels, found) <= mean_surprise(scores, labels, other) + 1e-9


def test_labels_that_are_all_right_or_all_wrong_leave_a_finite_temperature():
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert BOUNDS[0] <= fit_temperature(scores, torch.tensor([0, 1])) < 0.1
    assert 10 < fit_temperature(scores, torch.tensor([1, 0])) <= BOUNDS[1]


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_testing_a_run_calibrates_it_once_and_loading_reads_it(model, tmp_path, capsys, monkeypatch):
    from alter.cli import main

    run = tmp_path / "run"
    assert model.temperatures == {}
    monkeypatch.setenv("ALTER_HOME", str(tmp_path / "home"))
    main(["test", "--run", str(run)])
    kept = json.loads((run / "model" / "calibration.json").read_text())
    assert set(kept) == {"sort", "pick"}
    assert "calibrated: sort, temperature " in capsys.readouterr().out
    loaded = alter.load(run)
    assert loaded.temperatures == {name: entry["temperature"] for name, entry in kept.items()}
    for entry in kept.values():
        assert entry["rows"] == 6
        assert entry["nll_after"] <= entry["nll_before"]
    raw = model.classify(TEXTS[0], task="sort", return_probs=True)[0].probabilities["yes"]
    logit = math.log(raw / (1 - raw)) / kept["sort"]["temperature"]
    calibrated = loaded.classify(TEXTS[0], task="sort", return_probs=True)[0].probabilities["yes"]
    assert calibrated == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-4)
    before = (run / "model" / "calibration.json").stat().st_mtime_ns
    main(["test", "--run", str(run)])
    assert (run / "model" / "calibration.json").stat().st_mtime_ns == before
    (run / "model" / "calibration.json").write_text("[]")
    with pytest.raises(AlterError, match=r"calibration\.json: not a readable calibration"):
        alter.load(run)
