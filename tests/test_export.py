"""`alter export`: what it writes is read by programs that know nothing of ALTER."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import alter
from alter.card import _task_table, model_card, published
from alter.cli import main
from alter.data import Task
from alter.data.encode import prompt_ids
from alter.export import _chat_template, _example, _quiet
from alter.nn import Bottleneck, Description, LoRA, Polytropon
from alter.publish import write_recipe
from tests.data.conftest import task_dict, words  # noqa: F401 (a fixture)
from tests.runs import add_newcomer, make_run
from tests.test_cli import refused

TEXTS = ["w11 w12 w13", "w14", "w15 w16", "w17 w18 w19 w20"]
CLIENT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
assert not any(name.split(".")[0] == "alter" for name in sys.modules)
folder, auto, prompts = json.loads(sys.stdin.read())
model = globals()[auto].from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
answers = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    if auto == "AutoModelForSeq2SeqLM":
        inputs = tokenizer(prompt + " </s>", return_tensors="pt")
    output = model.generate(**inputs)[0]
    start = 1 if auto == "AutoModelForSeq2SeqLM" else inputs["input_ids"].shape[1]
    answers.append(tokenizer.decode(output[start:], skip_special_tokens=True).strip())
print("ANSWERS " + json.dumps(answers))
"""


def weights(folder):
    return sum(f.stat().st_size for kind in ("*.safetensors", "*.onnx", "*.data") for f in folder.glob(kind))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_plain_checkpoint_answers_the_same_in_a_process_without_alter(family, tmp_path, words, capsys, monkeypatch):  # noqa: F811
    run = make_run(tmp_path, words, family, shared=None)
    monkeypatch.chdir(tmp_path)
    main(["export", "--run", "run", "--task", "echo", "--task", "sort"])
    folder = Path("run/export/hf/echo")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["echo", "sort"]
    before = weights(tmp_path / "backbone") + weights(run / "model")
    line = f"{folder}: {weights(folder) / 1e6:,.1f} MB ({before / 1e6:,.1f} MB before: backbone and the adapters of all tasks)"
    out = capsys.readouterr().out
    assert line in out
    chooses_not = "other programs write its answers and do not choose, so an answer may be no choice."
    assert [said for said in out.splitlines() if "choose" in said] == [f"run/export/hf/sort: {chooses_not}"]
    model = alter.load(run)
    auto = "AutoModelForSeq2SeqLM" if family == "t5" else "AutoModelForCausalLM"
    given = json.dumps([str(tmp_path / folder), auto, [model.prompt(text, "echo") for text in TEXTS]])
    found = subprocess.run(
        [sys.executable, "-c", CLIENT], input=given, cwd="/", capture_output=True, text=True, check=True
    )
    answers = json.loads(found.stdout.split("ANSWERS ")[1])
    assert answers == model.generate(TEXTS, task="echo")
    assert len(set(answers)) > 1
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert "`echo`" in card.text
    assert "`sort`" not in card.text
    assert "classification" not in card.text.split("## Limits")[1]
    limits = ModelCard.load(folder.parent / "sort" / "README.md").text.split("## Limits")[1]
    assert "it writes its answer to a classification and does not choose" in limits
    assert "calibrated" not in limits


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_plain_checkpoint_searches_with_the_runs_beams(family, tmp_path, words, monkeypatch):  # noqa: F811
    run = make_run(tmp_path, words, family, shared=None)
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(content | {"generation": {"num_beams": 4, "length_penalty": 0.6}}))
    monkeypatch.chdir(tmp_path)
    main(["export", "--run", "run", "--task", "echo"])
    settings = GenerationConfig.from_pretrained("run/export/hf/echo")
    assert (settings.num_beams, settings.length_penalty) == (4, 0.6)


def test_dtype_halves_the_checkpoint_and_is_what_loads(tmp_path, words):  # noqa: F811
    run = make_run(tmp_path, words, shared=None)
    for dtype in ("fp32", "bf16", "fp16"):
        main(["export", "--run", str(run), "--task", "echo", "--dtype", dtype, "--out", str(tmp_path / dtype)])
    full = load_file(tmp_path / "fp32" / "echo" / "model.safetensors")
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        folder = tmp_path / dtype / "echo"
        assert 0.45 < weights(folder) / weights(tmp_path / "fp32" / "echo") < 0.55
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == kind
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            assert all(torch.equal(tensors.get_tensor(name), value.to(kind)) for name, value in full.items())


