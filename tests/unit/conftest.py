"""What all unit tests share: no network, no left-over log handlers, quick properties."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from distmerge.log import LOGGER

settings.register_profile("unit", deadline=None, max_examples=60, database=None)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not a folder must not send a test to the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """The command line sets up the logger for a process of its own."""
    before = list(LOGGER.handlers), LOGGER.level, LOGGER.propagate
    yield
    LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = before
