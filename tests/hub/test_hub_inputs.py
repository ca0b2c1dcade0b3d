"""Inputs from a Hub: the real client in real processes, against a server on this machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import read_output, write_checkpoint, write_recipe
from tests.support.hub_server import HubServer, Request, downloads
from tests.support.processes import BIN, environment, finish, free_port, run, start

Finished = subprocess.CompletedProcess[str]
Tensors = dict[str, torch.Tensor]

TOKEN = "hf_NobodyMayEverReadThisToken"
STEPS = {"step1000-tokens4B": 1000, "step200-tokens1B": 200, "step3000-tokens12B": 3000}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NOT_NEEDED = ("consolidated.safetensors", "pytorch_model.bin", "model-old.safetensors")

TRAJECTORY = """
merge_method: average
trajectory:
  checkpoints:
    repo: team/run
    revisions: [step1000-tokens4B, step200-tokens1B, step3000-tokens12B]
  last: 2
  schedule: {weights: [0.25, 0.75]}
"""

OPEN_EACH = """
import json, sys, distmerge
for reference in sys.argv[1:]:
    try:
        print(json.dumps(["opened", distmerge.inspect(reference).checkpoint.label]))
    except distmerge.DistmergeError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def weights(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    names = ("embed.weight", "layers.0.weight", "layers.1.weight", "head.weight")
    return {name: torch.randn(8, 16, generator=generator) for name in names}


@dataclass(frozen=True)
class Site:
    """A Hub, a user's cache and the user's processes."""

    hub: HubServer
    cache: Path

    def environment(self, **variables: str) -> dict[str, str]:
        own = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
        }
        return environment(**{**own, **variables})

    def merge(self, recipe: Path, out: Path, **variables: str) -> Finished:
        """Merge in a process of its own; the token is in nothing that it prints or writes."""
        done = run([BIN / "distmerge", "merge", recipe, out], self.environment(**variables))
        assert TOKEN not in done.stdout + done.stderr
        assert not [p for p in out.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
        return done


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    folder = tmp_path_factory.mktemp("repositories")
    with HubServer(token=TOKEN) as server:
        for revision, step in STEPS.items():
            at = write_checkpoint(folder / revision, weights(step), shards=2, config={"step": step})
            for name in NOT_NEEDED:
                (at / name).write_bytes(b"not needed")
            server.add_folder("team/run", at, [revision])
        one = write_checkpoint(folder / "one", weights(1), config={})
        for repo in ("team/one", "team/private", "team/gated", "team/failing", "team/silent"):
            server.add_folder(repo, one)
        server.private.add("team/private")
        server.gated.add("team/gated")
        server.failing.add("team/failing")
        server.silent.add("team/silent")
        yield server


@dataclass(frozen=True)
class Merged:
    """The trajectory, merged with an empty cache; `requests` is what the Hub was asked for it."""

    site: Site
    recipe: Path
    out: Path
    requests: list[Request]


@pytest.fixture(scope="module")
def merged(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    folder = tmp_path_factory.mktemp("user")
    site = Site(hub, folder / "cache")
    recipe, out = write_recipe(folder / "recipe.yaml", TRAJECTORY), folder / "out"
    before = len(hub.requests)
    done = site.merge(recipe, out)
    assert done.returncode == 0, done.stderr
    return Merged(site, recipe, out, hub.requests[before:])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def resolved(revision: str, name: str) -> str:
    return f"/team/run/resolve/{revision}/{name}"


def test_revisions_of_a_repository_are_a_trajectory_in_the_order_of_their_steps(
    merged: Merged,
) -> None:
    early, late = weights(1000), weights(3000)
    for name, result in read_output(merged.out).items():
        expected = 0.25 * early[name].double() + 0.75 * late[name].double()
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)


def test_only_the_shards_of_the_selected_revisions_are_downloaded_once(merged: Merged) -> None:
    commits = [merged.site.hub.revisions["team/run"][r] for r in list(STEPS)[::2]]
    needed = sorted(resolved(commit, shard) for commit in commits for shard in SHARDS)
    sent = [path for path in downloads(merged.requests) if path.endswith(("safetensors", "bin"))]
    assert sorted(sent) == needed
    assert not [request for request in merged.requests if "step200" in request.path]


def test_recipe_and_manifest_name_commits_that_can_be_merged_again(
    merged: Merged, tmp_path: Path
) -> None:
    manifest = json.loads((merged.out / "distmerge.json").read_text())
    commits = [merged.site.hub.revisions["team/run"][r] for r in list(STEPS)[::2]]
    again = write_recipe(tmp_path / "again.yaml", json.dumps(manifest["recipe"]))

    done = merged.site.merge(again, tmp_path / "out", HF_HUB_OFFLINE="1")

    assert [entry["commit"] for entry in manifest["inputs"]] == commits
    assert [entry["step"] for entry in manifest["inputs"]] == [1000, 3000]
    assert manifest["recipe"]["trajectory"]["checkpoints"] == [f"team/run@{c}" for c in commits]
    assert done.returncode == 0, done.stderr
    for name, data in contents(merged.out).items():
        assert name == "distmerge.json" or data == (tmp_path / "out" / name).read_bytes()


def test_a_second_run_downloads_nothing_and_writes_the_same(merged: Merged, tmp_path: Path) -> None:
    before = len(merged.site.hub.requests)

    done = merged.site.merge(merged.recipe, tmp_path / "out")

    assert done.returncode == 0, done.stderr
    assert downloads(merged.site.hub.requests[before:]) == []
    assert contents(tmp_path / "out") == contents(merged.out)


def test_offline_the_cache_serves_revisions_by_name_and_asks_nobody(
    merged: Merged, tmp_path: Path
) -> None:
    before = len(merged.site.hub.requests)

    done = merged.site.merge(merged.recipe, tmp_path / "out", HF_HUB_OFFLINE="1")

    assert done.returncode == 0, done.stderr
    assert merged.site.hub.requests[before:] == []
    assert contents(tmp_path / "out") == contents(merged.out)


def test_offline_what_is_not_in_the_cache_is_the_users_mistake(
    hub: HubServer, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", TRAJECTORY)

    done = Site(hub, tmp_path / "cache").merge(recipe, tmp_path / "out", HF_HUB_OFFLINE="1")

    assert done.returncode == 2
    assert done.stderr.startswith("error: team/run@step")
    assert done.stderr.endswith("not in the Hub's cache, and the Hub can't be reached\n")
    assert len(done.stderr.splitlines()) == 1


def test_linear_takes_repositories_at_revisions_and_private_ones_with_a_token(
    hub: HubServer, tmp_path: Path
) -> None:
    local = write_checkpoint(tmp_path / "local", weights(7))
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        "merge_method: linear\nmodels:\n"
        "  - {model: team/run@step200-tokens1B, parameters: {weight: 2.0}}\n"
        "  - {model: team/private, parameters: {weight: 1.0}}\n"
        f"  - {{model: {local}, parameters: {{weight: 1.0}}}}\n",
    )

    done = Site(hub, tmp_path / "cache").merge(recipe, tmp_path / "out")

    assert done.returncode == 0, done.stderr
    for name, result in read_output(tmp_path / "out").items():
        parts = [weights(200)[name], weights(200)[name], weights(1)[name], weights(7)[name]]
        expected = torch.stack(parts).double().mean(dim=0)
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)


