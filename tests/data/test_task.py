from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from alter.data import Task, load_tasks
from alter.errors import AlterError
from tests.data.conftest import rows, task_dict, write_jsonl


def make(tmp_path, **changes):
    return Task.from_dict(task_dict(tmp_path, **changes), "t.yaml")


def test_a_row_becomes_prompt_and_target(tmp_path):
    task = make(tmp_path, prompt="Say: {{ text|upper }}\nAnswer: \n", target=" {{ label }} ")
    assert task.render_prompt({"text": "a", "label": "yes"}) == "Say: A\nAnswer:"
    assert task.render_target({"text": "a", "label": "yes"}) == "yes"
    assert task.kind == "classification"
    assert task.metrics == ["accuracy", "macro_f1"]


def test_a_column_whose_name_is_no_variable_is_reached_through_the_row(tmp_path):
    task = make(tmp_path, prompt="{{ row['Customer text'] | upper }} :")
    assert task.render_prompt({"Customer text": "w1"}) == "W1 :"


def test_choices_that_yaml_takes_for_something_else_are_text(tmp_path):
    task = make(tmp_path, choices=yaml.safe_load("[yes, no, 1, 2.5]"))
    assert task.choices == ["yes", "no", "1", "2.5"]


def test_a_task_comes_back_from_its_plain_values(tmp_path):
    task = make(tmp_path, limit={"test": 3}, weight=2.0)
    again = Task.from_dict(yaml.safe_load(yaml.safe_dump(task.to_dict())), "recipe.yaml")
    assert again == task


def test_a_choices_recall_is_a_metric_of_its_task(tmp_path):
    assert make(tmp_path, metrics=["accuracy", "recall[no]"]).metrics == ["accuracy", "recall[no]"]


@pytest.mark.parametrize("class_path", ["Files", "alter.data.Files", "alter.data.sources.Files"])
def test_data_files_are_looked_for_under_the_root_first(tmp_path, monkeypatch, class_path):
    files = {split: f"t.{split}.jsonl" for split in ("train", "validation", "test")}
    content = task_dict(tmp_path, source={"class_path": class_path, "init_args": files})
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.yaml").write_text(yaml.safe_dump(content))
    write_jsonl(tmp_path / "tasks" / "t.test.jsonl", rows(2))
    monkeypatch.chdir(tmp_path)
    (task,) = load_tasks(["tasks/t.yaml"], tmp_path, root=".")
    monkeypatch.chdir("/")
    assert len(list(task.opened.rows("train"))) == 40
    assert len(list(task.opened.rows("test"))) == 6
    (beside,) = load_tasks(["tasks/t.yaml"], tmp_path)
    assert len(list(beside.opened.rows("test"))) == 2
    (moved,) = load_tasks([task.to_dict()], tmp_path, root=str(tmp_path / "tasks"))
    assert len(list(moved.opened.rows("test"))) == 2
    with pytest.raises(AlterError, match=r"tasks/t.train.jsonl: no such file; name the folder .* data.root \(--data"):
        list(moved.opened.rows("train"))


