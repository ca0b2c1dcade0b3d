"""--stream-remote: shards of the Hub read by ranges, by real processes over real HTTP."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.checkpoints import average_recipe, write_checkpoint, write_recipe
from tests.support.hub_server import Request, downloads
from tests.support.processes import (
    BIN,
    environment,
    finish,
    free_port,
    run,
    slow_writes,
    start,
    wait_for_writers,
)
from tests.support.storage_server import Fault, HubWithStorage, Served, Storage, header_end

Finished = subprocess.CompletedProcess[str]
Command = list[str | Path]

TOKEN = "hf_NobodyMayEverReadThisToken"
REVISIONS = ("step1000", "step2000")
SHARD = "model-00001-of-00002.safetensors"
ON_HUB = """
merge_method: average
trajectory: {checkpoints: {repo: team/run, revisions: [step1000, step2000]}}
"""

MERGE_EACH = """
import json, sys, distmerge
from distmerge.sources import remote
remote.PATIENCE, remote.FIRST_PAUSE = 1.5, 0.1
options = distmerge.Options(stream_remote=True)
for model in sys.argv[2:]:
    recipe = {"merge_method": "linear", "models": [{"model": model, "parameters": {"weight": 1}}]}
    try:
        distmerge.merge(recipe, f"{sys.argv[1]}/{model}", options=options)
    except distmerge.DistmergeError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Small tensors, most of which begin inside a page, and one of two jobs."""
    generator = torch.Generator().manual_seed(seed)
    small = {f"layers.{n}.weight": torch.randn(129, 65, generator=generator) for n in range(9)}
    return {**small, "embed.weight": torch.randn(6400, 1024, generator=generator).bfloat16()}


@dataclass(frozen=True)
class Site:
    """A Hub with a storage, the same checkpoints in `local`, and their merge in `expected`."""

    hub: HubWithStorage
    storage: Storage
    local: Path
    expected: Path

    def environment(self, cache: Path, **variables: str) -> dict[str, str]:
        own = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_TOKEN": TOKEN,
        }
        return environment(**{**own, **variables})

    def run(self, command: Command, cache: Path, **variables: str) -> Finished:
        """Run a program; the token is in nothing that it prints."""
        done = run(command, self.environment(cache, **variables))
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def merge(self, folder: Path, **variables: str) -> Finished:
        """Merge the repository into `folder`/out, with the client's cache in `folder` too."""
        return self.run(command_in(folder), folder / "cache", **variables)

    @property
    def heads(self) -> int:
        """Bytes before the tensors in all shards."""
        shards = [path.read_bytes() for path in self.local.rglob("*.safetensors")]
        return sum(map(header_end, shards))


DATA = sum(tensor.nbytes for seed in range(len(REVISIONS)) for tensor in weights(seed).values())
"""Bytes of all tensors of all inputs."""


