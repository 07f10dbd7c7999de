"""Where ALTER keeps what it fetches, on each system."""

import sys
from pathlib import Path

import pytest

from alter.home import alter_home


@pytest.mark.parametrize(
    ("system", "variables", "place"),
    [
        ("linux", {}, "~/.cache/alter"),
        ("linux", {"XDG_CACHE_HOME": "/cache"}, "/cache/alter"),
        ("darwin", {}, "~/Library/Caches/alter"),
        ("win32", {}, "~/AppData/Local/alter"),
        ("win32", {"LOCALAPPDATA": "/users/me/local"}, "/users/me/local/alter"),
        ("linux", {"ALTER_HOME": "~/mine"}, "~/mine"),
        ("win32", {"ALTER_HOME": "mine"}, "mine"),
    ],
)
def test_the_users_cache_unless_named(system, variables, place, monkeypatch):
    for name in ("ALTER_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert alter_home() == Path(place).expanduser().absolute()
