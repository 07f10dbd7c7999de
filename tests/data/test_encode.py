import json
import multiprocessing
import subprocess
import sys

import datasets
import pytest
from transformers import AutoTokenizer

from alter.data import Task, encode_choices
from alter.data.encode import encode_prompt, encode_task, prompt_ids, shorten, target_ids
from alter.errors import AlterError
from tests.data.conftest import rows, task_dict, write_jsonl


def make(folder, **changes):
    return Task.from_dict(task_dict(folder, **changes), "t.yaml")


def encode(task, tokenizer, cache, seq2seq=False, seed=13):
    folder = encode_task(task, tokenizer, seq2seq, cache, seed)
    return {
        s: datasets.Dataset.from_file(str(folder / s / "data.arrow")) for s in ("train", "validation", "test")
    }, folder


@pytest.mark.parametrize("seq2seq", [False, True])
def test_every_row_becomes_its_prompt_and_target_tokens(tmp_path, tokenizer, seq2seq):
    task = make(tmp_path)
    found, _ = encode(task, tokenizer, tmp_path / "cache", seq2seq)
    source = rows(40, 1)
    assert len(found["train"]) == 40
    for row, example in zip(source, found["train"], strict=True):
        words = [int(w[1:]) + 3 for w in row["text"].split()]
        assert example["prompt_ids"] == [*words, 505, *([1] if seq2seq else [])]
        assert example["target_ids"] == [503 if row["label"] == "yes" else 504, 1]
        assert example["choice"] == ["yes", "no"].index(row["label"])
        assert example["prompt"] == f"{row['text']} :"
        assert example["target"] == row["label"]
    assert encode_choices(task, tokenizer, seq2seq) == [[503, 1], [504, 1]]
    assert encode_prompt(task, source[5], tokenizer, seq2seq) == found["train"][5]["prompt_ids"]


def test_no_example_of_the_test_split_is_in_the_training_split(tmp_path, tokenizer):
    write_jsonl(tmp_path / "all.jsonl", rows(300) + rows(300, 5) + rows(300))  # the first 300 come twice
    task = make(
        tmp_path, source={"class_path": "Files", "init_args": {"train": str(tmp_path / "all.jsonl"), "test": 0.2}}
    )
    found, _ = encode(task, tokenizer, tmp_path / "cache")
    prompts = {split: {(e["prompt"], e["target"]) for e in found[split]} for split in found}
    assert all(prompts.values())
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]


def test_a_long_prompt_loses_the_end_of_the_named_field_alone(tmp_path, tokenizer):
    task = make(tmp_path, prompt="w1 w2 {{ text }} w3 {{ label }} :", max_prompt_tokens=10, truncate="text")
    write_jsonl(
        tmp_path / "t.train.jsonl", [{"text": " ".join(f"w{i}" for i in range(50, 80)), "label": "no"}, *rows(3)]
    )
    found, folder = encode(task, tokenizer, tmp_path / "cache")
    assert found["train"][0]["prompt"] == "w1 w2 w50 w51 w52 w53 w54 w3 no :"
    assert len(found["train"][0]["prompt_ids"]) == 10
    assert found["train"][0]["target"] == "no"
    assert json.loads((folder / "stats.json").read_text())["train"]["truncated"] == 1


def test_a_long_prompt_loses_the_last_items_of_a_list(tmp_path, tokenizer):
    task = make(tmp_path, prompt="w1 {{ text | join(' ') }} w3 :", max_prompt_tokens=6, truncate="text")
    write_jsonl(tmp_path / "t.train.jsonl", [{"text": [f"w{i}" for i in range(50, 80)], "label": "no"}])
    found, _ = encode(task, tokenizer, tmp_path / "cache")
    assert found["train"][0]["prompt"] == "w1 w50 w51 w52 w3 :"
    words = tuple(f"w{i}" for i in range(50, 80))  # as a function may give them
    prompt, _ = shorten(task, {"text": words}, tokenizer, False, "train row 1")
    assert prompt == "w1 w50 w51 w52 w3 :"


