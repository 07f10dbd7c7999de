"""Tokenised prompts of several tasks in shared batches."""

import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import alter
from alter.answering import answer_ends, answer_text
from alter.evaluate import answers
from alter.nn.decoding import Generation
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.runs import CHOICES
from tests.test_predict import INPUTS, TASKS, TEXTS, model  # noqa: F401 (a fixture)


def test_a_mixed_batch_is_answered_as_each_input_by_itself(model, monkeypatch):  # noqa: F811
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


@pytest.mark.parametrize("task", ["echo", "sort"])
def test_evaluation_answers_prompts_of_like_length_together_in_the_rows_order(model, task, monkeypatch):  # noqa: F811
    monkeypatch.setattr("alter.answering.MAX_BATCH_TOKENS", 48)
    seen = []
    for name in ("generate", "best_choices", "own_choice_log_likelihoods"):
        kept = getattr(alter.answering, name)

        def watched(m, batch, *given, kept=kept):
            seen.append(batch["attention_mask"].sum(1).tolist())
            return kept(m, batch, *given)

        monkeypatch.setattr(f"alter.answering.{name}", watched)
    lengths = random.Random(0).choices(range(1, 14), k=40)
    prompts = [[5 + (31 * row + place) % 400 for place in range(length)] for row, length in enumerate(lengths)]
    data = SimpleNamespace(examples=lambda name, split: {"prompt_ids": prompts})
    found = answers(model, data, task, "test")
    assert len(seen) > 5
    assert [length for batch in seen for length in batch] == sorted(lengths, reverse=True)
    assert found == [model.answer(task, [prompt])[0].text for prompt in prompts]
    assert len(set(found)) > 1


def test_beams_of_tasks_with_other_limits_are_answered_as_each_alone(model):  # noqa: F811
    model.generation = Generation(num_beams=3)
    mixed = model.generate(INPUTS, task=TASKS)
    assert mixed == [model.generate(given, task=task)[0] for given, task in zip(INPUTS, TASKS, strict=True)]


def test_tasks_of_many_choices_share_a_batch(model, monkeypatch):  # noqa: F811
    names = ["sort", "pick", "sort", "pick", "pick"]
    alone = model.classify(TEXTS[:5], task=names)
    monkeypatch.setattr("alter.answering.SCORED_FIRST", 1)
    monkeypatch.setattr("alter.nn.choices.SCORED_FIRST", 1)
    found, seen = alter.answering.best_choices, []
    monkeypatch.setattr(
        "alter.answering.best_choices",
        lambda m, batch, own: seen.append(batch["task_ids"].tolist()) or found(m, batch, own),
    )
    assert model.classify(TEXTS[:5], task=names) == alone
    assert sorted(seen[0]) == [0, 0, 1, 1, 1]


def test_probabilities_of_a_mixed_batch_are_the_softmax_of_likelihoods_over_the_temperature(model):  # noqa: F811
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
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", eos_token="69")


def pieces_of_bytes():
    """As GPT-2's: a line's end is a byte as others are."""
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [("Ċ", "Ċ"), ("Ċ", "Ġ"), ("Ġ", "Ċ"), (".", "Ċ"), ("Ċ", "-")]
    found = Tokenizer(models.BPE(letters | {"".join(pair): len(letters) + n for n, pair in enumerate(pairs)}, pairs))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="Z")


@pytest.mark.parametrize(
    ("tokenizer", "ends"), [(pieces_of_words(), ["69"]), (pieces_of_bytes(), ["Z", "Ċ", "ĊĊ", "ĊĠ", "ĠĊ", "Ċ-"])]
)
def test_an_answer_ends_as_targets_do_and_at_a_lines_end_and_at_no_space(tokenizer, ends):
    assert tokenizer.convert_ids_to_tokens(answer_ends(tokenizer)) == ends
    assert tokenizer.decode(tokenizer("a 69").input_ids) == "a 69"


@pytest.mark.parametrize("written", ["one line", "one line.\nand another", " one line \n", "\none line"])
def test_an_answer_is_one_line_whichever_token_holds_the_lines_end(written):
    tokenizer = pieces_of_bytes()
    assert answer_text(tokenizer, tokenizer(written).input_ids) == ("one line." if "." in written else "one line")
