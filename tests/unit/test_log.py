"""Sizes and times for people, and progress with and without a terminal."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from distmerge.errors import ConfigError
from distmerge.log import LOGGER, Progress, configure, format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("100", 100),
        ("5GB", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("5g", 5 * 10**9),
        ("1.5MB", 1_500_000),
        ("64MiB", 64 * 2**20),
        ("2TiB", 2 * 2**40),
        ("3kB", 3000),
        ("5B", 5 * 10**9),
        (" 7 MB ", 7 * 10**6),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1e3", "5XB", "5 bytes", "5iB", "5Mi", "1,5GB", "nan", "inf"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size: "):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (5 * 10**9, "5 GB"),
        (5.1e12, "5.1 TB"),
        (5.1e15, "5.1e+03 TB"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (-3, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3725, "1 h 02 min")],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rank", "verbose", "quiet", "shown"),
    [
        (0, False, False, ["info", "warning"]),
        (0, True, False, ["[rank 0] debug", "[rank 0] info", "[rank 0] warning"]),
        (0, False, True, ["warning"]),
        (3, False, False, ["[rank 3] warning"]),
        (3, True, False, ["[rank 3] debug", "[rank 3] info", "[rank 3] warning"]),
        (3, False, True, ["[rank 3] warning"]),
    ],
)
def test_the_first_rank_speaks_for_all(
    rank: int, verbose: bool, quiet: bool, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure(rank=rank, verbose=verbose, quiet=quiet)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        LOGGER.log(level, logging.getLevelName(level).lower())
    assert capsys.readouterr().err.splitlines() == shown


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [100.0]
    monkeypatch.setattr("distmerge.log.time", SimpleNamespace(monotonic=lambda: clock[0]))
    with caplog.at_level(logging.INFO, "distmerge"), Progress("merge", 400, shown=True) as progress:
        for clock[0], done in ((101.0, 4), (110.0, 100), (111.0, 101), (119.9, 150), (120.0, 200)):
            progress.show(done)
    assert [record.message for record in caplog.records] == [
        "merge: 100 B of 400 B, 10 B/s, 30 s left",
        "merge: 200 B of 400 B, 10 B/s, 20 s left",
    ]


def test_progress_on_a_terminal_is_a_bar_that_goes_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("merge", 400, shown=True) as progress:
        progress.show(100)
        progress.show(400)
    shown = capsys.readouterr().err
    assert "merge:" in shown
    assert "\n" not in shown


def test_no_progress_is_shown_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("merge", 400, shown=False) as progress:
        progress.show(400)
    assert capsys.readouterr().err == ""
