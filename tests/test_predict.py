"""`alter.load`: what a user does with a trained model in Python."""

import json

import pytest
import torch
import transformers
import yaml

import alter
from alter.errors import AlterError
from alter.nn import Bottleneck, Description, FirstPositionGate, LoRA, MTAModel, MTLLoRA, SharedGate
from alter.nn.decoding import Generation
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.runs import add_newcomer, make_run

TEXTS = ["w11 w12 w13", "w14", "w15 w16", "w17 w18 w19 w20", "w21", "w22 w23"]
TASKS = ["echo", "sort", "pair", "echo", "pick", "pair"]
INPUTS = [text if task != "pair" else {"text": text, "label": "no"} for text, task in zip(TEXTS, TASKS, strict=True)]


@pytest.fixture(params=["llama", "t5"])
def model(request, tmp_path, words):  # noqa: F811
    return alter.load(make_run(tmp_path, words, request.param))


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
        (lambda: model.routing(["w1", "w2"], task="echo", answers=["w1"]), "answers: 1 answers to 2 inputs; give one"),
        (lambda: model.generate([{"txt": "w1"}], task="echo"), "names 'text', which is not a field"),
        (lambda: model.classify(["w1"], task="echo"), "'echo' has no choices; call generate"),
        (
            lambda: list(model.stream("echo", [{"text": "w1"}, {"txt": "w1"}])),
            "input 2, key 'prompt': the template names",
        ),
    ]:
        with pytest.raises(AlterError, match=message):
            call()


def test_an_answer_ends_with_the_tokenizers_end_where_the_backbones_configuration_names_none(model):
    expected = model.generate(TEXTS, task="echo")
    backbone = model.model.backbone
    backbone.config.eos_token_id = backbone.generation_config.eos_token_id = None
    assert model.generate(TEXTS, task="echo") == expected


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


def test_an_earlier_stages_model_is_written_as_it_was_loaded(tmp_path, words):  # noqa: F811
    run = make_run(tmp_path, words)
    add_newcomer(run)
    removed = MTAModel.from_pretrained(run / "model")
    removed.remove_task("pick")
    removed.save_pretrained(run / "model", str(tmp_path / "backbone"))
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    content["data"]["tasks"] = [task for task in content["data"]["tasks"] if task["name"] != "pick"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    results = {"tasks": {"sort": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "references": {}}}}}
    (run / "results.json").write_text(json.dumps(results))
    last, first = alter.load(run), alter.load(run, stage="stage1")
    last.save_pretrained(tmp_path / "last")
    first.save_pretrained(tmp_path / "first")
    copies = [alter.load(tmp_path / "last"), alter.load(tmp_path / "first")]
    for model, copy in zip((last, first), copies, strict=True):
        assert copy.tasks == model.tasks
        assert copy.classify(TEXTS, task="sort", return_probs=True) == model.classify(
            TEXTS, task="sort", return_probs=True
        )
    assert last.tasks == ["sort", "echo", "pair", "new"]
    assert first.tasks == ["sort", "echo", "pair"]
    assert copies[0].classify(TEXTS, task="sort", return_probs=True) != copies[1].classify(
        TEXTS, task="sort", return_probs=True
    )
    assert (tmp_path / "last" / "results.json").is_file()
    assert not (tmp_path / "first" / "results.json").exists()  # they are the last stage's
    card = (tmp_path / "first" / "README.md").read_text()
    assert "Not measured by itself" in card
    assert "`new`" not in card
    copies[1].save_pretrained(tmp_path / "again")
    assert alter.load(tmp_path / "again").tasks == first.tasks


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
def test_hf_does_not_write_what_transformers_cannot_read(model, tmp_path):
    model.use("echo")
    for write in (lambda: model.hf.save_pretrained(tmp_path / "out"), lambda: model.hf.push_to_hub("owner/name")):
        with pytest.raises(
            AlterError, match=r"call save_pretrained of the model that alter.load returned, or .*export"
        ):
            write()
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out")
    assert alter.load(tmp_path / "out").generate(TEXTS, task="echo") == model.generate(TEXTS, task="echo")


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
@pytest.mark.parametrize("gate", [Description(), SharedGate(hidden=8), None], ids=["prompt", "token", "one stage"])
def test_hf_needs_no_task_where_no_router_reads_one(family, gate, tmp_path, words):  # noqa: F811
    model = alter.load(make_run(tmp_path, words, family, LoRA(rank=4), Description(), gate))
    inputs = model.tokenizer("w3 w7 w5 :", return_tensors="pt")
    found = [model.hf(**inputs, **({"decoder_input_ids": inputs.input_ids} if family == "t5" else {})).logits]
    for task in model.tasks:
        model.use(task)
        found.append(model.hf(**inputs, **({"decoder_input_ids": inputs.input_ids} if family == "t5" else {})).logits)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("expert", [MTLLoRA(rank=4), None], ids=["its own matrix", "a newcomer"])
def test_hf_asks_for_a_task_where_something_else_reads_one(expert, tmp_path, words):  # noqa: F811
    model = alter.load(make_run(tmp_path, words, "llama", expert, Description(), Description()))
    if expert is None:
        model.model.add_newcomer("new")
    with pytest.raises(AlterError, match="several tasks"):
        _ = model.hf


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
