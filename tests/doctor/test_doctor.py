"""`alter doctor` as a user calls it: on a recipe that is well, and on what may be wrong with one."""

import json
import os
import re
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import yaml

from alter.cli import main
from alter.data import MultiTaskDataModule
from alter.doctor import checks
from tests.data.conftest import rows, task_dict, words, write_jsonl  # noqa: F401 (a fixture)
from tests.test_cli import change, project  # noqa: F401 (a fixture)


def doctor(capsys, *flags):
    """The exit code, and the report's lines as (mark, topic, text)."""
    code = 0
    try:
        main(["doctor", "--config", "recipe.yaml", *flags])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr().out
    return code, [match.groups() for match in re.finditer(r"^([✓✗·]) (\S+) +(.*(?:\n {5,}.*)*)", out, re.MULTILINE)]


def distinct(project):  # noqa: F811
    """Gives every row of the tasks a text of its own."""
    count = iter(range(10**6))
    for file in project.glob("*.jsonl"):
        write_jsonl(
            file, [{**row, "text": f"w{next(count)} {row['text']}"} for row in rows(60 if "train" in file.name else 6)]
        )


def texts(lines, topic):
    return [text for _, name, text in lines if name == topic]


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_a_recipe_that_is_well_has_ticks_and_a_measured_estimate(project, capsys, request):  # noqa: F811
    family = request.node.callspec.params["project"]
    distinct(project)
    code, lines = doctor(capsys)
    assert [text for mark, _, text in lines if mark == "✗"] == []
    assert code == 0
    assert "sort: 60 train / 6 validation / 6 test" in texts(lines, "data")
    assert "50.0%" in texts(lines, "labels")[0]
    assert len(texts(lines, "labels")) == 1  # the other task writes
    end = family == "t5"  # which reads an end behind the prompt
    counts = [len(f"{row['text']} :".split()) + end for row in map(json.loads, (project / "sort.train.jsonl").open())]
    assert texts(lines, "tokens")[1].split() == (
        f"sort: prompt tokens median {statistics.median(counts):.0f}, 95% up to {sorted(counts)[56]}, longest {max(counts)}, "
        "0.0% shortened; target tokens median 2, 95% up to 2, longest 2, 0.0% cut"
    ).split()  # fmt: skip
    assert all(" ".join(text.split()).count(" -> ") == 3 for text in texts(lines, "examples"))
    assert texts(lines, "rates")[0].count("█") > 2
    chosen = {
        "llama": "adapters in 2 of 4 feed-forward blocks: model.layers.2.mlp to model.layers.3.mlp",
        "t5": "adapters in 4 of 6 feed-forward blocks: encoder.block.1",
    }
    assert chosen[family] in " ".join(texts(lines, "backbone")[0].split())
    assert len(texts(lines, "trains")) == 2
    assert "GiB" in texts(lines, "memory")[0]
    assert re.search(r"stage1 \d+ s, stage2 \d+ s, test \d+ s", " ".join(texts(lines, "time")[0].split()))
    assert {"GPU", "SLURM", "bitsandbytes"} <= {topic for _, topic, _ in lines}
    assert not (project / "run").exists()


