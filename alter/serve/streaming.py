"""The text of an answer while it is being written."""

from __future__ import annotations

from collections.abc import Sequence

from alter.predict import Predictor

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the bytes so far end within a character


class Unfolding:
    """Tells what is new in a growing answer, so that the pieces make up the whole.

    Args:
        predictor: whose tokens they are.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.told = predictor, ""

    def more(self, tokens: Sequence[int]) -> str:
        """What all tokens so far add to what has been told."""
        text = self.predictor.decode(tokens)
        if text.endswith(UNFINISHED) or not text.startswith(self.told):
            return ""
        new, self.told = text[len(self.told) :], text
        return new

    def rest(self, answer: str) -> str:
        """What the whole answer adds."""
        return answer[len(self.told) :]