@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_long_target_is_cut_for_learning_and_stays_whole_for_the_metrics(tmp_path, tokenizer, seq2seq):
    changes = {"choices": None, "target": "{{ text }}", "max_target_tokens": 3, "truncate_target": True}
    found, _ = encode(make(tmp_path, **changes), tokenizer, tmp_path / "cache", seq2seq)
    for split, source in (("train", rows(40, 1)), ("validation", rows(6, 2)), ("test", rows(6, 3))):
        for row, example in zip(source, found[split], strict=True):
            words = [int(w[1:]) + 3 for w in row["text"].split()]
            assert example["target"] == row["text"]
            assert example["target_ids"] == [*words, 1][:3]  # one that is cut does not end


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_prompt_tokens": 2},
            r"t.yaml: task 't', train row \d+: the prompt has more than max_prompt_tokens 2.*'truncate' names no field",
        ),
        (
            {"max_prompt_tokens": 1, "truncate": "text", "prompt": "w1 w2 {{ text }}"},
            r"even without its field 'text'; raise max_prompt_tokens",
        ),
        ({"max_prompt_tokens": 2, "truncate": "txt"}, r"names 'txt', which the row does not have"),
        ({"max_target_tokens": 1}, r"train row 1: the target has 2 tokens, more than max_target_tokens 1; raise it"),
        ({"choices": ["yes", "maybe"]}, r"train row 2: the label 'no' is not one of the choices"),
        ({"prompt": "{{ txt }}"}, r"names 'txt'.*Did you mean 'text'\? So it is in \d+ rows\."),
        ({"prompt": "{{ row['txt'] }}"}, r"names 'txt'.*Did you mean 'text'"),
        (
            {"target": "{{ label if label == 'yes' else '' }}"},
            r"train row 2: the target is empty; mend or remove the row",
        ),
        ({"target": "{{ label if label == 'yes' else '' }}", "choices": None}, r"train row 2: the target is empty"),
        (
            {"prompt": "{{ text if label == 'yes' else '' }}"},
            r"train row 2: the prompt is empty; remove the row, or write",
        ),
        ({"test": 0}, r"the test split has no rows"),
        ({"train": 0}, r"the train split has no rows"),
    ],
)
def test_bad_rows_are_told_by_number_and_nothing_is_kept(tmp_path, tokenizer, changes, message):
    task = make(tmp_path, **changes)
    with pytest.raises(AlterError, match=message) as error:
        encode_task(task, tokenizer, False, tmp_path / "cache", 13)
    assert len(error.value.messages) <= 5
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_mistakes_of_all_splits_are_told_at_once(tmp_path, tokenizer):
    task = make(tmp_path, choices=["yes", "maybe"])
    with pytest.raises(AlterError) as error:
        encode_task(task, tokenizer, False, tmp_path / "cache", 13)
    assert [text.split("task 't', ")[1].split(" ")[0] for text in error.value.messages] == [
        "train",
        "validation",
        "test",
    ]


def test_tokens_are_made_once_and_again_when_something_changed(tmp_path, tokenizer, words):
    task, cache = make(tmp_path), tmp_path / "cache"
    first = encode_task(task, tokenizer, False, cache, 13)
    stamp = (first / "stats.json").stat().st_mtime_ns
    assert encode_task(task, tokenizer, False, cache, 13) == first
    assert (first / "stats.json").stat().st_mtime_ns == stamp
    other = AutoTokenizer.from_pretrained(words)
    other.add_tokens("::")
    others = [
        encode_task(task, other, False, cache, 13),
        encode_task(make(tmp_path, prompt="{{ text }} ::"), tokenizer, False, cache, 13),
        encode_task(make(tmp_path), tokenizer, True, cache, 13),
        encode_task(make(tmp_path, train=41), tokenizer, False, cache, 13),
    ]
    assert len({first, *others}) == 5


def test_a_limit_draws_rows_by_seed(tmp_path, tokenizer):
    task = make(tmp_path, train=100, limit={"train": 10})
    texts = [encode(task, tokenizer, tmp_path / "cache", seed=seed)[0]["train"]["prompt"][:] for seed in (13, 14)]
    whole = [f"{row['text']} :" for row in rows(100, 1)]
    assert len(texts[0]) == len(texts[1]) == 10
    assert texts[0] != texts[1]
    assert [whole.index(t) for t in texts[0]] == sorted(whole.index(t) for t in texts[0])


def test_the_rows_to_measure_on_are_those_of_every_seed(tmp_path, tokenizer):
    task = make(tmp_path, train=100, validation=50, test=50, limit={"train": 10, "validation": 10, "test": 10})
    found = [encode(task, tokenizer, tmp_path / "cache", seed=seed)[0] for seed in (13, 14)]
    drawn = [{split: splits[split]["prompt"][:] for split in ("train", "validation", "test")} for splits in found]
    assert drawn[0]["train"] != drawn[1]["train"]
    assert all(drawn[0][split] == drawn[1][split] and len(drawn[0][split]) == 10 for split in ("validation", "test"))


def _encode_in_process(arguments):
    task, words, cache = arguments
    return str(encode_task(task, AutoTokenizer.from_pretrained(words), False, cache, 13))


def test_two_processes_at_once_do_not_clash(tmp_path, words):
    task = make(tmp_path, train=500)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.map(_encode_in_process, [(task, words, tmp_path / "cache")] * 2)
    assert folders[0] == folders[1]
    assert len(datasets.Dataset.from_file(f"{folders[0]}/train/data.arrow")) == 500
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [folders[0].rsplit("/", 1)[1]]


