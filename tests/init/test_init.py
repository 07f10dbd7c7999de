"""`alter init` as a user calls it: files of every kind become tasks that train unedited."""

import csv
import json
import random
from pathlib import Path

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from alter.cli import main
from alter.data import Task
from alter.errors import AlterError
from alter.init.write import _alike, init
from tests.data.conftest import make_words, words, write_jsonl  # noqa: F401 (a fixture)
from tests.test_cli import tiny_backbone

ROOT = Path(__file__).parents[2]

DRAW = random.Random(13)
WORDS = [f"w{i}" for i in range(90)]


def text(length=5):
    return " ".join(DRAW.choices(WORDS, k=length))


def write_csv(file, rows):
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A table of each kind of task, one in each kind of file."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    intents = [
        {"id": i, "Customer text": text(), "intent": DRAW.choice(["no", "refund", "delivery"])} for i in range(60)
    ]
    pairs = [{"premise": text(40), "hypothesis": text(), "gold": DRAW.choice([0, 1, 2])} for _ in range(90)]
    slots = [
        {"patientId": i // 4, "sentence": text(), "entities": [{"type": "Drug", "text": "w1"}] * (i % 3)}
        for i in range(120)
    ]
    titles = [{"body": None if i == 3 else text(12), "summary": f"{text(3)}\n{text(2)}"} for i in range(60)]
    write_csv(data / "Intents 2026.csv", intents)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs[:70]), data / "pairs-train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs[70:]), data / "pairs-test.parquet")
    write_jsonl(data / "slots.jsonl", slots)
    write_jsonl(data / "titles.jsonl", titles)
    (book := openpyxl.Workbook()).active.append(["question", "context", "answer"])
    for _ in range(40):
        context = DRAW.sample(WORDS, 30)
        book.active.append([text(2), " ".join(context), context[7]])
    book.save(data / "qa.xlsx")
    return sorted(data.iterdir())


