"""What the tests of arithmetic share: quick properties, and one thread as the engine has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("math", deadline=None, max_examples=60, database=None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads would cut a block where they like, and a vector loop may end elsewhere then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
