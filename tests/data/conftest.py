import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def words(tmp_path):
    """A folder with a tokenizer of whole words; one token a word."""
    return make_words(tmp_path / "tokenizer")


def make_words(folder, more=()):
    """Writes the tokenizer; it knows ``more`` words than w0 to w499, yes and no."""
    known = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(500)), "yes", "no", ":"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*known, *more]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(words):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(words)


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows(count, seed=0, length=4):
    return [
        {
            "text": " ".join(f"w{(seed * 7919 + i * 31 + j * 17) % 500}" for j in range(1 + (i % length))),
            "label": ["yes", "no"][i % 2],
        }
        for i in range(count)
    ]


def task_dict(folder, name="t", train=40, validation=6, test=6, **changes):
    """A classification task over files written into the folder."""
    for split, count, seed in (("train", train, 1), ("validation", validation, 2), ("test", test, 3)):
        write_jsonl(folder / f"{name}.{split}.jsonl", rows(count, seed))
    init = {split: str(folder / f"{name}.{split}.jsonl") for split in ("train", "validation", "test")}
    return {
        "name": name,
        "source": {"class_path": "Files", "init_args": init},
        "prompt": "{{ text }} :",
        "target": "{{ label }}",
        "choices": ["yes", "no"],
        "max_prompt_tokens": 16,
        "max_target_tokens": 4,
        **changes,
    }
