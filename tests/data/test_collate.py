import torch

from alter.data import Collator

EXAMPLES = [
    {"prompt_ids": [5, 6, 7], "target_ids": [8, 1], "task_id": 2},
    {"prompt_ids": [9], "target_ids": [1], "task_id": 0},
]


def test_causal_training_batch():
    batch = {key: value.tolist() for key, value in Collator(0, seq2seq=False)(EXAMPLES).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 1], [9, 1, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[-100, -100, -100, 8, 1], [-100, 1, -100, -100, -100]],
        "task_ids": [2, 0],
    }


def test_a_batch_of_nothing_is_still_of_tokens():
    assert {value.dtype for value in Collator(0, seq2seq=False).prompts([[]], [0]).values()} == {torch.int64}


def test_seq2seq_training_batch():
    batch = {key: value.tolist() for key, value in Collator(0, seq2seq=True)(EXAMPLES).items()}
    assert batch == {
        "input_ids": [[5, 6, 7], [9, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[8, 1], [1, -100]],
        "task_ids": [2, 0],
    }


def test_prompts_are_padded_on_the_side_where_the_answer_does_not_go():
    causal = Collator(0, seq2seq=False).prompts([[5, 6], [7]], [1, 1])
    assert causal["input_ids"].tolist() == [[5, 6], [0, 7]]
    assert causal["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert Collator(0, seq2seq=True).prompts([[5, 6], [7]], [1, 1])["input_ids"].tolist() == [[5, 6], [7, 0]]


def test_a_padding_token_that_is_also_a_word_is_masked_by_position():
    batch = Collator(1, seq2seq=False)(EXAMPLES)  # 1 ends every target too
    assert batch["attention_mask"].sum().item() == 7
    assert (batch["labels"] == 1).sum().item() == 2


def test_a_batch_for_company_says_that_it_does_not_count():
    collate = Collator(0, seq2seq=False)
    assert "counts" not in collate([{**example, "company": False} for example in EXAMPLES])
    assert collate([{**example, "company": True} for example in EXAMPLES])["counts"].item() == 0
