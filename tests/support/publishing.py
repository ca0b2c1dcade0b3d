"""Merges to publish, and a Hub for them, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

import distmerge
from distmerge.cli import cli
from tests.support.checkpoints import average_recipe
from tests.support.hub_uploads import UploadHub
from tests.support.language import save_language_model

TOKEN = "hf_NobodyMayEverReadThisToken"
GUEST = "hf_OfSomebodyWhoMayOnlyRead"
REPO = "owner/merge"
SHARDS = 4

CLIENTS_OWN_WARNING = "ignore:Use 'content=:DeprecationWarning"
"""huggingface_hub 2.4 calls its HTTP library in an old way."""


def save_trajectory(folder: Path, steps: int = 3) -> Path:
    """Checkpoints of a small language model, unless they are there; the glob that finds them."""
    for step in range(1, 1 if (folder / "step-1").exists() else steps + 1):
        save_language_model(folder / f"step-{step}", step)
    return folder / "step-*"


def merged(folder: Path, *, more: str = "", out: str = "out") -> Path:
    """A sharded merge of three models in `folder`, where it lies."""
    recipe = folder / f"{out}.yaml"
    recipe.write_text(average_recipe(save_trajectory(folder), more=more))
    distmerge.merge(recipe, folder / out, options=distmerge.Options(shard_size="20kB"))
    return folder / out


@contextmanager
def running_hub(
    monkeypatch: pytest.MonkeyPatch, part_bytes: int | None = None
) -> Iterator[UploadHub]:
    """A Hub that this process's client talks to, with the rights to write."""
    hub = UploadHub(TOKEN, GUEST, part_bytes)
    with hub:
        resolve = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + resolve)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def publish(out: Path, *options: str, repo: str = REPO) -> Result:
    """`distmerge publish` in this process; no token is in what it prints or raises."""
    result = CliRunner().invoke(cli, ["publish", str(out), repo, *options])
    assert "hf_" not in result.output + str(result.exception)
    return result


def published(out: Path, *options: str, repo: str = REPO) -> str:
    """As `publish`, where it has to succeed; returns what it prints."""
    result = publish(out, *options, repo=repo)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(out: Path, *options: str, repo: str = REPO) -> distmerge.DistmergeError:
    """As `publish`, where it has to fail; returns the error."""
    error = publish(out, *options, repo=repo).exception
    assert isinstance(error, distmerge.DistmergeError), error
    return error
