"""`publish:` in a recipe: after the merge, and with `stream: true` while it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import distmerge
from distmerge.publication import Publication
from distmerge.publishing.files import File
from distmerge.publishing.publish import upload
from distmerge.publishing.repository import Repository
from tests.support.checkpoints import average_recipe, read_output, write_checkpoint
from tests.support.damage import MANIFEST
from tests.support.hub_server import sha256
from tests.support.hub_uploads import UploadHub
from tests.support.processes import BIN, environment, finish, free_port, run, slow_writes, start
from tests.support.publishing import CLIENTS_OWN_WARNING, REPO, TOKEN, merged, running_hub

pytestmark = pytest.mark.filterwarnings(CLIENTS_OWN_WARNING)

STREAM = f"publish: {{repo: {REPO}, stream: true}}\n"
SHARD = 4 * 2**20
SHARDS = 4


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with running_hub(monkeypatch) as hub:
        yield hub


def big_merge(folder: Path, more: str, tensors: int = 4 * SHARDS) -> Path:
    """A recipe whose output has 4 shards of 4 MB."""
    for step in (1, 2):
        random = torch.Generator().manual_seed(step)
        size = SHARDS * SHARD // 4 // tensors
        made = {f"w{n:02d}": torch.randn(size, generator=random) for n in range(tensors)}
        write_checkpoint(folder / f"step-{step}", made, config={})
    recipe = folder / "recipe.yaml"
    recipe.write_text(average_recipe(folder / "step-*", more=more))
    return recipe


def merge_command(recipe: Path) -> list[str | Path]:
    return [BIN / "distmerge", "merge", recipe, recipe.parent / "out", "--shard-size", str(SHARD)]


def variables(hub: UploadHub, folder: Path, **more: str) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN}
    return environment(**{**own, **more})


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def sent_twice(hub: UploadHub) -> int:
    return sum(count - len(hub.blobs[oid]) for oid, count in hub.put_bytes.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_finished_shards_are_uploaded_while_the_merge_goes_on(
    ranks: int, hub: UploadHub, tmp_path: Path
) -> None:
    recipe, slow = big_merge(tmp_path, STREAM, 4 * SHARDS * ranks), slow_writes(tmp_path / "slow")
    launch = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        start(
            merge_command(recipe),
            variables(hub, tmp_path, **slow, **launch, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(ranks)
    ]
    wait_for(lambda: len(hub.blobs) > 0, started[0])
    early = (tmp_path / "out").exists(), set(hub.head(REPO))
    done = [finish(process, timeout=60) for process in started]

    assert [each.returncode for each in done] == [0] * ranks, done
    assert early == (False, {".gitattributes"})
    assert "were uploaded during the merge" in done[0].stderr
    assert f"published: {hub.url}/{REPO}" in done[0].stdout
    assert len(weights(tmp_path / "out")) == SHARDS
    assert weights(tmp_path / "out").items() <= hub.head(REPO).items()
    assert sent_twice(hub) == 0
    assert TOKEN not in "".join(each.stdout + each.stderr for each in done)


def test_a_killed_merge_goes_on_and_sends_less_than_a_shard_again(
    hub: UploadHub, tmp_path: Path
) -> None:
    recipe, slow = big_merge(tmp_path, STREAM), slow_writes(tmp_path / "slow")
    hub.faults.seconds_per_piece = 0.01
    first = start(merge_command(recipe), variables(hub, tmp_path, **slow))
    wait_for(lambda: len(hub.blobs) > 0 and hub.put_bytes.total() > 1.2 * SHARD, first)
    kill(first)
    assert not (tmp_path / "out").exists()

    hub.faults.seconds_per_piece = 0
    done = run(merge_command(recipe), variables(hub, tmp_path))

    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out").items() <= hub.head(REPO).items()
    assert sent_twice(hub) < SHARD
    assert not list(tmp_path.glob(".out.*"))


def test_a_killed_publication_goes_on_and_sends_less_than_a_shard_again(
    hub: UploadHub, tmp_path: Path
) -> None:
    recipe = big_merge(tmp_path, f"publish: {{repo: {REPO}}}\n")
    hub.faults.seconds_per_piece = 0.01
    first = start(merge_command(recipe), variables(hub, tmp_path))
    wait_for(lambda: hub.put_bytes.total() > 1.5 * SHARD, first)
    kill(first)
    before = weights(tmp_path / "out")
    assert len(before) == SHARDS

    hub.faults.seconds_per_piece = 0
    done = run(merge_command(recipe), variables(hub, tmp_path))

    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == before
    assert before.items() <= hub.head(REPO).items()
    assert sent_twice(hub) < SHARD


def test_a_merge_that_can_not_be_published_is_complete_and_says_how_to_go_on(
    hub: UploadHub, tmp_path: Path
) -> None:
    recipe = big_merge(tmp_path, STREAM)
    out = tmp_path / "out"

    failed = run(merge_command(recipe), variables(hub, tmp_path, HF_TOKEN="hf_Outdated"))

    assert failed.returncode == 2
    lines = failed.stderr.splitlines()
    assert lines[-2].startswith(f"error: {REPO}: the Hub does not know you: set HF_TOKEN")
    assert lines[-1].endswith(f"publishes it: distmerge publish {out} {REPO}")
    assert "hf_Outdated" not in failed.stderr
    assert len(read_output(out)) == 4 * SHARDS
    distmerge.publish(out, REPO)
    assert weights(out).items() <= hub.head(REPO).items()
    goes_on = run(merge_command(recipe), variables(hub, tmp_path))
    assert goes_on.returncode == 0, goes_on.stderr
    assert "0 B of weights sent" in goes_on.stdout


def test_a_merge_that_fails_publishes_nothing_and_ends(hub: UploadHub, tmp_path: Path) -> None:
    recipe = big_merge(tmp_path, STREAM)
    tensors = {f"w{n:02d}": torch.ones(SHARD // 16) for n in range(4 * SHARDS)}
    tensors["w15"][-1] = torch.nan
    write_checkpoint(tmp_path / "step-2", tensors, config={})
    hub.faults.seconds_per_piece = 0.1

    done = run(merge_command(recipe), variables(hub, tmp_path, **slow_writes(tmp_path / "slow")))

    assert (done.returncode, "w15" in done.stderr) == (2, True), done.stderr
    assert set(hub.head(REPO)) == {".gitattributes"}


def test_publishing_changes_nothing_of_the_merge(hub: UploadHub, tmp_path: Path) -> None:
    plain = merged(tmp_path)
    out = merged(tmp_path, more=f"publish: {{repo: {REPO}, private: true}}\n", out="published")
    for path in plain.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert REPO in hub.private
    assert weights(out).items() <= hub.head(REPO).items()


def test_delete_local_leaves_manifest_and_all_but_the_weights(
    hub: UploadHub, tmp_path: Path
) -> None:
    out = merged(tmp_path, more=f"publish: {{repo: {REPO}, delete_local: true}}\n")
    kept = {path.name for path in out.iterdir()}
    listed = json.loads((out / MANIFEST).read_text())["files"]
    assert {MANIFEST, "config.json", "tokenizer.json"} <= kept
    assert {name for name in listed if name not in kept} == {
        name for name in hub.head(REPO) if name.endswith("safetensors")
    }


def test_delete_local_waits_for_the_hub_to_have_all(hub: UploadHub, tmp_path: Path) -> None:
    hub.faults.dropped = {"model-00002-of-00004.safetensors"}
    with pytest.raises(distmerge.OutputError, match="is not there after the commit"):
        merged(tmp_path, more=f"publish: {{repo: {REPO}, delete_local: true}}\n")
    assert len(weights(tmp_path / "out")) == SHARDS


def test_the_chosen_output_of_a_sweep_is_published(hub: UploadHub, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("import sys; print(len(sys.argv[1]) % 7)")
    command = f"{BIN}/python {tmp_path}/score.py {{model}}"
    out = merged(
        tmp_path,
        more="sweep: {trajectory.last: [2, 3]}\n"
        f"select: {{command: '{command}', goal: min}}\npublish: {{repo: {REPO}}}\n",
    )
    assert weights(out / "best").items() <= hub.head(REPO).items()
    assert any(name.startswith("report/") for name in hub.head(REPO))


def test_a_shard_that_was_uploaded_otherwise_is_sent_again(hub: UploadHub, tmp_path: Path) -> None:
    """As when a network file system showed rank 0 bytes that others had replaced already."""
    out = merged(tmp_path)
    name, content = next(iter(weights(out).items()))
    old = tmp_path / "old.safetensors"
    old.write_bytes(content[:-1] + b"\0")
    repository = Repository(Publication(repo=REPO))
    repository.open()
    repository.send(File(name, old, len(content), sha256(old.read_bytes())), lambda _: None)

    upload(out, None, repository, shown=False)

    assert len(hub.blobs) == SHARDS + 1
    assert weights(out).items() <= hub.head(REPO).items()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("publish: {private: true}", "publish: repo is missing"),
        ("publish: {repo: merge}", "publish.repo: repository 'merge' lacks its owner"),
        (f"publish: {{repo: {REPO}, revision: {'a' * 40}}}", "publish.revision: revision is a"),
        (f"publish: {{repo: {REPO}, revision: a b}}", "publish.revision: 'a b' is not the name"),
        (f"publish: {{repo: {REPO}, stream: 1}}", "publish.stream: expected true or false"),
        (f"publish: {{repo: {REPO}, public: true}}", "publish.public: unknown key"),
        (
            f"publish: {{repo: {REPO}}}\nsweep: {{trajectory.last: [1, 2]}}",
            "which of the 2 outputs",
        ),
        (
            f"publish: {{repo: {REPO}, stream: true}}\nsweep: {{trajectory.last: [1, 2]}}\n"
            "select: {command: 'echo {model}', goal: min}",
            "publish.stream: which of the 2 outputs it will be, the end shows",
        ),
        (f"publish: {{repo: {REPO}}}\nsweep: {{publish.revision: [a, b]}}", "can't be swept"),
    ],
)
def test_a_wrong_publish_is_found_before_anything_is_read(
    line: str, message: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(average_recipe("nowhere-*", more=f"{line}\n"))
    with pytest.raises(distmerge.ConfigError, match="recipe") as caught:
        distmerge.plan(recipe)
    assert message in str(caught.value)