def test_a_half_written_folder_is_not_used(tmp_path, tokenizer):
    task = make(tmp_path)
    folder = encode_task(task, tokenizer, False, tmp_path / "cache", 13)
    (folder / "stats.json").unlink()  # written last
    (folder / "train" / "data.arrow").write_bytes(b"half")
    found, again = encode(task, tokenizer, tmp_path / "cache")
    assert again == folder
    assert len(found["train"]) == 40


@pytest.mark.slow
def test_memory_stays_flat_on_many_rows(tmp_path, words):
    code = f"""
import json, sys
from alter.machine import peak_memory_bytes
from transformers import AutoTokenizer
from alter.data import Task
from alter.data.encode import encode_task
tokenizer = AutoTokenizer.from_pretrained({str(words)!r})
task = Task.from_dict(json.load(open(sys.argv[1])), "t.yaml")
encode_task(task, tokenizer, False, __import__("pathlib").Path(sys.argv[2]), 13)
print(peak_memory_bytes())
"""
    peaks = []
    for count in (2_000, 150_000):
        content = task_dict(tmp_path, f"t{count}", train=4)
        with open(content["source"]["init_args"]["train"], "w") as stream:
            for i in range(count):
                stream.write(json.dumps({"text": f"w{i % 500} w{i % 7}", "label": "yes", "n": "x" * 300}) + "\n")
        (tmp_path / "task.json").write_text(json.dumps(content))
        output = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "task.json"), str(tmp_path / "cache")],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        peaks.append(int(output.split()[-1]))
    assert peaks[1] - peaks[0] < 60 * 2**20  # the rows alone are over 50 MB, as Python objects several times that


def test_a_tokenizer_in_python_shortens_a_long_prompt_too(tmp_path):
    from transformers import ByT5Tokenizer

    task = make(tmp_path, prompt="{{ text }} :", max_prompt_tokens=40, truncate="text")
    write_jsonl(tmp_path / "t.train.jsonl", [{"text": "x" * 90, "label": "no"}, *rows(3)])
    found, _ = encode(task, ByT5Tokenizer(), tmp_path / "cache", seq2seq=True)
    assert found["train"][0]["prompt"] == "x" * 37 + " :"
    assert len(found["train"][0]["prompt_ids"]) == 40


def test_choices_that_the_tokenizer_cannot_tell_apart_are_refused(tmp_path, tokenizer):
    write_jsonl(
        tmp_path / "t.train.jsonl", [{"text": "w1", "label": label} for label in ("\u2265", "\u2264", "w5") * 4]
    )
    task = make(tmp_path, choices=["\u2265", "\u2264", "w5"])
    with pytest.raises(AlterError, match=r"key 'choices': '\u2265' and '\u2264' are the same tokens") as error:
        encode(task, tokenizer, tmp_path / "cache")
    assert len(error.value.messages) == 1


def test_targets_with_signs_that_the_vocabulary_lacks_are_counted(tmp_path, tokenizer):
    task = make(tmp_path, choices=None, metrics=[])
    labels = ("w5 \u2265 w6", "w7", "\u2265")
    write_jsonl(tmp_path / "t.train.jsonl", [{"text": "w1", "label": label} for label in labels])
    found, folder = encode(task, tokenizer, tmp_path / "cache")
    stats = json.loads((folder / "stats.json").read_text())
    assert [stats[split]["unknown_signs"] for split in stats] == [2, 0, 0]
    assert found["train"][0]["target"] == "w5 \u2265 w6"


def test_code_of_ones_own_has_tokens_of_its_own(tmp_path, tokenizer):
    class Loud(Task):
        def render_prompt(self, row, place=""):
            return "w9"

    arguments = make(tmp_path).to_dict()
    plain, own = (
        {row["prompt"] for row in encode(kind(**arguments), tokenizer, tmp_path / "cache")[0]["train"]}
        for kind in (Task, Loud)
    )
    assert own == {"w9"}
    assert "w9" not in plain


def test_only_a_text_or_a_list_is_shortened(tmp_path, tokenizer):
    task = make(tmp_path, prompt="{{ part.text }} :", max_prompt_tokens=4, truncate="part")
    with pytest.raises(
        AlterError, match="'truncate' names 'part', which has parts of its own; name a field that is a text"
    ):
        encode_prompt(task, {"part": {"text": "w1 " * 9}}, tokenizer, False)


@pytest.mark.parametrize("length", [3, 60])
def test_half_an_emoji_is_a_question_mark_wherever_it_comes_from(tmp_path, tokenizer, length):
    task = make(tmp_path, max_prompt_tokens=10, truncate="text")
    cut = " ".join(["w5"] * length)
    assert encode_prompt(task, {"text": f"{cut} \ud83d"}, tokenizer, False) == encode_prompt(
        task, {"text": f"{cut} ?"}, tokenizer, False
    )
    assert target_ids(["w5 \ud83d"], tokenizer, False) == target_ids(["w5 ?"], tokenizer, False)
    assert prompt_ids(["w5 \ud83d"], tokenizer, False) == prompt_ids(["w5 ?"], tokenizer, False)
