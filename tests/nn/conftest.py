"""Models for the tests of alter.nn."""

import pytest

from tests.nn.tiny import FAMILIES, tiny_model


@pytest.fixture(params=FAMILIES)
def tiny_models(request):
    """A tiny random model of every family in turn."""
    return tiny_model(request.param)
