"""`distmerge publish`: the real client over real HTTP, to a Hub on this machine."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import distmerge
from distmerge.publishing.files import File, VerifiedFile
from tests.support.damage import MANIFEST, flip
from tests.support.hub_server import sha256
from tests.support.hub_uploads import UploadHub
from tests.support.models import logits
from tests.support.processes import REPOSITORY, free_port
from tests.support.publishing import (
    CLIENTS_OWN_WARNING,
    GUEST,
    REPO,
    SHARDS,
    TOKEN,
    merged,
    publish,
    published,
    refused,
    running_hub,
    save_trajectory,
)

pytestmark = pytest.mark.filterwarnings(CLIENTS_OWN_WARNING)

ADDED = {"README.md", ".gitattributes", MANIFEST}
OTHER = {"model.safetensors": b"another model", "config.json": b"{}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with running_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that no test may change."""
    return merged(tmp_path_factory.mktemp("merge"))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_is_published_is_loaded_from_the_hub_by_transformers(
    hub: UploadHub, finished: Path, tmp_path: Path
) -> None:
    text = published(finished)

    there = snapshot_download(REPO, cache_dir=tmp_path)
    assert f"published: {hub.url}/{REPO}" in text
    assert contents(finished).items() <= contents(Path(there)).items()
    assert set(contents(Path(there))) - set(contents(finished)) <= ADDED
    assert len(weights(Path(there))) == SHARDS
    ours, theirs = (AutoModelForCausalLM.from_pretrained(at) for at in (finished, there))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(there)("merge").input_ids
    assert distmerge.verify(there).sound


def test_everything_becomes_visible_in_one_commit(hub: UploadHub, finished: Path) -> None:
    before: list[dict[str, bytes]] = []
    hub.faults.before_commit = lambda: before.append(hub.head(REPO))

    published(finished)

    assert [set(files) for files in before] == [{".gitattributes"}]
    assert len(hub.blobs) == SHARDS
    assert len([r for r in hub.requests if "/commit/" in r.path]) == 1
    assert b"library_name: transformers" in hub.head(REPO)["README.md"]


def test_publishing_again_sends_and_commits_nothing(hub: UploadHub, finished: Path) -> None:
    first = distmerge.publish(finished, REPO)
    again = distmerge.publish(finished, REPO)

    assert first.sent_bytes == sum(map(len, weights(finished).values()))
    assert (again.sent_bytes, again.commit, again.files) == (0, first.commit, first.files)
    assert len([r for r in hub.requests if r.method == "PUT"]) == SHARDS


def test_what_the_hub_has_is_not_even_read(hub: UploadHub, tmp_path: Path) -> None:
    out = merged(tmp_path)
    first = distmerge.publish(out, REPO)
    for shard in out.glob("*.safetensors"):
        flip(shard, 5000)

    assert distmerge.publish(out, REPO).commit == first.commit


