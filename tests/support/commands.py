"""The command line as a rank's process runs it; for tests.support.ranks."""

from __future__ import annotations

import sys
from contextlib import suppress
from unittest import mock

from distmerge import cli
from tests.support.drawing import without_drawing


def merge_command(arguments: list[str]) -> None:
    """`distmerge merge` with `arguments`, to its exit code; without plots."""
    mock.patch.object(cli, "LEAVE_LAST", 0).start()  # no launcher stops us
    without_drawing().start()
    sys.argv[:] = ["distmerge", "merge", *arguments]
    with suppress(SystemExit):  # of success: other codes end the process at once
        cli.main()
