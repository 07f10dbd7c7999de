"""What a stream tells, piece by piece."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from alter.serve.streaming import Unfolding


def by_bytes():
    """A model whose tokens are the bytes of its answers, so that a letter may take several."""
    return SimpleNamespace(decode=lambda tokens: bytes(tokens).decode("utf-8", errors="replace").strip())


def told(text):
    """The pieces told after each token, and what is told at the end."""
    tokens, unfolding = list(text.encode()), Unfolding(by_bytes())
    return [unfolding.more(tokens[: n + 1]) for n in range(len(tokens))], unfolding.rest(text.strip())


@given(st.text(st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", exclude_categories=["Cs"])))
def test_pieces_make_up_the_answer_and_hold_no_half_letters(text):
    pieces, rest = told(text)
    assert "".join(pieces) + rest == text.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_each_letter_is_told_with_its_last_token():
    pieces, rest = told("aé€ b")
    assert pieces == ["a", "", "é", "", "", "€", "", " b"]
    assert rest == ""