def test_the_chat_template_makes_the_tasks_prompt(tmp_path, words):  # noqa: F811
    run = make_run(tmp_path, words, shared=None)
    main(["export", "--run", str(run)])
    model = alter.load(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "export" / "hf" / "echo")
    chat = [{"role": "user", "content": "w11 w12"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == model.prompt("w11 w12", "echo")
    assert (
        AutoTokenizer.from_pretrained(run / "export" / "hf" / "pair").chat_template is None
    )  # its prompt has two fields


def test_a_prompt_that_chats_would_render_otherwise_gets_no_chat_template(tmp_path, words):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(words)
    for prompt, fits in [
        ("w9 {{ text }} :", True),
        ("w9\n{% if text %}\n  {{ text }}\n{% endif %}\nw8", False),  # chat templates trim what stands around blocks
        ("w9 {{ row['a name'] }} :", False),
        ("{% for turn in turns %}{{ turn.said }} {% endfor %}:", False),
        ("w9 {{ text }}", True),  # ALTER's prompts end in no blanks
        ("w9 {{ text }} w8 {{ text }}", False),
        ("{% if text | length > 40 %}\nw7\n{% endif -%}\nw9 {{ text }} :", False),  # and only long ones have a block
    ]:
        task = Task.from_dict(task_dict(tmp_path, "t", prompt=prompt, choices=None), "t.yaml")
        assert (_chat_template(tokenizer, task) is not None) == fits, prompt
        assert _example(task)  # for the card


def test_a_chat_starts_with_what_the_tokenizer_puts_in_front(tmp_path, words):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    front = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = front
    task = Task.from_dict(task_dict(tmp_path, "t", prompt="w9 {{ text }} :", choices=None), "t.yaml")
    chat = [{"role": "user", "content": "w11 w12"}]
    made = tokenizer.apply_chat_template(chat, chat_template=_chat_template(tokenizer, task), tokenize=False)
    ids = tokenizer(made, add_special_tokens=False).input_ids
    assert ids == prompt_ids([task.render_prompt({"text": "w11 w12"})], tokenizer, seq2seq=False)[0]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_published_data_set_is_named_without_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store" / "set").mkdir(parents=True)
    for path, named in [
        ("../set", "set"),
        ("store/set", "set"),
        ("/home/me/patients/set", "set"),
        ("~/set", "set"),
        ("owner/set", "owner/set"),
        (str(tmp_path), tmp_path.name),
    ]:
        source = {"class_path": "Hub", "init_args": {"path": path, "name": "all"}}
        assert published(source)["init_args"] == {"path": named, "name": "all"}


@pytest.mark.parametrize("shared", [None, Polytropon()], ids=["stage1", "stage2"])
def test_bottlenecks_leave_as_one_adapter_with_its_calibration(shared, tmp_path, words, monkeypatch):  # noqa: F811
    run = make_run(tmp_path, words, "t5", Bottleneck(rank=4), shared=shared)
    entry = {"temperature": 2.0, "rows": 6, "nll_before": 1.0, "nll_after": 0.9}
    (run / "model" / "calibration.json").write_text(json.dumps({"sort": entry, "pick": entry}))
    monkeypatch.chdir(tmp_path)
    main(["export", "--run", "run", "--format", "adapter", "--out", "out"])
    whole = alter.load("run")
    for task in whole.tasks:
        alone = alter.load(f"out/{task}")
        assert alone.tasks == [task]
        assert len(alone.model.part_parameters()["router"]) == len(alone.model.layers)
        if whole.task(task).choices:
            one, other = alone.classify(TEXTS, return_probs=True), whole.classify(TEXTS, task=task, return_probs=True)
            for a, b in zip(one, other, strict=True):
                assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
    assert 'generate([{"label": "...", "text": "..."}])' in Path("out/pair/README.md").read_text()
    assert alone.generate({"text": "w1", "label": "no"}) == whole.generate({"text": "w1", "label": "no"}, task="pair")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, words, capsys, monkeypatch):  # noqa: F811
    make_run(tmp_path, words)
    monkeypatch.chdir(tmp_path)
    export = ("export", "--run", "run", "--task", "sort")
    for arguments, message in [
        (export, "SharedGate, the router of stage 2, reads the hidden states, so no fixed weights answer for a task; export the model of stage 1 (--stage stage1), or take --format onnx"),
        ((*export, "--format", "adapter", "--stage", "stage1"), "take --format hf"),
        (("export", "--run", "run", "--task", "srt"), "there is no task 'srt'; it is one of sort, pick, echo, pair. Did you mean 'sort'?"),
        ((*export, "--stage", "stage2"), "run/stage2/model: no model here"),
        ((*export, "--format", "onnx", "--dtype", "fp16"), "--dtype: fp16 is for --format hf"),
        ((*export, "--format", "alter"), "leave out --task and --stage"),
        ((*export[:3], "--format", "alter", "--backbone", "backbone"), "leave out --backbone"),
        (("export", "--run", "backbone"), "backbone: no run here"),
    ]:  # fmt: skip
        assert message in " ".join(refused(capsys, *arguments))
    assert not list(Path("run/export").rglob("*.*"))
    main([*export, "--stage", "stage1"])
    kept = weights(Path("run/export/hf/sort"))
    assert "already there and not empty" in " ".join(refused(capsys, *export, "--stage", "stage1"))
    assert weights(Path("run/export/hf/sort")) == kept > 0


def test_whether_all_tasks_fit_is_known_before_any_is_written(tmp_path, words, capsys, monkeypatch):  # noqa: F811
    run = make_run(tmp_path, words, shared=None)
    add_newcomer(run)
    monkeypatch.chdir(tmp_path)
    newcomer, others = refused(capsys, "export", "--run", "run")
    assert "The task 'new' was added later" in newcomer
    assert "take --format onnx" in newcomer
    assert others == (
        "alter: Nothing was written; of the others --format hf does: --task sort --task pick --task echo --task pair."
    )
    assert not Path("run/export").exists()
    Path("out/pick").mkdir(parents=True)
    Path("out/pick/mine").touch()
    tasks = ["--task", "sort", "--task", "pick"]
    assert (
        "out/pick: already there and not empty" in refused(capsys, "export", "--run", "run", *tasks, "--out", "out")[0]
    )
    assert not Path("out/sort").exists()
    main(["export", "--run", "run", "--task", "sort", "--task", "pick"])
    assert sorted(folder.name for folder in Path("run/export/hf").iterdir()) == ["pick", "sort"]


def test_a_newcomer_of_two_stages_is_told_what_takes_it(tmp_path, words, capsys):  # noqa: F811
    run = make_run(tmp_path, words)
    add_newcomer(run)
    for form in ("hf", "adapter"):
        (sentence,) = refused(capsys, "export", "--run", str(run), "--task", "new", "--format", form)
        assert sentence.endswith("take --format onnx, or use the model as it is (--format alter, alter.load).")
        assert "stage" not in sentence


# -- the whole model, for the hub -------------------------------------------------------------------------------------


def test_the_hub_folder_loads_and_its_card_tells_tasks_licences_metrics_and_limits(tmp_path, words, monkeypatch):  # noqa: F811
    run = make_run(tmp_path, words)
    monkeypatch.chdir(tmp_path)
    main(["test", "--run", "run"])
    main(["export", "--run", "run", "--format", "alter", "--out", "hub"])
    names = {"README.md", "adapters.safetensors", "alter.json", "calibration.json", "recipe.yaml", "results.json"}
    names |= {"task_predictor.safetensors"}
    assert {p.name for p in Path("hub").iterdir()} == names
    assert str(tmp_path) not in Path("hub/README.md").read_text()
    whole, copy = alter.load(run), alter.load("hub")
    assert copy.tasks == whole.tasks
    assert copy.temperatures == whole.temperatures
    tasks = ["echo", "sort", "pick", "echo"]
    assert copy.generate(TEXTS, task=tasks) == whole.generate(TEXTS, task=tasks)
    card = ModelCard.load("hub/README.md")
    assert card.data.library_name == "alter-mta"
    results = json.loads((run / "results.json").read_text())["tasks"]
    told = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert told == {
        (task, metric): round(e["value"], 4) for task, found in results.items() for metric, e in found.items()
    }
    assert f"| sort | accuracy | **{results['sort']['accuracy']['value']:.3f}**" in card.text
    assert "| sort | classification, 2 choices | Files sort.train.jsonl | CC BY 4.0 |" in card.text
    assert "| echo | generation | Files echo.train.jsonl | not stated in the task file |" in card.text
    for heading in ("How to use it", "Tasks and data", "Metrics", "Intended use", "Limits"):
        assert f"\n## {heading}\n" in card.text
    assert card.data.base_model is None  # a folder of this machine
    config = json.loads(Path("hub/alter.json").read_text())
    Path("hub/alter.json").write_text(json.dumps(config | {"backbone": config["backbone"] | {"name": "smollm2-135m"}}))
    named = model_card(Path("hub"), "usage", ["echo"])
    assert named.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "(Apache-2.0)" in named.text
    Path("hub/alter.json").write_text(json.dumps(config))
    assert card.data.license == "other"
    assert "trained in two stages" in card.text
    main(["export", "--run", "run", "--stage", "stage1", "--task", "sort", "--out", "plain"])
    of_stage1 = ModelCard.load("plain/sort/README.md")  # the results are those of the whole model
    assert of_stage1.data.eval_results is None
    assert "Not measured by itself" in of_stage1.text
    assert "It was measured" not in of_stage1.text
    assert "It was measured" in card.text
    assert "always names one of its choices" in card.text
    assert "two stages" not in of_stage1.text
    copy.save_pretrained("again")
    assert {p.name for p in Path("again").iterdir()} == names
    assert alter.load("again").generate(TEXTS, task=tasks) == whole.generate(TEXTS, task=tasks)
    assert yaml.safe_load(Path("hub/recipe.yaml").read_text())["data"]["tasks"][0]["source"]["class_path"] == "Files"


def test_a_published_recipe_names_files_without_folders_and_a_function_without_its_arguments(tmp_path):
    task = {"name": "a", "prompt": "{{ x }}", "target": "{{ y }}"}
    files = {
        "train": "/mnt/ward7/notes.csv",
        "test": "../held/notes.csv",
        "validation": 0.2,
        "group": "mrn",
        "root": "/mnt",
    }
    function = {"class_path": "records.rows", "init_args": {"dsn": "postgresql://svc:secret@db/notes"}}
    sources = [{"class_path": "Files", "init_args": files}, function]
    write_recipe(tmp_path, {}, [{**task, "source": source} for source in sources])
    text = (tmp_path / "recipe.yaml").read_text()
    first, second = (entry["source"] for entry in yaml.safe_load(text)["data"]["tasks"])
    assert first["init_args"] == {"train": "notes.csv", "test": "notes.csv", "validation": 0.2, "group": "mrn"}
    assert second == {"class_path": "records.rows"}
    assert not any(secret in text for secret in ("ward7", "/mnt", "svc"))


# -- ONNX -------------------------------------------------------------------------------------------------------------


def causal_greedy(session, ids, ends, limit):
    """Greedy decoding of a left-padded batch with a key-value cache, with ONNX Runtime alone."""
    longest = max(map(len, ids))
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in ids], dtype=np.int64)
    step = np.array([[0] * (longest - len(row)) + row for row in ids], dtype=np.int64)
    places = np.maximum(mask.cumsum(1) - 1, 0)
    names = [i.name for i in session.get_inputs() if "past_key_values" in i.name]
    shapes = {i.name: i.shape for i in session.get_inputs()}
    sizes = {n: (len(ids), int(shapes[n][1]), 0, int(shapes[n][3])) for n in names}
    cache = {n: np.zeros(size, dtype=np.float32) for n, size in sizes.items()}
    answers = [[] for _ in ids]
    for _ in range(limit):
        logits, *states = session.run(
            None, {"input_ids": step, "attention_mask": mask, "position_ids": places, **cache}
        )
        cache = dict(zip(names, states, strict=True))
        step = logits[:, -1:].argmax(-1)
        for answer, token in zip(answers, step[:, 0].tolist(), strict=True):
            answer.append(token)
        mask = np.concatenate([mask, np.ones_like(step)], 1)
        places = places[:, -1:] + 1
    return [until(answer, ends) for answer in answers]