def test_rows_of_one_patient_stay_together_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        f"{patient},note {patient} {visit},{'yes' if patient % 3 else 'no'}"
        for patient in range(1500)
        for visit in "ab"
    ]
    Path("notes.csv").write_text("\n".join(["mrn,note,admitted", *lines]) + "\n")
    main(["init", "mine", "notes.csv"])
    task = Task.from_file(tmp_path / "mine" / "tasks" / "notes.yaml")
    patients = [{row["mrn"] for row in task.opened.rows(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 1500
    assert all(patients)


@pytest.mark.parametrize(
    ("name", "repeats", "together"), [("patient_id", 40, True), ("note_id", 40, False), ("note_id", 100, True)]
)
def test_a_few_persons_of_two_rows_are_enough_to_keep_rows_together(tmp_path, monkeypatch, name, repeats, together):
    monkeypatch.chdir(tmp_path)
    ids = [*range(300 - repeats), *range(repeats)]
    lines = [f"{number},note {n},{'yes' if n % 3 else 'no'}" for n, number in enumerate(ids)]
    Path("notes.csv").write_text("\n".join([f"{name},note,admitted", *lines]) + "\n")
    main(["init", "mine", "notes.csv"])
    task = Task.from_file(tmp_path / "mine" / "tasks" / "notes.yaml")
    splits = [{row[name] for row in task.opened.rows(split)} for split in ("train", "validation", "test")]
    assert (sum(map(len, splits)) == len(set.union(*splits))) == together


def test_of_several_ids_the_patients_rows_stay_together_and_rows_of_nobody_are_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [  # a patient has five encounters of two rows; ten rows of each hundred name nobody
        f"{n // 2},{n // 10 if n % 100 >= 10 else ''},{n % 40},note {n},{'yes' if n % 3 else 'no'}" for n in range(1200)
    ]
    Path("notes.csv").write_text("\n".join(["encounter_id,patient_id,shelf_id,note,admitted", *lines]) + "\n")
    main(["init", "mine", "notes.csv"])
    out = " ".join(capsys.readouterr().out.split())
    assert "together rows of the same patient_id stay in one split; 120 rows have none" in out
    assert "not encounter_id an id, and not all rows of one stay together" in out
    task = Task.from_file(tmp_path / "mine" / "tasks" / "notes.yaml")
    splits = [list(task.opened.rows(split)) for split in ("train", "validation", "test")]
    patients = [{row["patient_id"] for row in rows} - {""} for rows in splits]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 108
    assert all(sum(row["patient_id"] == "" for row in rows) >= 5 for rows in splits)


def test_of_ids_that_name_no_person_the_one_of_fewest_values_decides(tmp_path, capsys):
    rows = [{"visit_id": i // 2, "episode_id": i // 8, "text": text(), "label": "ab"[i % 2]} for i in range(400)]
    main(["init", str(tmp_path / "mine"), str(write_csv(tmp_path / "x.csv", rows))])
    assert "rows of the same episode_id stay in one split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("blood_test_notes.csv", "blood_test_notes"),
        ("train_intents.csv", "intents"),
        ("Ärzte 2.csv", "ärzte_2"),
        ("A\u0308rzte.csv", "ärzte"),  # as macOS writes it
        ("内科.csv", "内科"),
        ("2024-01-15.csv", "2024_01_15"),  # which YAML could take for a number
        ("null.csv", "null"),
        ("yes.csv", "yes"),
    ],
)
def test_a_task_is_named_after_its_file(tmp_path, name, task, capsys):
    rows = [{"text": text(), "label": "ab"[i % 2]} for i in range(40)]
    main(["init", str(tmp_path / "mine"), str(write_csv(tmp_path / name, rows))])
    assert f"{task}: classification" in capsys.readouterr().out
    assert Task.from_file(tmp_path / "mine" / "tasks" / f"{task}.yaml").name == task


def test_a_folder_and_a_split_without_its_training_rows_are_told_as_that(tmp_path, capsys):
    rows = [{"text": text(), "label": "ab"[i % 2]} for i in range(40)]
    file = write_csv(tmp_path / "blood_test.csv", rows)
    for name, sentence in ((tmp_path, "a folder; name the files in it"), (file, "the test rows of a task 'blood'")):
        with pytest.raises(SystemExit):
            main(["init", str(tmp_path / "mine"), str(name)])
        assert sentence in capsys.readouterr().err


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.text("abc d'\"#:,{}[]\u00fc", min_size=1, max_size=40).map(str.strip).filter(bool),
        min_size=2,
        max_size=30,
        unique=True,
    )
)
def test_the_choices_written_are_the_labels_whatever_blanks_they_have(tmp_path_factory, labels):
    folder = tmp_path_factory.mktemp("x")
    rows = [{"text": text(), "label": f"{label}  {label}"} for label in labels * 20]
    init(folder / "mine", [write_jsonl(folder / "x.jsonl", rows)], "backbone", "label")
    task = Task.from_file(folder / "mine" / "tasks" / "x.yaml")
    assert task.choices is None or sorted(task.choices) == sorted({row["label"] for row in rows})
    assert task.choices is not None or max(len(row["label"]) for row in rows) > 60


def test_every_kind_of_file_and_task_is_told_and_written(files, tmp_path, capsys):
    main(["init", "mine", *map(str, files)])
    out = capsys.readouterr().out
    blocks = {block.split(":")[0]: block for block in out.split("\n\n")}
    tasks = {file.stem: Task.from_file(file) for file in (tmp_path / "mine" / "tasks").iterdir()}
    assert set(tasks) == {"intents_2026", "pairs", "qa", "slots", "titles"}
    kinds = {name: blocks[name].split(", from")[0].split(": ")[1] for name in tasks}
    assert kinds == {
        "intents_2026": "classification", "pairs": "pair", "qa": "extraction", "slots": "extraction", "titles": "generation",
    }  # fmt: skip
    assert tasks["intents_2026"].choices == ["delivery", "no", "refund"]
    assert "not id" in blocks["intents_2026"]
    assert tasks["pairs"].choices == ["0", "1", "2"]
    assert "one of 0, 1, 2" in tasks["pairs"].prompt
    assert tasks["pairs"].truncate == "premise"
    assert "20 test" in blocks["pairs"]
    assert tasks["qa"].metrics == ["exact_match", "token_f1"]
    row = {"sentence": "s", "entities": [{"type": "Drug", "text": "a"}, {"type": "Disease", "text": "b"}]}
    assert tasks["slots"].render_target(row) == "Drug: a; Disease: b"
    assert tasks["slots"].render_target({**row, "entities": []}) == "none"
    assert "rows of the same patientId stay in one split" in blocks["slots"]
    groups = [{r["patientId"] for r in tasks["slots"].opened.rows(split)} for split in ("train", "validation", "test")]
    assert all(groups)
    assert not groups[0] & groups[2]
    assert tasks["titles"].render_target({"summary": "a\nb"}) == "a b"
    assert tasks["titles"].render_prompt({"body": None}) == "Body: \nSummary:"
    recipe = (tmp_path / "mine" / "recipe.yaml").read_text()
    assert recipe.count("#") > 15
    assert "alter fit --config mine/recipe.yaml" in out


def test_fit_works_on_the_result_unedited(files, tmp_path):
    tokenizer = make_words(tmp_path / "tokenizer", ["refund", "delivery", "0", "1", "2"])
    tiny_backbone(tmp_path / "backbone", tokenizer, "llama")
    main(["init", "mine", *map(str, files), "--backbone", "backbone"])
    main(["fit", "--config", "mine/recipe.yaml"])
    results = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())
    assert {task: next(iter(metrics)) for task, metrics in results["tasks"].items()} == {
        "intents_2026": "accuracy", "pairs": "accuracy", "qa": "exact_match", "slots": "span_f1", "titles": "rouge1",
    }  # fmt: skip


