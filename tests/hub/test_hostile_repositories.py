"""Repositories that mean no good: what is fetched, what is written, and what is said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import INDEX, write_checkpoint, write_recipe
from tests.support.hub_server import HubServer, downloads
from tests.support.processes import BIN, environment, run

TOKEN = "hf_NobodyMayEverReadThisToken"

OPEN = """
import json, sys, distmerge
for reference in sys.argv[1:]:
    try:
        print(json.dumps(["opened", distmerge.inspect(reference).checkpoint.label]))
    except distmerge.DistmergeError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""

PICKLE = b"cposix\nsystem\n(S'touch pwned'\ntR."


def as_index(weight_map: object) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


WRONG: dict[str, tuple[Mapping[str, bytes], str]] = {
    "all": ({INDEX: as_index({"a": "*"})}, "* is no safetensors file"),
    "pickle": ({INDEX: as_index({"a": "pytorch_model.bin"})}, "is no safetensors file"),
    "pattern": ({INDEX: as_index({"a": "*.safetensors"})}, "it names *.safetensors, which is not"),
    "outside": ({INDEX: as_index({"a": "../x.safetensors"})}, "which is not the name of a file"),
    "numbers": ({INDEX: as_index({"a": 1, "b": "x"})}, "which is not the name of a file"),
    "lists": ({INDEX: as_index([["a"]])}, "it has no weight_map"),
    "deep": ({INDEX: b"[" * 100_000}, "not JSON"),
    "only-pickle": ({}, "no *.safetensors in it"),
    "named-so": ({"model.safetensors": PICKLE * 9}, "not a sound safetensors file"),
    "escaping": ({"../../../../escaped.json": b"{}"}, ""),
    "absolute": ({"/tmp/escaped-from-the-hub.json": b"{}"}, ""),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        for name, (files, _) in WRONG.items():
            beside = {"pytorch_model.bin": PICKLE, "consolidated.pth": PICKLE, "config.json": b"{}"}
            server.add(f"team/{name}", {**beside, **files})
        yield server


def site(hub: HubServer, folder: Path, **variables: str) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "a/b/c/d/e/cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": TOKEN,
    }
    return environment(**{**own, **variables})


def test_nothing_but_safetensors_is_fetched_and_nothing_is_run(
    hub: HubServer, tmp_path: Path
) -> None:
    references = [f"team/{name}" for name in WRONG]

    done = run([BIN / "python", "-c", OPEN, *references], site(hub, tmp_path))

    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (kind, message), (name, (_, part)) in zip(answers, WRONG.items(), strict=True):
        assert kind == "SourceError", name
        assert part in message, (name, message)
        assert "\n" not in message
    fetched = downloads(hub.requests)
    assert not [path for path in fetched if path.endswith((".bin", ".pth"))]
    assert not list(tmp_path.rglob("pwned"))


def test_a_file_of_a_repository_stays_in_the_cache(hub: HubServer, tmp_path: Path) -> None:
    env = site(hub, tmp_path)
    run([BIN / "python", "-c", OPEN, "team/escaping", "team/absolute"], env)
    outside = [p for p in tmp_path.rglob("*.json") if "cache" not in p.parts]
    assert outside == []
    assert not Path("/tmp/escaped-from-the-hub.json").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"HF_TOKEN": f"{TOKEN}\x01"},
        {"HF_TOKEN": f"{TOKEN} \u00fc"},
        {"HF_ENDPOINT": f"http://user:{TOKEN}@127.0.0.1:9"},
        {"HTTP_PROXY": f"http://user:{TOKEN}@127.0.0.1:9", "http_proxy": ""},
        {"HTTP_PROXY": f"nonsense://user:{TOKEN}@127.0.0.1:9"},
        {"HF_ENDPOINT": f"nonsense://{TOKEN}"},
    ],
    ids=["control code", "no ASCII", "endpoint", "proxy", "wrong proxy", "wrong endpoint"],
)
def test_no_error_tells_a_secret(hub: HubServer, tmp_path: Path, variables: dict[str, str]) -> None:
    """The client's errors quote headers and addresses."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", "merge_method: linear\nmodels: [{model: team/all}]\n"
    )
    command: list[str | Path] = [BIN / "distmerge", "merge", "--verbose", recipe, tmp_path / "out"]

    done = run(command, site(hub, tmp_path, **variables))

    assert done.returncode == 2, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr


def test_the_environment_stays_out_of_what_a_merge_writes_and_prints(tmp_path: Path) -> None:
    first, second = (
        write_checkpoint(tmp_path / name, {"x": torch.ones(4)}, config={}) for name in "ab"
    )
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        "merge_method: linear\nsweep: {models.0.parameters.weight: [1, 2]}\n"
        "select: {command: 'echo 1 {model}/x', goal: min}\n"
        f"models:\n  - {{model: {first}, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {second}, parameters: {{weight: 1}}}}\n",
    )
    secrets = {"HF_TOKEN": TOKEN, "MY_SECRET_KEY": "s3cr3t-of-the-environment"}
    command: list[str | Path] = [BIN / "distmerge", "merge", "--verbose", recipe, tmp_path / "out"]

    done = run(command, environment(**secrets))

    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    for secret in secrets.values():
        assert secret not in done.stdout + done.stderr
        assert secret.encode() not in written