def seq2seq_greedy(encoder, decoder, ids, ends, limit, start):
    given = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    (states,) = encoder.run(None, given)
    answer = [start]
    for _ in range(limit):
        feed = {
            "decoder_input_ids": np.array([answer]),
            "encoder_outputs.last_hidden_state": states,
            "attention_mask": given["attention_mask"],
        }
        answer.append(int(decoder.run(["logits"], feed)[0][0, -1].argmax()))
    return until(answer[1:], ends)


def until(tokens, ends):
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def test_the_exporters_advice_stays_from_the_screen_whatever_its_loggers_are_called(caplog):
    exporters = logging.getLogger("/site-packages/transformers/exporters/exporter_dynamo.py")
    with _quiet():
        print("step")
        exporters.warning("advice")
        exporters.error("it fails")
    exporters.warning("later")
    assert [record.message for record in caplog.records] == ["it fails", "later"]


@pytest.mark.parametrize(
    ("family", "kind", "task"),
    [("llama", {"shared": None}, "echo"), ("llama", {}, "new"), ("t5", {}, "echo"), ("bart", {}, "echo")],
    ids=["merged", "newcomer", "t5", "bart"],
)
def test_onnx_runtime_decodes_greedily_as_the_model_does(family, kind, task, tmp_path, words, capsys, monkeypatch):  # noqa: F811
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = make_run(tmp_path, words, family, blocks=3, **kind)  # the translation takes seconds a block
    if task == "new":
        add_newcomer(run)
    export = ["export", "--run", str(run), "--format", "onnx", "--task", task, "--out", str(tmp_path / "out")]
    folder = tmp_path / "out" / task
    advice = []
    monkeypatch.setattr(logging.StreamHandler, "emit", lambda self, record: advice.append(record))
    main(export)
    assert not [record for record in advice if record.levelno >= logging.WARNING]  # of the exporter, about itself
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [str(folder)]
    model, tokenizer = alter.load(run), AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(model.prompt(text, task)).input_ids for text in TEXTS]
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    if model.model.is_seq2seq:
        encoder, decoder = (ort.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
        start = model.model.backbone.config.decoder_start_token_id
        tokens = [seq2seq_greedy(encoder, decoder, [*prompt, 1], ends, 3, start) for prompt in prompts]
    else:
        limit = model.task(task).max_target_tokens
        tokens = causal_greedy(ort.InferenceSession(folder / "model.onnx"), prompts, ends, limit)
    expected = model.generate(TEXTS, task=task)
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == expected
    assert family == "bart" or len(set(expected)) > 1
    code = (folder / "README.md").read_text().split("```python")[1].split("```")[0].replace("FOLDER", str(folder))
    asked = model.prompt(TEXTS[0], task) + (
        " </s>" if model.model.is_seq2seq else ""
    )  # which a real T5's tokenizer adds
    exec(code.replace(repr(model.prompt("...", task)), repr(asked)), {})
    assert capsys.readouterr().out.strip() == expected[0]


def test_a_graph_that_would_need_the_prompt_apart_is_refused(tmp_path, words, capsys):  # noqa: F811
    run = make_run(tmp_path, words, router=Description(), shared=None)
    for form in ("onnx", "hf"):
        found = refused(capsys, "export", "--run", str(run), "--format", form, "--task", "echo")
        assert "Description" in found[0]
        assert "--format alter, alter.load" in found[0]


# -- the real thing ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_run(smollm2, tmp_path_factory):
    """A run of one stage on SmolLM2 whose adapters have moved but have not been trained."""
    from alter.nn import MTAModel, TaskSelector
    from alter.nn.backbone import load_backbone
    from tests.data.conftest import task_dict

    folder = tmp_path_factory.mktemp("real")
    tasks = [
        task_dict(folder, name, choices=None, prompt=f"My {name} story. {{{{ text }}}}", max_target_tokens=12)
        for name in ("capital", "colour")
    ]
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump({"precision": "fp32", "data": {"tasks": tasks}}))
    model = MTAModel(load_backbone(smollm2), ["capital", "colour"], "last:8")
    model.add_experts(LoRA(rank=16), TaskSelector(), own=0.7)
    torch.manual_seed(0)
    for name, parameters in model.part_parameters().items():
        for parameter in parameters if name != "backbone" else ():
            parameter.data += 0.04 * torch.randn_like(parameter)
    model.save_pretrained(run / "model", smollm2)
    return run