def test_what_can_not_be_had_is_one_clear_error_each(hub: HubServer, tmp_path: Path) -> None:
    expected = {
        "team/one": ("opened", "team/one"),
        "team/none": ("SourceError", "neither a folder here nor a repository on the Hub"),
        "team/private": ("SourceError", "if it is private, set HF_TOKEN"),
        "team/run@step9": ("SourceError", "the repository has no such revision"),
        "team/gated": ("SourceError", "the repository is gated: ask for access, set HF_TOKEN"),
        "team/failing": ("SourceError", "the Hub answered 500; try again later"),
        "team/silent": ("SourceError", "the Hub can't be reached"),
    }
    env = Site(hub, tmp_path).environment() | {"HF_TOKEN": "hf_OfSomebodyWithoutAccess"}

    done = run([BIN / "python", "-c", OPEN_EACH, *expected], env)

    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (kind, message), (reference, (wanted, part)) in zip(answers, expected.items(), strict=True):
        assert kind == wanted, reference
        assert message.startswith(reference), reference
        assert part in message, reference
    assert "WithoutAccess" not in done.stdout + done.stderr


def test_a_hub_that_is_down_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", TRAJECTORY)
    nobody = f"http://127.0.0.1:{free_port()}"

    done = Site(hub, tmp_path / "cache").merge(recipe, tmp_path / "out", HF_ENDPOINT=nobody)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: team/run@step")
    assert "can't be reached" in done.stderr


def test_a_hub_that_is_down_is_not_missed_where_the_cache_has_all(
    merged: Merged, tmp_path: Path
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"

    done = merged.site.merge(merged.recipe, tmp_path / "out", HF_ENDPOINT=nobody)

    assert done.returncode == 0, done.stderr
    assert "Using cached commit hash for 'team/run'" in done.stderr
    assert contents(tmp_path / "out") == contents(merged.out)


def test_two_ranks_of_one_host_download_every_file_once(hub: HubServer, tmp_path: Path) -> None:
    site, before = Site(hub, tmp_path / "cache"), len(hub.requests)
    recipe = write_recipe(tmp_path / "recipe.yaml", TRAJECTORY)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command: list[str | Path] = [BIN / "distmerge", "merge", recipe, tmp_path / "out"]

    started = [
        start(command, site.environment(RANK=rank, LOCAL_RANK=rank, **common)) for rank in "01"
    ]
    done = [finish(process, timeout=60) for process in started]

    assert [rank.returncode for rank in done] == [0, 0], done
    sent = downloads(hub.requests[before:])
    assert len([path for path in sent if path.endswith(".safetensors")]) == 4
    assert sorted(sent) == sorted(set(sent))