def test_the_recipe_has_the_settings_that_a_real_mixture_was_tuned_to(files, tmp_path):
    main(["init", "mine", *map(str, files)])
    proposed = yaml.safe_load((tmp_path / "mine" / "recipe.yaml").read_text())
    tuned = yaml.safe_load((ROOT / "recipes" / "customer_service.yaml").read_text())
    del proposed["stage1"]["model"]["init_args"]["layers"]  # fewer, to be done sooner
    del tuned["stage1"]["model"]["init_args"]["layers"]
    del tuned["stage1"]["model"]["init_args"]["router"]  # said though it is the default
    assert {key: proposed[key] for key in ("trainer", "stage1", "stage2")} == {
        key: tuned[key] for key in ("trainer", "stage1", "stage2")
    }


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_published(folder):
    """Rows in the shapes of published data: questions with a mapping of answers, chats, tagged words."""
    folder.mkdir()
    asked = []
    for i in range(60):
        words_of_it = DRAW.sample(WORDS, 30)
        answers = {"text": [words_of_it[7], "x"], "answer_start": [3, 9]} if i % 9 else {"text": [], "answer_start": []}
        asked.append({"context": " ".join(words_of_it), "question": text(3), "answers": answers})
    chats = [
        chat(("system", "be brief"), ("user", text(300 if i == 4 else 6)), ("assistant", text(4))) for i in range(60)
    ]
    tagged = [{"id": str(i), "tokens": DRAW.choices(WORDS, k=n), "ner_tags": (["B-Drug", "I-Drug", "O"] * n)[:n]}
              for i in range(60) for n in [700 if i == 4 else 3 + i % 6]]  # fmt: skip
    write_jsonl(folder / "squad.jsonl", asked)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(asked), folder / "squad_table.parquet")
    write_jsonl(folder / "chats.jsonl", chats)
    write_jsonl(folder / "tagged.jsonl", tagged)
    return sorted(folder.iterdir())


