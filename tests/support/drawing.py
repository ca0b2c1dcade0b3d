"""Merges without plots and page, which take seconds; report.json is made all the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import distmerge

Patch = Any  # mock's own name for it is private


def without_drawing() -> Patch:
    """A patch (to start, or for `with`) that lets report.make draw nothing."""
    plots, page = mock.Mock(), mock.Mock()
    plots.draw.return_value = {}
    page.html.return_value = ""
    return mock.patch.multiple(distmerge, create=True, plots=plots, page=page)
