"""README and configs: every command runs, every recipe is accepted, every option is documented."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from distmerge.cli import cli
from distmerge.config import METHODS
from tests.support.language import save_language_model
from tests.support.publishing import CLIENTS_OWN_WARNING, running_hub

pytestmark = pytest.mark.filterwarnings(CLIENTS_OWN_WARNING)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the demo's checkpoints, in small, the configs, and a Hub to publish to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    first = save_language_model(tmp_path / "first")
    tensors = load_file(first / "model.safetensors")
    for step in range(550, 1001, 15):
        folder = tmp_path / f"runs/demo/step-{step:05d}"
        shutil.copytree(first, folder)
        random = torch.Generator().manual_seed(step)
        moved = {n: x + 1e-3 * torch.randn(x.shape, generator=random) for n, x in tensors.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("choose", "report"):
        (tmp_path / f"runs/demo/{name}.txt").write_text(README)
    with running_hub(monkeypatch):
        yield tmp_path


@pytest.mark.usefixtures("project")
def test_every_distmerge_command_of_the_readme_runs() -> None:
    commands = [line[2:] for block in blocks("console") for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "distmerge"
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, (command, result.output, result.exception)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("recipe", blocks("yaml"))
def test_every_recipe_of_the_readme_can_be_planned(recipe: str, tmp_path: Path) -> None:
    config = tmp_path / "readme.yaml"
    config.write_text(recipe)
    result = CliRunner().invoke(cli, ["plan", str(config)])
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("project")
def test_the_python_example_runs() -> None:
    CliRunner().invoke(cli, ["merge", "configs/average.yaml", "runs/average"])
    for example in blocks("python"):
        exec(example, {})


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_file_in_configs_merges(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["merge", str(config), str(tmp_path / "out")])
    assert result.exit_code == 0, (result.output, result.exception)
    keys = yaml.safe_load(config.read_text())
    assert keys["merge_method"] in METHODS


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_and_option_has_help(command: str) -> None:
    found = cli.commands[command]
    assert found.help
    options = [p for p in found.params if isinstance(p, click.Option)]
    undocumented = [option.name for option in options if not option.help]
    assert undocumented == []


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