def test_paths_of_a_file_are_relative_to_it(tmp_path, monkeypatch):
    content = task_dict(tmp_path)
    content["source"]["init_args"] = {split: f"t.{split}.jsonl" for split in ("train", "validation", "test")}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(content))
    task = Task.from_file(tmp_path / "t.yaml")
    monkeypatch.chdir("/")
    assert len(list(task.opened.rows("train"))) == 40
    assert len(list(Task.from_dict(task.to_dict(), "recipe.yaml").opened.rows("test"))) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, r"t.yaml: task 't': unknown key 'promt'.*Did you mean 'prompt'"),
        ({"weight": "heavy"}, r"the key 'weight' is 'heavy', which is not float"),
        ({"max_prompt_tokens": "64"}, r"the key 'max_prompt_tokens' is '64', which is not int"),
        ({"metrics": ["acuracy"]}, r"key 'metrics': 'acuracy' is not a classification metric.*Did you mean 'accuracy'"),
        ({"choices": None, "metrics": ["accuracy"]}, r"not a generation metric"),
        ({"choices": None, "metrics": ["recall[no]"]}, r"not a generation metric"),
        ({"metrics": ["recall[yess]"]}, r"'recall\[yess\]' is of no choice of the task.*Did you mean 'yes'"),
        ({"truncate_target": True}, r"key 'truncate_target': a choice is scored whole"),
        ({"prompt": "{{ text"}, r"key 'prompt': not a Jinja template"),
        ({"limit": {"trian": 3}}, r"key 'limit': 'trian' is not a split.*Did you mean 'train'"),
        ({"limit": {"train": 0}}, r"key 'limit': train is 0, below 1"),
        *(
            ({"name": name}, r"key 'name': files are named by it")
            for name in ("", "a/b", "..", ".a", "-n", "a\\b", "a\0b")
        ),
        ({"name": "auto"}, r"task 'auto', key 'name': a client of alter serve writes it where it names no task"),
        ({"choices": ["yes"]}, r"at least two choices"),
        *(({"weight": weight}, r"key 'weight'") for weight in (0, -1.0, float("inf"), float("nan"))),
        ({"max_target_tokens": 0}, r"key 'max_target_tokens'"),
        ({"source": {"class_path": "Flies"}}, r"'Flies' is not one of Files, Hub.*Did you mean 'Files'"),
        (
            {"source": {"class_path": "Files", "init_args": {"trian": "x"}}},
            r"unknown key 'trian'.*Did you mean 'train'",
        ),
        ({"source": {"class_path": "Files", "init_args": {}}}, r"the key 'train' is missing"),
        ({"source": {"class_path": "alter.data.packs.medical.hpo_sam"}}, r"Did you mean 'hpo_same'"),
        ({"source": {"class_path": "no.such.module"}}, r"'no.such.module' cannot be imported"),
        (
            {"source": {"class_path": "alter.data.packs.medical.hpo_same", "init_args": {"sed": 1}}},
            r"does not take these",
        ),
    ],
)
def test_a_bad_task_is_one_sentence_with_file_key_and_remedy(tmp_path, changes, message):
    with pytest.raises(AlterError, match=message):
        load_tasks([{**task_dict(tmp_path), "where": "t.yaml", **changes}], tmp_path)


def test_a_missing_key_is_named(tmp_path):
    content = task_dict(tmp_path)
    del content["prompt"], content["target"]
    with pytest.raises(AlterError) as error:
        Task.from_dict(content, "t.yaml")
    assert [m for m in error.value.messages if "'prompt' is missing" in m]
    assert [m for m in error.value.messages if "'target' is missing" in m]


def test_the_mistakes_of_all_tasks_are_told_at_once(tmp_path):
    first = {**task_dict(tmp_path, "a"), "metrics": ["f2"], "where": "a.yaml"}
    second = {**task_dict(tmp_path, "b"), "promt": "", "where": "b.yaml"}
    with pytest.raises(AlterError) as error:
        load_tasks([first, second, "c.yaml"], tmp_path)
    text = str(error.value)
    assert "a.yaml" in text
    assert "b.yaml" in text
    assert "'c.yaml'" in text


def test_two_tasks_of_one_name_are_refused(tmp_path):
    with pytest.raises(AlterError, match="two tasks are named 't'"):
        load_tasks([task_dict(tmp_path), task_dict(tmp_path)], tmp_path)


def test_a_misspelt_file_finds_its_neighbour(tmp_path):
    (tmp_path / "intents.yaml").write_text("")
    with pytest.raises(AlterError, match=r"no task file 'intent.yaml'.*Did you mean 'intents.yaml'"):
        load_tasks(["intent.yaml"], tmp_path)


def test_a_misspelt_file_elsewhere_is_one_sentence_too(tmp_path):
    (tmp_path / "intents.yaml").write_text("")
    with pytest.raises(AlterError, match=r"no task file '.*intent.yaml'"):
        load_tasks([str(tmp_path / "intent.yaml")], Path())


def test_a_folders_name_is_no_pattern(tmp_path):
    folder = tmp_path / "b[1]*"
    folder.mkdir()
    (folder / "t.yaml").write_text(yaml.safe_dump(task_dict(tmp_path)))
    assert [task.name for task in load_tasks(["*.yaml"], folder)] == ["t"]