def test_its_lines_fit_a_narrow_terminal(project, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    main(["doctor", "--config", "recipe.yaml", "--no-trial", "--data.cap", "50"])
    out = capsys.readouterr().out
    assert 70 < max(map(len, out.splitlines())) <= 80
    bars = re.findall(r"^ {15}(\w+) +(█+) +([\d.]+)%  [\d.]+ x its \d+ rows$", out, re.MULTILINE)
    assert {name for name, *_ in bars} == {"sort", "echo"}
    (_, long, most), (_, short, least) = sorted(bars, key=lambda bar: -float(bar[2]))
    assert len(short) / len(long) == pytest.approx(float(least) / float(most), abs=0.05)


def test_each_fault_of_the_data_has_its_cross_and_the_rest_is_looked_at(project, capsys):  # noqa: F811
    distinct(project)
    train = [json.loads(line) for line in (project / "sort.train.jsonl").read_text().splitlines()]
    write_jsonl(project / "sort.test.jsonl", train[:6])
    write_jsonl(project / "sort.train.jsonl", [{**row, "label": "yes"} for row in train])
    echo = yaml.safe_load((project / "tasks" / "echo.yaml").read_text())
    (project / "tasks" / "echo.yaml").write_text(yaml.safe_dump({**echo, "max_prompt_tokens": 3, "truncate": "text"}))
    (project / "tasks" / "zero.yaml").write_text(yaml.safe_dump({**echo, "name": "zero", "target": "{{ lable }}"}))
    signs = {**echo, "name": "signs", "target": "{{ text }} {}", "max_target_tokens": 30}
    (project / "tasks" / "signs.yaml").write_text(yaml.safe_dump(signs))
    code, lines = doctor(capsys, "--no-trial")
    assert code == 1
    crosses = {(topic, " ".join(text.split()).split(":")[0]) for mark, topic, text in lines if mark == "✗"}
    assert {("splits", "sort"), ("labels", "sort"), ("tokens", "echo")} <= crosses
    assert any(topic == "data" and "lable" in text for mark, topic, text in lines if mark == "✗")
    assert any("sort: 0 of 6 validation prompts, 6 of 6 test" in " ".join(t.split()) for t in texts(lines, "splits"))
    letters = {text.split(":")[0]: (mark, " ".join(text.split())) for mark, topic, text in lines if topic == "letters"}
    assert letters["signs"][0] == "✗"
    assert re.search(r"cannot write 100\.0% of the targets; 'w\d.* \{\}' becomes 'w\d", letters["signs"][1])
    assert letters["sort"] == ("✓", "sort: the tokenizer can write 100.0% of the targets")
    assert "sort: no training row has 'no'" in texts(lines, "labels")[0]
    assert texts(lines, "backbone")


def test_of_many_targets_some_are_drawn_to_be_spelled(project, capsys, monkeypatch):  # noqa: F811
    distinct(project)
    labels = {**yaml.safe_load((project / "tasks" / "sort.yaml").read_text()), "choices": ["yes", "no {}"]}
    labels["target"] = "{{ label }}{{ ' {}' if label == 'no' else '' }}"  # every other row's cannot be written
    (project / "tasks" / "sort.yaml").write_text(yaml.safe_dump(labels))
    monkeypatch.setattr(checks, "MOST_SPELT", 20)
    _, lines = doctor(capsys, "--no-trial")
    (said,) = [" ".join(text.split()) for text in texts(lines, "letters") if text.startswith("sort")]
    share = float(re.search(r"cannot write ([\d.]+)%", said)[1])
    assert share in {5.0 * count for count in range(1, 20)}  # of 20


def test_a_wrong_recipe_or_backbone_is_a_cross_and_no_traceback(project, capsys):  # noqa: F811
    code, lines = doctor(capsys, "--data.temprature", "5")
    assert code == 1
    assert [(mark, topic) for mark, topic, _ in lines] == [("✗", "recipe")]
    code, lines = doctor(capsys, "--backbone", "./nowhere")
    assert code == 1
    assert ("✗", "backbone") in {(mark, topic) for mark, topic, _ in lines}


def test_more_memory_than_there_is_has_a_cross():
    assert checks.fits(2**30, 2**31, "host").good is True
    assert checks.fits(2**31, 2**30, "host").good is False
    assert checks.fits(2**31, None, "host").good is None
    free = checks.available_memory()
    assert free is None or 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_machines_cards_its_queue_and_bitsandbytes_are_told(monkeypatch):
    import torch

    def said(precision="fp32"):
        return {line.topic: (line.good, line.text) for line in checks.machine(precision)}

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said()["SLURM"] == (None, "none")
    assert said()["GPU"] == (None, f"none; {os.cpu_count()} CPU cores")
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert said()["SLURM"] == (None, "sbatch is here")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert said()["SLURM"] == (True, "inside job 7, 4 tasks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 4 * 2**30))
    assert said()["GPU"] == (True, "2 x A card; 3.0 GiB free on the first")
    assert said()["bitsandbytes"][0] is True

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", missing)
    assert said()["bitsandbytes"] == (None, "not installed")
    good, text = said("nf4")["bitsandbytes"]
    assert good is False
    assert "pip install bitsandbytes" in text


@pytest.mark.slow
def test_the_estimated_memory_of_smollm2_is_within_a_fifth_of_the_measured(project, smollm2, capsys):  # noqa: F811
    distinct(project)
    for task in (project / "tasks").iterdir():  # SmolLM2 has no word for w17
        task.write_text(task.read_text().replace("max_prompt_tokens: 16", "max_prompt_tokens: 64"))
    for stage in ("stage1", "stage2"):
        change(
            project,
            **{f"{stage}__model__init_args__expert": {"class_path": "alter.nn.LoRA", "init_args": {"rank": 16}}},
        )
    change(project, stage1__model__init_args__layers="last:40%", data__max_tokens=512)
    flags = [
        "--backbone",
        str(smollm2),
        *("--data.examples_per_epoch", "32", "--data.limit.validation", "2", "--data.limit.test", "2"),
        *("--trainer.max_epochs", "1"),
        *("--precision", "fp32"),  # as fast on every processor
    ]
    command = [sys.executable, "-m", "alter", "fit", "--config", "recipe.yaml", *flags]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=path, capture_output=True, text=True)  # by itself: the peak is the process's
    assert done.returncode == 0, done.stderr
    measured = json.loads((project / "run" / "results.json").read_text())["peak_memory_bytes"] / 2**30
    _, lines = doctor(capsys, *flags)
    estimated = float(re.search(r"about ([\d.]+) GiB", texts(lines, "memory")[0])[1])
    print(f"estimated {estimated:.2f} GiB, measured {measured:.2f} GiB")
    assert abs(estimated / measured - 1) < 0.2


@pytest.mark.parametrize("given", [True, False])
def test_a_group_is_named_as_the_remedy_where_a_share_is_drawn(tmp_path, words, given):  # noqa: F811
    lines = [{"text": f"w{n % 30} w5", "label": ["yes", "no"][n % 2], "id": str(n)} for n in range(120)]
    files = {split: str(write_jsonl(tmp_path / f"{split}.jsonl", lines)) for split in ("train", "validation", "test")}
    task = task_dict(tmp_path, "t")
    task["source"] = {"class_path": "Files", "init_args": files if given else {"train": files["train"]}}
    data = MultiTaskDataModule(tokenizer=str(words), tasks=[task], cache_dir=str(tmp_path / "cache"))
    data.setup()
    line = checks.disjoint(data.tasks[0], data)
    assert line.good is False
    assert ("source's group" in line.text) == (not given)
    assert ("from one of the splits" in line.text) == given