def test_data_as_they_are_published_are_learned_from_unedited(tmp_path, words, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    tiny_backbone(tmp_path / "backbone", words, "llama")
    main(["init", "mine", *map(str, write_published(tmp_path / "data")), "--backbone", "backbone"])
    told = " ".join(capsys.readouterr().out.split())
    assert "answers (by its name), of its texts the first; none where there is none" in told
    assert "each role of messages is a column of its own" in told
    tasks = {file.stem: Task.from_file(file) for file in (tmp_path / "mine" / "tasks").iterdir()}
    for name in ("squad", "squad_table"):
        assert tasks[name].metrics == ["exact_match", "token_f1"]
        assert tasks[name].render_target({"answers": {"text": ["a b", "c"], "answer_start": [1, 2]}}) == "a b"
        assert tasks[name].render_target({"answers": {"text": [], "answer_start": []}}) == "none"
    row = next(tasks["chats"].opened.rows("train"))
    assert tasks["chats"].render_prompt(row) == f"User: {row['user']}\nAssistant:"
    assert tasks["chats"].render_target(row) == row["assistant"]
    main(["fit", "--config", "mine/recipe.yaml"])
    results = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())
    assert {task: next(iter(metrics)) for task, metrics in results["tasks"].items()} == {
        "chats": "rouge1", "squad": "exact_match", "squad_table": "exact_match", "tagged": "span_f1",
    }  # fmt: skip


TAGS = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), min_size=1, max_size=8)


def spans(tokens, tags):
    """Spans of tagged words, read one word after the other; an inside tag without a beginning begins a span too."""
    found, last = [], "O"
    for word, tag in zip(tokens, tags, strict=True):
        if tag != "O" and tag == f"I-{last[2:]}":
            found[-1] += f" {word}"
        elif tag != "O":
            found.append(f"{tag[2:]}: {word}")
        last = tag
    return "; ".join(found) or "none"


@given(st.lists(TAGS, min_size=30, max_size=30), st.booleans())
@settings(max_examples=25, deadline=None)
def test_tags_of_words_become_a_list_of_spans(tmp_path_factory, tags, beside_a_text):
    folder = tmp_path_factory.mktemp("x")
    rows = [{"words": DRAW.choices(WORDS, k=len(t)), "pos": ["N"] * len(t), "ner_tags": t} for t in tags]
    rows = [{**row, "text": " ".join(row["words"])} for row in rows] if beside_a_text else rows
    init(folder / "mine", [write_jsonl(folder / "x.jsonl", rows)], "backbone")
    task = Task.from_file(folder / "mine" / "tasks" / "x.yaml")
    for row in rows:
        assert task.render_target(row) == spans(row["words"], row["ner_tags"])
        assert task.render_prompt(row).splitlines()[0].endswith(f": {' '.join(row['words'])}")
        assert task.render_prompt({**row, "words": " ".join(row["words"])}) == task.render_prompt(row)


def told_of(rows, tmp_path, capsys):
    """What is said of the rows of a file, and the task."""
    main(["init", str(tmp_path / "mine"), str(write_jsonl(tmp_path / "x.jsonl", rows))])
    told = " ".join(capsys.readouterr().out.split())
    return told, Task.from_file(tmp_path / "mine" / "tasks" / "x.yaml")


def test_a_code_of_its_own_in_every_row_is_not_read(tmp_path, capsys):
    rows = [{"ticket": f"T{i:05}", "text": text(), "label": "xy"[i % 2]} for i in range(40)]
    told, task = told_of(rows, tmp_path, capsys)
    assert "not ticket a code of its own in every row" in told
    assert task.fields == ["text"]


def test_a_code_is_read_where_there_is_nothing_else(tmp_path, capsys):
    rows = [{"code": f"I{i}.1", "description": text(8)} for i in range(40)]
    _, task = told_of(rows, tmp_path, capsys)
    assert task.fields == ["code"]


@pytest.mark.parametrize(
    ("names", "lengths", "kind"),
    [
        (("title", "review"), (4, 40), "classification"),
        (("title", "review", "date"), (4, 40, 1), "classification"),
        (("premise", "hypothesis"), (40, 4), "pair"),
        (("text_a", "text_b"), (40, 4), "pair"),
        (("sentence1", "sentence2"), (4, 40), "pair"),
        (("chq", "faq"), (5, 8), "pair"),
    ],
)
def test_a_pair_is_two_texts_of_a_like_kind(names, lengths, kind, tmp_path, capsys):
    rows = [
        {name: text(length) for name, length in zip(names, lengths, strict=True)} | {"label": "xy"[i % 2]}
        for i in range(60)
    ]
    told, _ = told_of(rows, tmp_path, capsys)
    assert told.startswith(f"x: {kind},")