BEGINNINGS = ["The capital of France is", "In the morning the old farmer", "She painted the door in the colour of"]


@pytest.mark.slow
def test_a_merged_smollm2_gives_the_mixtures_logits_and_answers(real_run):
    main(["export", "--run", str(real_run), "--task", "capital"])
    model, folder = alter.load(real_run), real_run / "export" / "hf" / "capital"
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(
        [model.prompt(q, "capital") for q in BEGINNINGS], return_tensors="pt", padding=True
    )
    model.use("capital")
    with torch.inference_mode():
        expected, found = model.hf(**batch).logits, plain(**batch).logits
        with model.model.adapters_disabled():
            untouched = model.hf(**batch).logits
        exact = plain.double()(**batch).logits
    kept = batch["attention_mask"].bool()
    # The tiny models' logits differ by less than 1e-5. Here they are up to 30, and 30 blocks in fp32 round by more than
    # merging changes.
    assert (
        (found - expected)[kept].abs().max() <= (found - exact)[kept].abs().max() <= 1e-5 * expected[kept].abs().max()
    )
    assert (untouched - expected)[kept].abs().max() > 1


CONVERTER = Path(os.environ.get("ALTER_LLAMA_CPP", "-"), "convert_hf_to_gguf.py")
LLAMA_CPP = """
import json, sys
import xllamacpp
assert not any(name.split(".")[0] in ("alter", "torch", "transformers") for name in sys.modules)
gguf, prompts, chat = json.loads(sys.stdin.read())
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = gguf, 512, False
server = xllamacpp.Server(params)
wanted = {"max_tokens": 12, "temperature": 0.0, "stop": ["\\n"]}
answers = [server.handle_completions({"prompt": p, **wanted})["choices"][0]["text"].strip() for p in prompts]
message = {"role": "user", "content": chat}
said = server.handle_chat_completions({"messages": [message], **wanted})["choices"][0]["message"]["content"]
print("ANSWERS " + json.dumps([answers, said.strip()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not CONVERTER.is_file(), reason="ALTER_LLAMA_CPP names no folder with llama.cpp's converter; nox -s tests does"
)
def test_llama_cpp_answers_a_merged_checkpoint_as_the_model_does(real_run, tmp_path):
    main(["export", "--run", str(real_run), "--task", "colour", "--out", str(tmp_path)])
    model, gguf = alter.load(real_run), tmp_path / "model.gguf"
    convert = [sys.executable, str(CONVERTER), str(tmp_path / "colour"), "--outtype", "f32", "--outfile", str(gguf)]
    subprocess.run(convert, check=True, capture_output=True, cwd=tmp_path)
    given = json.dumps([str(gguf), [model.prompt(q, "colour") for q in BEGINNINGS], BEGINNINGS[1]])
    found = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP], input=given, cwd="/", capture_output=True, text=True, check=True
    )
    answers = model.generate(BEGINNINGS, task="colour")
    assert json.loads(found.stdout.split("ANSWERS ")[1]) == [answers, answers[1]]  # its chat template makes the prompt
    with model.model.adapters_disabled():
        assert model.generate(BEGINNINGS, task="colour") != answers
    assert all(answers)


def test_a_card_names_a_data_set_of_the_hub_with_its_owner():
    hub = Task("t", {"class_path": "alter.data.Hub", "init_args": {"path": "owner/set"}}, "{{ text }}", "{{ label }}")
    assert "| alter.data.Hub owner/set |" in list(_task_table([hub]))[-1]


def test_a_card_has_no_arguments_of_a_users_own_source():
    arguments = {"path": "/srv/db/clinic.sqlite", "name": "patients of Dr Smith"}
    own = Task("t", {"class_path": "my_module.my_rows", "init_args": arguments}, "{{ text }}", "{{ label }}")
    assert list(_task_table([own]))[-1] == "| t | generation | my_module.my_rows | not stated in the task file |"
    of_alter = Task("t", {"class_path": "alter.data.Hub", "init_args": arguments}, "{{ text }}", "{{ label }}")
    assert "| alter.data.Hub clinic.sqlite patients of Dr Smith |" in list(_task_table([of_alter]))[-1]