def command_in(folder: Path, command: str = "merge") -> Command:
    recipe = write_recipe(folder / "recipe.yaml", ON_HUB)
    out = [folder / "out"] if command == "merge" else []
    return [BIN / "distmerge", command, recipe, *out, "--stream-remote"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    storage = Storage()
    hub = HubWithStorage(storage, token=TOKEN)
    with storage, hub:
        for number, name in enumerate(REVISIONS):
            at = write_checkpoint(
                folder / "local" / name, weights(number), shards=2, config={"n": 1}
            )
            hub.add_folder("team/run", at, [name])
        recipe = write_recipe(folder / "recipe.yaml", average_recipe(f"{folder}/local/*"))
        done = run([BIN / "distmerge", "merge", recipe, folder / "out"], environment())
        assert done.returncode == 0, done.stderr
        yield Site(hub, storage, folder / "local", folder / "out")


@pytest.fixture
def site(made: Site) -> Iterator[Site]:
    """The site with nothing served yet; without faults when the test has ended."""
    made.storage.served.clear()
    made.hub.requests.clear()
    yield made
    made.storage.faults.clear()
    for names in (made.hub.replaced, made.hub.gone, made.hub.private):
        names.clear()


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


def digest(folder: Path) -> str:
    found: str = json.loads((folder / "distmerge.json").read_text())["plan"]
    return found


@dataclass(frozen=True)
class Merged:
    """The repository, merged in `folder` with an empty cache: what was asked for and served."""

    folder: Path
    requests: list[Request]
    served: list[Served]


@pytest.fixture(scope="module")
def merged(made: Site, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    folder = tmp_path_factory.mktemp("merged")
    made.hub.requests.clear()
    made.storage.served.clear()
    done = made.merge(folder)
    assert done.returncode == 0, done.stderr
    return Merged(folder, list(made.hub.requests), list(made.storage.served))


def test_bytes_and_plan_are_those_of_folders(site: Site, merged: Merged) -> None:
    assert weights_of(merged.folder / "out") == weights_of(site.expected)
    assert digest(merged.folder / "out") == digest(site.expected)


def test_each_byte_is_served_once_and_stored_nowhere(site: Site, merged: Merged) -> None:
    assert sum(served.sent for served in merged.served) == DATA + site.heads
    assert not [path for path in downloads(merged.requests) if path.endswith(".safetensors")]
    cached = [path for path in (merged.folder / "cache").rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in cached) < 20_000


def test_only_the_hub_gets_the_token(merged: Merged) -> None:
    asked = [request for request in merged.requests if request.path.endswith(".safetensors")]
    assert {request.token for request in asked} == {TOKEN}
    assert {served.authorized for served in merged.served} == {False}


def test_two_ranks_share_the_bytes_and_one_of_them_fetches_the_headers(
    site: Site, tmp_path: Path
) -> None:
    command = command_in(tmp_path)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    started = [
        start(command, site.environment(tmp_path / "cache", RANK=rank, LOCAL_RANK=rank, **common))
        for rank in "01"
    ]
    done = [finish(process, timeout=60) for process in started]

    assert [rank.returncode for rank in done] == [0, 0], done
    assert weights_of(tmp_path / "out") == weights_of(site.expected)
    assert site.storage.sent == DATA + site.heads
    resolved = [r for r in site.hub.requests if r.path.endswith(".safetensors")]
    assert len(resolved) <= 3 * 4  # of each shard: for its header, and by each rank for its data


def test_a_plan_fetches_headers_only(site: Site, tmp_path: Path) -> None:
    planned = site.run([*command_in(tmp_path, "plan"), "--json"], tmp_path / "cache")

    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["digest"] == digest(site.expected)
    assert site.storage.sent == site.heads


def merge_both(site: Site, folder: Path, local: str, remote: str) -> None:
    """Merge by two recipes; plan and bytes are the same."""
    for name, text in (("local", local), ("remote", remote)):
        recipe = write_recipe(folder / f"{name}.yaml", text)
        command: Command = [BIN / "distmerge", "merge", recipe, folder / name, "--stream-remote"]
        done = site.run(command, folder / "cache")
        assert done.returncode == 0, done.stderr
    assert weights_of(folder / "remote") == weights_of(folder / "local")
    assert digest(folder / "remote") == digest(folder / "local")


def test_a_single_file_that_the_hub_itself_gives_beside_a_folder(
    site: Site, tmp_path: Path
) -> None:
    at = write_checkpoint(tmp_path / "single", weights(0), config={})
    site.hub.add_folder("team/single", at)
    site.hub.direct.add("team/single")
    local, remote = (
        "merge_method: linear\nmodels:\n"
        f"  - {{model: {model}, parameters: {{weight: 2.0}}}}\n"
        f"  - {{model: {site.local}/step2000, parameters: {{weight: 1.0}}}}\n"
        for model in (at, "team/single")
    )

    merge_both(site, tmp_path, local, remote)

    given = [r for r in site.hub.requests if r.method == "GET" and "/resolve/" in r.path]
    assert [r for r in given if r.path.endswith(".safetensors")]
    assert {r.status for r in given if r.path.endswith(".safetensors")} == {206}


def test_extra_merge_reads_twice_and_knows_its_statistic_again(site: Site, tmp_path: Path) -> None:
    names = [f"step{number}00" for number in range(1, 5)]
    for seed, name in enumerate(names):
        tensors = {"x": torch.randn(999, generator=torch.Generator().manual_seed(seed))}
        at = write_checkpoint(tmp_path / "steps" / name, tensors, config={})
        site.hub.add_folder("team/steps", at, [name])
    local, remote = (
        "merge_method: extra_merge\nparameters: {step: 1}\n"
        f"trajectory: {{checkpoints: {checkpoints}, window: 2}}\n"
        for checkpoints in (
            f"{tmp_path}/steps/*",
            f"{{repo: team/steps, revisions: [{', '.join(names)}]}}",
        )
    )

    merge_both(site, tmp_path, local, remote)
    site.storage.served.clear()
    again: Command = [BIN / "distmerge", "merge", tmp_path / "remote.yaml", tmp_path / "again"]
    done = site.run([*again, "--stream-remote"], tmp_path / "cache")

    assert "known from" in done.stderr
    assert site.storage.sent == 4 * 999 * 4


def test_what_passes_is_tried_again(site: Site, tmp_path: Path) -> None:
    """The first two requests are those for the lengths of two headers, or for one header."""
    faults: list[Fault] = [500, "silent", *["sound"] * 8, 503, 429, 408, "drop", "stall", 403, 404]
    site.storage.faults.extend([*faults, *["version", "sound", "silent"] * 3])

    done = site.merge(tmp_path)

    assert done.returncode == 0, done.stderr
    assert not site.storage.faults
    assert weights_of(tmp_path / "out") == weights_of(site.expected)
    assert digest(tmp_path / "out") == digest(site.expected)
    assert "the server answered 429; trying again in 1.0 s" in done.stderr
    assert "the storage holds another version of it; trying again" in done.stderr


def test_what_broke_off_is_gone_on_with_and_known_headers_are_not_fetched(
    site: Site, merged: Merged, tmp_path: Path
) -> None:
    site.storage.faults.extend(["drop"] * 8)

    done = site.merge(tmp_path, HF_HOME=str(merged.folder / "cache"))

    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "out") == weights_of(site.expected)
    assert len([s for s in site.storage.served if s.sent <= (s.last - s.first + 1) // 2]) == 8
    assert site.storage.sent < DATA + 8 * 2**18  # what was under way in the network is lost
    assert not [served for served in site.storage.served if served.first == 0]


def start_slow(site: Site, folder: Path) -> subprocess.Popen[str]:
    variables = slow_writes(folder)
    process = start(command_in(folder), site.environment(folder / "cache", **variables))
    wait_for_writers(folder, 1)
    time.sleep(1)  # until it writes tensors
    return process


def test_addresses_that_expire_are_asked_for_again(site: Site, tmp_path: Path) -> None:
    process = start_slow(site, tmp_path)
    site.storage.expire()
    done = finish(process, timeout=60)

    assert done.returncode == 0, done.stderr
    assert [served for served in site.storage.served if served.status == 403]
    assert weights_of(tmp_path / "out") == weights_of(site.expected)


def test_a_killed_merge_goes_on_and_reads_only_what_is_missing(site: Site, tmp_path: Path) -> None:
    process = start_slow(site, tmp_path)
    process.send_signal(signal.SIGKILL)
    finish(process, timeout=10)
    site.storage.served.clear()

    done = site.merge(tmp_path)

    assert done.returncode == 0, done.stderr
    assert "going on" in done.stderr
    assert 0 < site.storage.sent < DATA
    assert weights_of(tmp_path / "out") == weights_of(site.expected)


def test_verify_reads_by_ranges_what_it_merges_again(site: Site, merged: Merged) -> None:
    verify: Command = [BIN / "distmerge", "verify", merged.folder / "out", "--json"]

    without = site.run(verify, merged.folder / "cache")
    some = site.run([*verify, "--recompute", "20%", "--stream-remote"], merged.folder / "cache")

    assert without.returncode == 0, without.stdout
    notes = [note["what"] for note in json.loads(without.stdout)["notes"]]
    assert len(notes) == 2
    assert all("its weights are not on this host" in what for what in notes)
    assert some.returncode == 0, some.stdout
    assert json.loads(some.stdout)["notes"] == []
    assert json.loads(some.stdout)["recomputed"] == 2
    assert 0 < site.storage.sent < DATA


class Lasting(NamedTuple):
    """A fault that stays, the exit code that follows, and what the error says."""

    fault: Fault
    exit_code: int
    message: str


LASTING = {
    "whole": Lasting("whole", 2, "sends whole or compressed files where a part is asked for"),
    "compressed": Lasting("compressed", 2, "sends whole or compressed files"),
    "truncated": Lasting("half", 2, "no longer gives what was planned with"),
    "greedy": Lasting("greedy", 2, "its server gives more than is asked for"),
    "strange": Lasting(418, 1, "can't be had from the Hub: the storage answered 418"),
    "down": Lasting(500, 1, "can't be had from the Hub: the server answered 500; gave up"),
    "silent": Lasting("silent", 1, "can't be had from the Hub: RemoteProtocolError; gave up"),
    "refused": Lasting(403, 1, "can't be had from the Hub: the storage answered 403; gave up"),
}


def test_what_does_not_pass_is_one_clear_error_each(site: Site, tmp_path: Path) -> None:
    for seed, (name, lasting) in enumerate(LASTING.items()):
        at = write_checkpoint(tmp_path / name, {"x": torch.full((99,), float(seed))}, config={})
        site.hub.add_folder(f"team/{name}", at)
        (file,) = site.hub.commits[f"team/{name}"].values()
        sha256 = hashlib.sha256(file["model.safetensors"]).hexdigest()
        site.storage.lasting[sha256] = lasting.fault
    models = [f"team/{name}" for name in LASTING]

    done = site.run(
        [BIN / "python", "-c", MERGE_EACH, tmp_path / "out", *models], tmp_path / "cache"
    )

    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (code, message), (name, lasting) in zip(answers, LASTING.items(), strict=True):
        assert message.startswith(f"team/{name}/model.safetensors: "), message
        assert lasting.message in message
        assert code == lasting.exit_code, message


def check_refused(done: Finished, folder: Path, message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: team/run@step"), errors
    assert message in errors[0]
    assert not (folder / "out").exists()


def test_a_shard_that_is_another_one_or_gone_is_refused(
    site: Site, merged: Merged, tmp_path: Path
) -> None:
    site.hub.replaced.add(SHARD)
    replaced = site.merge(tmp_path, HF_HOME=str(merged.folder / "cache"))
    site.hub.gone.add(SHARD)
    gone = site.run(command_in(tmp_path, "plan"), tmp_path / "cache")

    what = f"{SHARD}: its server no longer gives what was planned with"
    check_refused(replaced, tmp_path, what)
    check_refused(gone, tmp_path, "the Hub answered 404; a file is no longer there")


@pytest.mark.parametrize(
    "variable", [pytest.param("HF_ENDPOINT", marks=pytest.mark.slow), "HF_HUB_OFFLINE"]
)
def test_without_network_headers_alone_are_not_enough(
    site: Site, merged: Merged, tmp_path: Path, variable: str
) -> None:
    nobody = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}", "HF_HUB_OFFLINE": "1"}[variable]

    done = site.merge(tmp_path, HF_HOME=str(merged.folder / "cache"), **{variable: nobody})

    check_refused(done, tmp_path, "can't be")


def test_without_rights_the_error_says_so(site: Site, tmp_path: Path) -> None:
    site.hub.private.add("team/run")

    done = site.merge(tmp_path, HF_TOKEN="hf_Another")

    check_refused(done, tmp_path, "if it is private, set HF_TOKEN")
