"""Errors for the person who wrote the recipe: one sentence each, naming the file, the key and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlterError(Exception):
    """A mistake in the input that its author can mend.

    The command line prints the messages without a traceback and exits with code 2.

    Args:
        messages: one or more full sentences, each naming the file, the key and the remedy.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the nearest known name, or ``""`` when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
