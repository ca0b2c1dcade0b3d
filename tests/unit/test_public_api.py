"""The public names: all listed, sorted and explained."""

from __future__ import annotations

import inspect
import types

import pytest

import distmerge
from distmerge import errors

NAMES = [name for name in distmerge.__all__ if name != "__version__"]


def test_all_names_what_is_visible_and_nothing_else() -> None:
    visible = [
        name
        for name, value in vars(distmerge).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    assert sorted([*visible, "__version__"]) == distmerge.__all__


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(distmerge, name)
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own
    assert not own.startswith(f"{name}(")  # what dataclass makes up


@pytest.mark.parametrize("name", NAMES)
def test_every_public_method_has_a_docstring(name: str) -> None:
    value = getattr(distmerge, name)
    if not inspect.isclass(value):
        assert inspect.isfunction(value)
        return
    for key, member in vars(value).items():
        function = member.fget if isinstance(member, property) else member
        if inspect.isfunction(function) and not key.startswith("_"):
            assert function.__doc__ or len(inspect.getsource(function).splitlines()) <= 3, key


def exceptions() -> list[type[errors.DistmergeError]]:
    found: list[type[errors.DistmergeError]] = []
    for value in vars(errors).values():
        if inspect.isclass(value) and issubclass(value, errors.DistmergeError):
            found.append(value)
    return found


def test_every_exception_is_public_and_in_the_tree_at_the_top_of_errors() -> None:
    assert {error.__name__ for error in exceptions()} <= set(distmerge.__all__)
    tree = errors.__doc__ or ""
    assert all(error.__name__ in tree for error in exceptions())


@pytest.mark.parametrize("error", exceptions(), ids=lambda error: str(error.__name__))
def test_what_the_user_can_mend_has_exit_code_2(error: type[errors.DistmergeError]) -> None:
    assert error("why").exit_code == (2 if issubclass(error, errors.UserError) else 1)
    assert str(error("why")) == "why"


def test_a_peer_s_error_keeps_the_exit_code_of_its_cause() -> None:
    assert distmerge.PeerError("why", exit_code=2).exit_code == 2