def test_fields_named_through_the_row_are_known(tmp_path):
    task = Task.from_dict({**task_dict(tmp_path), "prompt": "{{ row.text }} {{ row['b c'] }} {{ d }}"}, "t.yaml")
    assert task.fields == ["b c", "d", "text"]


def test_fields_that_are_asked_for_are_known_and_what_rows_can_do_is_no_field(tmp_path):
    prompt = "{{ row.get('text') }} {{ row.get('other', '') }} {% for name in row.keys() %}{{ name }}{% endfor %}"
    assert Task.from_dict({**task_dict(tmp_path), "prompt": prompt}, "t.yaml").fields == ["other", "text"]
    task = Task.from_dict({**task_dict(tmp_path), "prompt": "Text: {{ row.get('text') }}"}, "t.yaml")
    assert task.render_prompt(task.as_row("hello", "the row")) == "Text: hello"


def test_half_a_character_is_a_question_mark(tmp_path):
    task = Task.from_dict(task_dict(tmp_path), "t.yaml")
    assert "a ?" in task.render_prompt({"text": "a \ud83d"}, "row 1")
    assert "a \U0001f600" in task.render_prompt({"text": "a \U0001f600"}, "row 1")


def test_an_unknown_template_variable_names_the_fields(tmp_path):
    task = make(tmp_path, prompt="{{ txt }}")
    with pytest.raises(
        AlterError, match=r"key 'prompt': the template names 'txt'.*fields are text, label.*Did you mean 'text'"
    ):
        task.render_prompt({"text": "a", "label": "yes"}, "train row 3")


def test_nothing_is_an_empty_text(tmp_path):
    task = make(tmp_path, prompt="{{ text }}{{ row['text'] | default('x') }}{% if text %}y{% endif %}:")
    assert task.render_prompt({"text": None}) == ":"
    assert make(tmp_path, prompt="{{ text }}:").render_prompt({"text": float("nan")}) == ":"


@pytest.mark.parametrize("nothing", [None, float("nan"), ""])
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{{ text | trim }}:", ":"),
        ("{{ text | replace('a', 'b') }}{{ 'N: ' ~ text }}:", "N: :"),
        ("{{ [text, label] | join('+') }}:", "+yes:"),
        ("{{ text | default('none', true) }}{{ text | truncate(10) }}{{ text.strip() }}:", "none:"),
        ("{{ row['text'] | trim }}{{ row.get('text') | upper }}{{ row.get('text') ~ '' }}:", ":"),
        ("{{ part.text | trim }}{{ part['text'] | string }}{{ parts | map(attribute='text') | join('+') }}:", ":"),
        (
            "{% for word in words %}{{ word | upper }};{% endfor %}{{ words | first | trim }}{{ words | map('trim') | join('+') }}:",
            ";A;+a:",
        ),
        (
            "{{ text or 'none' }}{% if text %}y{% endif %}{{ 'y' if text and label else '' }}{{ not text }}:",
            "noneTrue:",
        ),
        ("{% for word in words if word %}{{ word }}{% endfor %}{% if label and text %}y{% endif %}:", "a:"),
        ("{% for name, value in part.items() %}{{ name ~ '=' ~ value }};{% endfor %}", "text=;"),
    ],
)
def test_what_is_missing_makes_an_empty_text_wherever_a_text_is_made(tmp_path, nothing, prompt, expected):
    row = {
        "text": nothing,
        "label": "yes",
        "part": {"text": nothing},
        "parts": [{"text": nothing}],
        "words": [nothing, "a"],
    }
    assert make(tmp_path, prompt=prompt).render_prompt(row) == expected


def test_what_is_missing_stays_what_it_is_to_numbers_tests_and_json(tmp_path):
    nan = float("nan")
    assert (
        make(tmp_path, prompt="{{ age | round(1) }}{{ 'old' if age > 65 else 'young' }}").render_prompt({"age": nan})
        == "young"
    )
    assert make(tmp_path, prompt="{{ 'unknown' if age is none else age }}").render_prompt({"age": None}) == "unknown"
    assert (
        make(tmp_path, prompt="{{ age | tojson }} {{ row | tojson }}").render_prompt({"age": None})
        == 'null {"age": null}'
    )