@pytest.mark.parametrize(
    ("asked", "answered", "expected"), [(5, 5, 256), (60, 5, 288), (60, 100, 512), (400, 200, 768)]
)
def test_a_batch_holds_a_long_example(asked, answered, expected, tmp_path, capsys):
    rows = [{"question": text(asked), "reply": text(answered)} for _ in range(40)]
    init(tmp_path / "mine", [write_jsonl(tmp_path / "x.jsonl", rows)], "backbone")
    task = Task.from_file(tmp_path / "mine" / "tasks" / "x.yaml")
    found = yaml.safe_load((tmp_path / "mine" / "recipe.yaml").read_text())["data"]["max_tokens"]
    assert found == max(256, task.max_prompt_tokens + task.max_target_tokens)
    assert found == expected


@pytest.mark.parametrize(
    ("form", "needed"),
    [("DE{:020d}", 24), ("2024-10-{0:02d} 04:{0:02d}:25", 21), ("+49 170 {:07d}", 17)],
)
def test_an_answer_of_digits_has_a_token_for_each(form, needed, tmp_path):
    """Many tokenizers, SmolLM2's among them, write a token a digit; the end of the answer and the space before it are two more."""
    rows = [{"note": text(), "answer": form.format(i + 10)} for i in range(60)]
    init(tmp_path / "mine", [write_csv(tmp_path / "x.csv", rows)], "backbone")
    assert Task.from_file(tmp_path / "mine" / "tasks" / "x.yaml").max_target_tokens >= needed


def test_pairs_that_come_twice_stay_in_one_split(tmp_path, capsys):
    """Under other ids they are no equal rows."""
    rows = [{"id": n, "claim": text(60), "evidence": text(60), "label": "xy"[n % 2]} for n in range(60)]
    told, task = told_of([*rows, *({**row, "id": row["id"] + 60} for row in rows)], tmp_path, capsys)
    assert "rows of the same claim and evidence stay in one split" in told
    sides = [{r["claim"] for r in task.opened.rows(split)} for split in ("train", "validation", "test")]
    assert [sum(map(len, sides)), len(set.union(*sides))] == [60, 60]


@pytest.mark.parametrize(
    "beside",
    [
        lambda n: {"history": "" if n % 3 else f"none known {n % 2}"},  # an empty cell among what is read
        lambda n: {"date": f"2024-{n % 12 + 1:02d}-{n % 27 + 1:02d}"},
        lambda n: {"amount": f"{n * 37 % 900},{n % 90 + 10}"},
    ],
)
def test_texts_that_come_more_than_once_stay_in_one_split_whatever_else_is_read(beside, tmp_path, capsys):
    notes = [text(60) for _ in range(60)]
    rows = [{"note": notes[n * n % 60], **beside(n), "label": "xy"[n % 5 % 2]} for n in range(400)]
    _, task = told_of(rows, tmp_path, capsys)
    train, test = ({task.render_prompt(r) for r in task.opened.rows(split)} for split in ("train", "test"))
    assert test
    assert not train & test
    if "history" not in rows[0]:
        sides = [{r["note"] for r in task.opened.rows(split)} for split in ("train", "test")]
        assert not sides[0] & sides[1]


@pytest.mark.parametrize("name", ["t", "e", "loop", "row"])
def test_a_column_may_be_called_as_the_templates_own_variables(name, tmp_path, capsys):
    tags = [["B-X", "I-X", "O"], ["O", "O", "B-Y"]]
    for columns in ((name, "tags"), ("tokens", name)):
        rows = [dict(zip(columns, ([f"a{n}", "b", "c"], tags[n % 2]), strict=True)) for n in range(60)]
        folder = tmp_path / columns[0]
        folder.mkdir()
        _, task = told_of(rows, folder, capsys)
        for row in task.opened.rows("train"):
            expected = f"X: {row[columns[0]][0]} b" if row[columns[1]][0] == "B-X" else "Y: c"
            assert task.render_target(row) == expected


