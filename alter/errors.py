"""Errors for the person who wrote the recipe: one sentence each, naming the file, the key and the remedy."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

MOST_QUOTED = 200  # characters of another library's message


class AlterError(Exception):
    """A mistake in the input that its author can mend.

    The command line prints the messages without a traceback and exits with code 2.

    Args:
        messages: one or more full sentences, each naming the file, the key and the remedy.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class Diverged(AlterError):
    """The loss of a training, or its gradient, is no number any more, mostly since the learning rate is too high."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the nearest known name, or ``""`` when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def in_short(error: BaseException) -> str:
    """Another library's message on one line, as much of it as a sentence bears; the error's name where it has none."""
    message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return message if len(message) <= MOST_QUOTED else f"{message[:MOST_QUOTED]}..."


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error is, or comes from, a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