def test_a_missing_answer_is_no_answer(tmp_path):
    task = make(tmp_path, choices=None, metrics=[], target="{{ label | replace('x', ' ') }}")
    with pytest.raises(AlterError, match="the target is empty"):
        task.render_target({"label": None})


def test_a_text_in_place_of_its_words_stays_as_it_is(tmp_path):
    task = make(tmp_path, prompt="{{ tokens | join(' ') }}:")
    assert task.render_prompt({"tokens": ["take", "aspirin"]}) == "take aspirin:"
    assert task.render_prompt({"tokens": "take aspirin"}) == "take aspirin:"


def test_a_method_that_is_not_called_is_refused(tmp_path):
    with pytest.raises(
        AlterError, match=r"key 'prompt': '.values' is a method that is not called \(add \(\), or write \['values'\]"
    ):
        make(tmp_path, prompt="{{ lab.values | trim }}")
    with pytest.raises(AlterError, match="it writes a method instead of calling it"):
        make(tmp_path, prompt="{{ text.lower | trim }}").render_prompt({"text": "a"})
    with pytest.raises(AlterError, match="it writes bytes that are not UTF-8"):
        make(tmp_path, prompt="{{ text | trim }}").render_prompt({"text": b"\xff"})
    assert make(tmp_path, prompt="{{ text | upper }}").render_prompt({"text": "ä".encode()}) == "Ä"
    task = make(
        tmp_path, prompt="{{ lab['values'] }} {{ lab.title }} {% for name in lab.keys() %}{{ name }}{% endfor %}"
    )
    assert task.render_prompt({"lab": {"values": 5.1, "title": "K"}}) == "5.1 K valuestitle"


def test_a_column_named_row_is_reached_through_the_row(tmp_path):
    task = make(tmp_path, prompt="{{ row['row'] }}: {{ row['the text'] }}")
    assert task.fields == ["row", "the text"]
    assert task.render_prompt({"row": "17", "the text": "hello"}) == "17: hello"


@pytest.mark.parametrize("prompt", ["{{ Zuständige Gruppe }}", "{{ 2nd line }}"])
def test_a_column_that_is_no_plain_word_is_told_how_to_be_named(tmp_path, prompt):
    with pytest.raises(AlterError, match=r"name has spaces or signs is \{\{ row\['its name'\] \}\}"):
        make(tmp_path, prompt=prompt).render_prompt({"text": "a"})


def test_where_a_task_was_read_is_no_key_of_its_file(tmp_path):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**task_dict(tmp_path), "where": "x == 1"}))
    with pytest.raises(AlterError, match=r"t.yaml: unknown key 'where'; rows are left out of the data file"):
        Task.from_file(tmp_path / "t.yaml")
    with pytest.raises(AlterError, match=r"unknown key 'wher'; the keys are name, source, .*license\."):
        Task.from_dict({**task_dict(tmp_path), "wher": "x"}, "t.yaml")


def test_a_label_outside_the_choices_is_named_with_its_row(tmp_path):
    with pytest.raises(
        AlterError,
        match=r"t.yaml: task 't', train row 3: the label 'yess' is not one of the choices.*Did you mean 'yes'",
    ):
        make(tmp_path).render_target({"label": "yess"}, "train row 3")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ text.__init__.__globals__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1/0 }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(tmp_path, template):
    with pytest.raises(AlterError):
        make(tmp_path, prompt=template).render_prompt({"text": "a"})


@given(
    st.dictionaries(
        st.text(max_size=12),
        st.one_of(st.none(), st.text(max_size=5), st.integers(), st.lists(st.integers())),
        max_size=6,
    )
)
def test_whatever_stands_in_a_task_file_is_a_sentence_or_a_task(content):
    messages = ()
    try:
        Task.from_dict(content, "t.yaml")
    except AlterError as error:
        messages = error.messages
    assert all(message.startswith("t.yaml") for message in messages)


def test_json_in_a_prompt_is_what_a_person_would_write(tmp_path):
    task = make(tmp_path, prompt="{{ row | tojson }}")
    row = {"z": "Crohn's & Sjögren <b>", "a": [1, None]}
    assert task.render_prompt(row) == '{"a": [1, null], "z": "Crohn\'s & Sjögren <b>"}'