def test_pairs_of_few_values_are_split_by_rows(tmp_path, capsys):
    pairs = [("red", "large"), ("blue", "small")]
    rows = [{"id": n, "colour": pairs[n % 2][0], "size": pairs[n % 2][1], "label": "xy"[n % 3 // 2]} for n in range(90)]
    told, task = told_of(rows, tmp_path, capsys)
    assert "reads colour" in told
    assert "together" not in told
    assert all(any(True for _ in task.opened.rows(split)) for split in ("train", "validation", "test"))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [chat(("user", "a"), ("assistant", "b"), ("user", "c"))] * 30,
            "row 1: 'messages' is not one text of the user",
        ),
        (
            [{"tokens": ["a", "b"], "ner_tags": [0, 1]}] * 30,
            "ner_tags (a list of numbers; tags are texts such as B-Drug",
        ),
        ([{"tokens": ["a", "b"], "pos_tags": ["N", "V"]}] * 30, "a list of as many words is enough"),
        ([{"text": f"t {i}", "label": {"name": "x", "id": i % 2}} for i in range(30)], "label (a mapping)"),
    ],
)
def test_rows_of_json_are_refused_in_words_that_fit_them(rows, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "mine"), str(write_jsonl(tmp_path / "x.jsonl", rows))])
    refused = capsys.readouterr().err
    assert sentence in refused
    assert "CSV" not in refused


def test_a_mapping_is_no_answer_though_it_is_named(tmp_path, capsys):
    rows = [{"text": f"t {i}", "label": {"name": "x", "id": i % 2}} for i in range(30)]
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "mine"), str(write_jsonl(tmp_path / "x.jsonl", rows)), "--answer", "label"])
    assert "the column 'label', is a mapping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"a:label": f"{i}:x"} for i in range(30)], "a CSV file has commas"),
        ([{"text": text(), "size": i} for i in range(30)], "a number of its own in every row); add what is missing."),
        (
            [{"text": text(), "label": "xy"[i % 2] if i else ""} for i in range(30)],
            "the answer, the column 'label', is empty in 1",
        ),
        ([{"text": text(), "label": "x"} for i in range(5)], "5 rows are too few"),
        ([{"size": i % 7, "label": i % 2} for i in range(30)], "no column holds text to read"),
    ],
)
def test_what_cannot_be_learned_from_is_one_sentence_and_nothing_is_written(rows, sentence, tmp_path, capsys):
    file = write_csv(tmp_path / "x.csv", rows)
    with pytest.raises(SystemExit) as stop:
        main(["init", str(tmp_path / "mine"), str(file)])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_file_of_a_name_that_no_task_may_have_is_proposed_under_another(tmp_path, capsys):
    rows = "\n".join(f"text of row {n},{'yes' if n % 2 else 'no'}" for n in range(40))
    (tmp_path / "auto.csv").write_text(f"text,label\n{rows}\n")
    main(["init", str(tmp_path / "out"), str(tmp_path / "auto.csv")])
    assert "auto_task: classification" in capsys.readouterr().out
    assert Task.from_file(tmp_path / "out" / "tasks" / "auto_task.yaml").name == "auto_task"


def test_nothing_is_overwritten_and_two_files_of_one_task_are_refused(files, tmp_path, capsys):
    main(["init", "mine", str(files[0])])
    (tmp_path / "mine" / "recipe.yaml").write_text("mine")
    write_csv(tmp_path / "intents-2026.csv", [{"text": text(), "label": i % 2} for i in range(30)])
    for arguments, sentence in (
        (["mine", str(files[0])], "is there already"),
        (["other", str(files[0]), "intents-2026.csv"], "are also those of"),
    ):
        with pytest.raises(SystemExit):
            main(["init", *arguments])
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "mine" / "recipe.yaml").read_text() == "mine"