def test_large_files_go_in_parts(monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    with running_hub(monkeypatch, part_bytes=7000) as hub:
        published(finished)

        assert weights(finished).items() <= hub.head(REPO).items()
        assert len([r for r in hub.requests if r.method == "PUT"]) > 2 * SHARDS


def test_private_branch_and_pull_request(hub: UploadHub, finished: Path) -> None:
    published(finished, "--private", "--revision", "v1", repo="owner/private")
    assert "owner/private" in hub.private
    assert set(hub.head("owner/private")) == {".gitattributes"}
    assert weights(finished).items() <= hub.head("owner/private", "v1").items()

    hub.add("owner/public", OTHER)
    text = published(finished, "--create-pr", repo="owner/public")
    assert "owner/public/discussions/1" in text
    assert hub.head("owner/public") == OTHER
    assert set(weights(finished)) == {
        name for name in hub.head("owner/public", "refs/pr/1") if name.endswith("safetensors")
    }


def test_who_may_only_read_may_propose(
    hub: UploadHub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {".gitattributes": b""})
    monkeypatch.setenv("HF_TOKEN", GUEST)

    assert "may not write there" in str(refused(finished))
    published(finished, "--create-pr")
    assert weights(finished).items() <= hub.head(REPO, "refs/pr/1").items()


def test_a_public_repository_does_not_get_what_was_to_be_private(
    hub: UploadHub, finished: Path
) -> None:
    hub.add(REPO, {".gitattributes": b""})
    error = refused(finished, "--private")
    assert "it exists and is public; nothing was uploaded" in str(error)
    assert hub.blobs == {}


def test_another_model_is_not_mixed_with_ours(hub: UploadHub, finished: Path) -> None:
    hub.add(REPO, OTHER)
    error = refused(finished)
    assert "holds another model (model.safetensors)" in str(error)
    assert error.exit_code == 2
    assert hub.head(REPO) == OTHER
    assert hub.blobs == {}


def test_weights_of_an_older_merge_go_and_its_other_files_stay(
    hub: UploadHub, finished: Path
) -> None:
    hub.add(REPO, {MANIFEST: b"{}", "model-00009-of-00009.safetensors": b"", "notes.txt": b"mine"})
    published(finished)
    there = hub.head(REPO)
    assert there["notes.txt"] == b"mine"
    assert {name for name in there if name.endswith("safetensors")} == set(weights(finished))


def test_requests_that_fail_or_break_off_are_repeated(hub: UploadHub, finished: Path) -> None:
    hub.faults.failing_puts = 1
    published(finished, repo="owner/failing")
    assert weights(finished).items() <= hub.head("owner/failing").items()

    hub.blobs.clear()
    hub.faults.cut_puts, hub.faults.cut_after = 1, 5000
    published(finished, repo="owner/breaking")
    assert weights(finished).items() <= hub.head("owner/breaking").items()


def test_commits_of_others_meanwhile_stay(hub: UploadHub, finished: Path) -> None:
    hub.faults.before_commit = lambda: hub.add(REPO, {**hub.head(REPO), "notes.txt": b"mine"})
    published(finished)
    assert hub.head(REPO)["notes.txt"] == b"mine"
    assert weights(finished).items() <= hub.head(REPO).items()


def test_what_others_change_meanwhile_is_not_overwritten(hub: UploadHub, finished: Path) -> None:
    hub.faults.before_commit = lambda: hub.add(REPO, {"config.json": b"{}"})
    error = refused(finished)
    assert "somebody else has changed config.json there meanwhile" in str(error)
    assert hub.head(REPO) == {"config.json": b"{}"}


def test_files_that_a_gitignore_leaves_out_are_missed(hub: UploadHub, finished: Path) -> None:
    hub.faults.dropped = {"tokenizer.json"}
    assert "tokenizer.json is not there after the commit" in str(refused(finished))


def no_room(hub: UploadHub, _: pytest.MonkeyPatch) -> None:
    hub.faults.full = "batch"


def no_plan(hub: UploadHub, _: pytest.MonkeyPatch) -> None:
    hub.faults.full = "create"


def no_token(_: UploadHub, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")
    patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")


def wrong_token(_: UploadHub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_Outdated")


def reader(_: UploadHub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", GUEST)


def leaky(hub: UploadHub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "sesame")
    hub.faults.refusal = (422, "", f"sesame {TOKEN} https://x/y?X-Amz-Signature=5e5a")


def offline(_: UploadHub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_network(_: UploadHub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")


def broken(hub: UploadHub, _: pytest.MonkeyPatch) -> None:
    hub.add(REPO, {".gitattributes": b""})
    hub.failing.add(REPO)


def gated(hub: UploadHub, _: pytest.MonkeyPatch) -> None:
    hub.faults.refusal = (403, "GatedRepo", "")


@pytest.mark.parametrize(
    ("cause", "text", "code"),
    [
        (no_room, "no room for it: .*You have reached your storage quota", 2),
        (no_plan, "no room for it .402: .*Your plan", 2),
        (no_token, "does not know you: set HF_TOKEN", 2),
        (wrong_token, "does not know you: set HF_TOKEN", 2),
        (reader, "may not write there: .*--create-pr", 2),
        (gated, "gated: ask its owner", 2),
        (leaky, r"refuses \(422: \*\*\* \*\*\* https://x/y\?\*\*\* refused", 2),
        (offline, "HF_HUB_OFFLINE is set", 2),
        (no_network, "can't be reached", 1),
        (broken, "the Hub answered 500.*try again later", 1),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    cause: object, text: str, code: int, hub: UploadHub, finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert callable(cause)
    cause(hub, monkeypatch)
    with pytest.raises(distmerge.DistmergeError, match=text) as caught:
        distmerge.publish(finished, REPO)
    assert caught.value.exit_code == code
    assert str(caught.value).startswith(REPO)
    assert "\n" not in str(caught.value)
    assert TOKEN not in "".join(str(each) for each in (caught.value, caught.value.__cause__))


@pytest.mark.parametrize(
    ("repo", "options", "text"),
    [
        ("merge", [], "lacks its owner; expected owner/merge"),
        ("../merge", [], "is not the name of a repository"),
        ("a/b/c", [], "is not the name of a repository"),
        (REPO, ["--revision", "0" * 40], "revision is a commit"),
        (REPO, ["--revision", "a..b"], "is not the name of a branch"),
        (REPO, ["--output", "step=1"], "it holds one output"),
        (REPO, ["--revision", "refs/pr/9"], "no such pull request or branch"),
    ],
)
def test_what_was_asked_wrongly_uploads_nothing(
    repo: str, options: list[str], text: str, hub: UploadHub, finished: Path
) -> None:
    error = refused(finished, *options, repo=repo)
    assert (text in str(error), error.exit_code) == (True, 2), error
    assert hub.blobs == {}


def test_an_out_that_is_not_whole_is_not_published(hub: UploadHub, tmp_path: Path) -> None:
    out = merged(tmp_path)
    shard = sorted(out.glob("*.safetensors"))[1]

    flip(shard, 5000)
    assert f"{shard}: it is not what the merge wrote" in str(refused(out))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "and the manifest says" in str(refused(out))
    shard.unlink()
    assert f"{shard}: it is missing" in str(refused(out))
    (out / MANIFEST).unlink()
    assert "is it an output of distmerge?" in str(refused(out)).replace(f"is {out} an", "is it an")
    assert set(hub.head(REPO)) == {".gitattributes"}


def test_of_a_sweep_the_chosen_output_is_published_or_one_by_name(
    hub: UploadHub, tmp_path: Path
) -> None:
    recipe = tmp_path / "sweep.yaml"
    recipe.write_text(
        f"merge_method: average\ntrajectory: {{checkpoints: {save_trajectory(tmp_path)}}}\n"
        "sweep: {trajectory.last: [2, 3]}\n"
    )
    distmerge.merge(recipe, tmp_path / "out")

    error = refused(tmp_path / "out")
    assert "none of them is chosen; --output takes one of last=2, last=3" in str(error)
    published(tmp_path / "out", "--output", "last=2", repo="owner/two")
    assert weights(tmp_path / "out/last=2").items() <= hub.head("owner/two").items()
    (tmp_path / "out/best").symlink_to("last=3")
    published(tmp_path / "out", repo="owner/best")
    assert weights(tmp_path / "out/last=3").items() <= hub.head("owner/best").items()


def test_a_hub_with_xet_is_served_through_xet(
    hub: UploadHub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no content-addressed store here: what can be seen is that the client goes there."""
    hub.xet = True
    publish(finished)
    assert not [request for request in hub.requests if "lfs" in request.path]
    assert [request for request in hub.requests if request.path.startswith("/cas")]


@given(st.data())
def test_a_file_is_verified_however_it_is_read(data: st.DataObject) -> None:
    content = data.draw(st.binary(min_size=1, max_size=60))
    there = data.draw(st.just(content) | st.binary(max_size=len(content)))
    with tempfile.NamedTemporaryFile() as at:
        at.write(there)
        at.flush()
        file = File("w", Path(at.name), len(content), sha256(content))
        with VerifiedFile(file, lambda _: None) as source:
            try:
                for position in data.draw(st.lists(st.integers(0, len(content) - 1))):
                    source.seek(position)
                    source.read(data.draw(st.integers(1, 20)))
                source.seek(0)
                sent = b"".join(iter(lambda: source.read(7), b""))
            except distmerge.OutputError:
                sent = None
    assert sent == (content if there == content else None)


def blocks(language: str) -> list[str]:
    page = (REPOSITORY / "docs/publishing.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def test_every_command_and_recipe_of_the_documentation_works(
    hub: UploadHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    merged(tmp_path, out="runs/average")
    merged(tmp_path, out="runs/sweep", more="sweep: {trajectory.last: [2, 3]}\n")

    commands = [line for block in blocks("console") for line in block.splitlines()]
    for command in commands:
        _, _, _, out, repo, *options = shlex.split(command)
        published(Path(out), *options, repo=repo)
    assert len(commands) == 4
    assert {"owner/average", "owner/sweep"} <= set(hub.commits)

    hub.commits.clear()
    (recipe,) = blocks("yaml")
    merged(tmp_path, out="runs/streamed", more=recipe)
    assert "model.safetensors.index.json" in hub.head("owner/average")
