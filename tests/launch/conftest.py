"""One trio of checkpoints for all tests of launchers."""

from __future__ import annotations

import pytest

from tests.launch.trio import Trio, make_trio


@pytest.fixture(scope="package")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return make_trio(tmp_path_factory.mktemp("trio"))