TEXTS = st.sampled_from(["a", "b c", "{{", "ü\nx", "#: '\"", "\ud83d"])
LISTS = st.lists(st.fixed_dictionaries({"type": st.just("T"), "text": st.text("ab", min_size=1)}), max_size=2)
ANSWERS = st.fixed_dictionaries(
    {"text": st.lists(TEXTS, max_size=2), "answer_start": st.lists(st.integers(0, 3), max_size=2)}
)
CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(-1, 1), st.just(float("nan")), TEXTS, st.lists(TEXTS, max_size=2), LISTS, ANSWERS,
    st.dictionaries(st.sampled_from(["text", "a"]), TEXTS, max_size=2),
)  # fmt: skip
COLUMNS = st.one_of(*(st.lists(cells, min_size=2, max_size=6) for cells in (TEXTS, TEXTS, LISTS, ANSWERS, CELLS)))
NAMES = st.sampled_from(
    ["text", "label", "a b", "class", "id", "row", "not", "x{{y", "summary", "it's", "Ω", "self", "m²", "a\nb"]
)


@given(st.data())
@settings(max_examples=100)
def test_whatever_a_table_holds_its_task_renders_every_row_or_is_refused_in_a_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("x")
    columns = data.draw(st.dictionaries(NAMES, COLUMNS, min_size=1, max_size=4))
    rows = [
        {name: cells[(i * (k + 1)) % len(cells)] for k, (name, cells) in enumerate(columns.items())} for i in range(40)
    ]
    file = write_jsonl(folder / "x.jsonl", rows)
    try:
        init(folder / "mine", [file], "backbone")
    except AlterError:
        assert not (folder / "mine").exists()
        return
    task = Task.from_file(folder / "mine" / "tasks" / "x.yaml")
    assert yaml.safe_load((folder / "mine" / "recipe.yaml").read_text())["data"]["tasks"] == ["tasks/x.yaml"]
    for row in rows:
        assert "TemplateReference" not in task.render_prompt(row)
        assert task.render_target(row)
        assert "{'" not in task.render_prompt(row) + task.render_target(row)  # no mapping of Python


def test_the_answer_is_the_column_that_one_names_where_it_is_there(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(
        "customer;text;group;note\n" + "".join(f"K{n % 9};t{n} x;{n % 3};n{n}\n" for n in range(60))
    )
    (tmp_path / "b.csv").write_text(
        "text,label\n" + "".join(f"t{n} y,{('Yes', 'yes', 'no')[n % 3]}\n" for n in range(60))
    )
    files = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    main(["init", str(tmp_path / "out"), *files, "--answer", "group"])
    told = " ".join(capsys.readouterr().out.split())
    assert "answers group (as told)" in told
    assert "answers label (by its name)" in told
    assert "alike Yes and yes may be one answer in two spellings" in told
    assert yaml.safe_load((tmp_path / "out" / "tasks" / "a.yaml").read_text())["target"] == "{{ group }}"
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "other"), *files, "--answer", "groop"])
    assert "--answer: no file has a column 'groop'. Did you mean 'group'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choices", "alike"),
    [
        (["1", "2", "1.0"], ["1", "1.0"]),
        (["1.5", "15", "1"], []),
        (["Geb\u00fchr", "Karte", "Gebu\u0308hr"], ["Geb\u00fchr", "Gebu\u0308hr"]),
        (["true", "yes", "no"], ["true", "yes"]),
        (["a  b", "a b"], ["a  b", "a b"]),
        (["v1", "v1.0"], []),
    ],
)
def test_one_answer_in_two_spellings_is_told(choices, alike):
    assert _alike(choices) == alike


def test_a_file_that_is_given_is_not_called_a_share(tmp_path, capsys):
    rows = [{"text": f"{text()} {n}", "label": "xy"[n % 2]} for n in range(60)]
    files = {"a.train.jsonl": [*rows, *rows[:20]], "a.test.jsonl": rows[:10]}
    paths = [str(write_jsonl(tmp_path / name, lines)) for name, lines in files.items()]
    main(["init", str(tmp_path / "mine"), *paths])
    told = " ".join(capsys.readouterr().out.split())
    assert "/ 10 test (validation a share of train drawn by a seed, test as its file has it)" in told
    assert "stay in one split where a.train.jsonl is divided" in told
