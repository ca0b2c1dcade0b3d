"""Inputs of an attacker, and inputs that change under us: refused in one line, soon, and in little
memory; what they hold reaches neither terminal nor file system as it is.

tests/fuzz has the malformed files, tests/hub the malicious repositories.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import distmerge
from distmerge import log
from distmerge.cli import cli
from distmerge.document import Plain
from distmerge.errors import ConfigError, OutputError, SourceError
from distmerge.log import printable
from distmerge.pipeline import Options
from distmerge.sources.checkpoint import INDEX, open_checkpoint
from distmerge.sources.header import read_header
from distmerge.sources.sidecars import MAX_CONFIG, MAX_SIDECAR, sidecars
from distmerge.sweep import load_recipe
from tests.support.checkpoints import raw_file, read_output, write_checkpoint, write_index
from tests.support.processes import BIN, environment
from tests.unit.recipes import linear
from tests.unit.refusals import half, tree, write_pair

PACKAGE = Path(distmerge.__file__).parent

MEASURED = """
import resource, sys, time
from pathlib import Path
from distmerge.errors import DistmergeError
from distmerge.sources.header import read_header
from distmerge.sweep import load_recipe

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

for name in sys.argv[1:]:
    path, before, started = Path(name), peak(), time.monotonic()
    try:
        read_header(path) if path.suffix == ".safetensors" else load_recipe(path)
        message = "accepted"
    except DistmergeError as error:
        message = str(error)
    print(json.dumps([message, peak() - before, time.monotonic() - started]))
"""


def check_refusals(folder: Path, most_megabytes: int, parts: dict[str, str]) -> None:
    """Open the files in `folder`, in a process of its own: each is refused with its part of
    `parts`, and in a few seconds; together they take no more memory."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json{MEASURED}", *(folder / name for name in parts)],
        env=environment(), capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (message, _, seconds), part in zip(found, parts.values(), strict=True):
        assert part in message
        assert "\n" not in message
        assert seconds < 30
    assert sum(megabytes for _, megabytes, _ in found) < most_megabytes, found


def test_headers_take_no_more_than_a_multiple_of_what_they_are(tmp_path: Path) -> None:
    with (tmp_path / "huge.safetensors").open("wb") as file:  # it takes no disk either
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**40 + 8)
    parts = {"huge.safetensors": "claims a header of 1099511627776 bytes"}
    for number, unit in enumerate([b"[],", b'"",', b'{"a":0},', b"1e9,"]):
        text = b'{"a":{"shape":[' + unit * (1_000_000 // len(unit)) + b"0]}}"
        raw_file(tmp_path / f"{number}.safetensors", text)
        parts[f"{number}.safetensors"] = "unknown dtype"
    check_refusals(tmp_path, 60, parts)


def test_recipes_that_grow_are_stopped(tmp_path: Path) -> None:
    merges = "{k: 1}"
    for level in range(30):
        merges = f"{{<<: [&a{level} {merges}, *a{level}, *a{level}]}}"
    deep = f"&a {'[' * 45}1{']' * 45}\nb: [{'*a,' * 20_000}]"
    texts = {
        "long": ("x: 1\n" * 200_000, "more than 500000 bytes are no recipe"),
        "merges": (f"a: {merges}", "more than 200000 values"),
        "deep aliases": (f"a: {deep}", "more than 200000 values"),
        "deep": ("[" * 100_000, "nested too deeply"),
    }
    for name, (text, _) in texts.items():
        (tmp_path / name).write_text(text)
    check_refusals(tmp_path, 400, {name: part for name, (_, part) in texts.items()})


def test_a_recipe_without_end_is_stopped() -> None:
    with pytest.raises(ConfigError, match=r"more than 500000 bytes|not valid YAML"):
        load_recipe("/dev/zero")


@pytest.mark.parametrize(
    "key", ["/tmp/evil", "../../evil", "parameters./x", "a b", "a\x1b[m", "a/../b.step"]
)
def test_a_key_that_is_a_path_makes_no_folder(tmp_path: Path, key: str) -> None:
    recipe: dict[str, Plain] = {**half(*write_pair(tmp_path)), "sweep": {key: [1, 2]}}
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="can't be swept"):
        distmerge.merge(recipe, tmp_path / "out", lenient=True)
    assert tree(tmp_path) == before


def test_an_integer_that_python_does_not_print_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: 0x{'f' * 5000}}}]\n")
    with pytest.raises(ConfigError, match="a number of so many digits"):
        load_recipe(path)


# Names


HOSTILE_NAMES = ["a\x1b[31mred", "a\0b", "a\nb", "\x9b2J", "a\x7f", "\ud800", "x" * 1001]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_tensor_s_name_is_text(tmp_path: Path, name: str) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = raw_file(tmp_path / "x.safetensors", {name: entry}, bytes(4))
    with pytest.raises(SourceError, match=r"a tensor's name|not Unicode text") as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_name_like_a_path_is_only_a_name(tmp_path: Path) -> None:
    tensors = {"../x": torch.ones(2), "/etc/passwd": torch.ones(2), "a/b": torch.ones(2)}
    folder = write_checkpoint(tmp_path / "in", tensors)
    distmerge.merge(linear({folder: 1}), tmp_path / "work/out")
    assert sorted(read_output(tmp_path / "work/out")) == sorted(tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "work"]
    made = {p.name for p in (tmp_path / "work/out").iterdir()}
    assert made == {"distmerge.json", "model.safetensors"}


@pytest.mark.parametrize("text", ["\x1b[2J", "\u202etxt.exe", "\x9b", "\udcff", "\0", "\x07", "\r"])
def test_a_terminal_gets_escapes_in_writing(text: str) -> None:
    shown = printable(f"a{text}b")
    assert shown.isprintable()
    assert json.loads(f'"{shown}"') == f"a{text}b"


def hostile_folder(at: Path) -> Path:
    """A checkpoint whose folder's name is no UTF-8 and would colour the terminal."""
    return write_checkpoint(at / os.fsdecode(b"run-\xff\x1b[31m"), {"x": torch.ones(2)})


def test_the_command_line_shows_no_raw_names(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path)
    (folder / "extra.bin").touch()
    (folder / "model.safetensors").rename(folder / os.fsdecode(b"\xff\x1b[31m.safetensors"))
    for arguments in (["inspect", str(folder)], ["inspect", f"{folder}/gone\x1b[m"]):
        done = CliRunner().invoke(cli, arguments)
        assert "\x1b" not in done.output
        assert done.output.isascii() or done.exception


def test_errors_and_logs_show_no_raw_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure(rank=0, verbose=False, quiet=False)
    logging.getLogger("distmerge").warning("a\x1b[31mb\nc\x07 %s", "\udcff")
    assert capsys.readouterr().err == "a\\u001b[31mb\nc\\u0007 \\udcff\n"
    done = subprocess.run(
        [BIN / "distmerge", "inspect", os.fsencode(tmp_path) + b"/\xff\x1b[31m"],
        env=environment(), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert b"\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_names_that_are_no_utf8_come_through_a_merge(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path)
    name = os.fsdecode(b"tok\xff.json")
    (folder / name).write_text("{}")
    distmerge.merge(linear({folder: 1}), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/distmerge.json").read_text(encoding="utf-8"))
    assert manifest["inputs"][0]["folder"] == str(folder)
    assert name in manifest["files"]
    assert (tmp_path / "out" / name).read_text() == "{}"


def test_shards_whose_names_are_no_utf8_are_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", {"x": torch.ones(2)})
    name = os.fsdecode(b"m\xff.safetensors")
    (folder / "model.safetensors").rename(folder / name)
    write_index(folder, {"x": name})
    assert len(open_checkpoint(folder, label="it").identity) == 64


# Links, pipes and what is no file


def secret_beside(folder: Path) -> Path:
    secret = folder / "secret.json"
    secret.write_text('{"password": "hunter2"}')
    return secret


def link_to(target: str) -> Callable[[Path], None]:
    def spoil(donor: Path) -> None:
        (donor / "tokenizer.json").symlink_to(target)

    return spoil


def to_config(donor: Path) -> None:
    (donor / "config.json").symlink_to("../secret.json")


def below(donor: Path) -> None:
    (donor / "sub").mkdir()
    (donor / "sub/x.json").symlink_to(donor.parent / "secret.json")


def circle(donor: Path) -> None:
    (donor / "a.json").symlink_to("b.json")
    (donor / "b.json").symlink_to("a.json")


def pipe(donor: Path) -> None:
    os.mkfifo(donor / "tokenizer.json")


def large(donor: Path) -> None:
    with (donor / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_SIDECAR + 1)


def large_config(donor: Path) -> None:
    with (donor / "config.json").open("wb") as file:
        file.truncate(MAX_CONFIG + 1)


def deep_config(donor: Path) -> None:
    (donor / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def false_cache(donor: Path) -> None:
    """A folder that looks like the Hub's cache, but whose blobs are somebody's files."""
    (donor.parent.parent / "blobs").symlink_to(donor.parent)
    (donor / "tokenizer.json").symlink_to(donor.parent / "secret.json")


LEAVES = "tokenizer.json: a link that leaves the folder, to .*; .* put a copy in its place$"
BAD_SIDECARS: dict[str, tuple[Callable[[Path], None], str]] = {
    "relative": (link_to("../secret.json"), LEAVES),
    "absolute": (link_to("/etc/passwd"), LEAVES),
    "device": (link_to("/dev/zero"), LEAVES),
    "through a link": (link_to("/proc/self/cwd/pyproject.toml"), LEAVES),
    "config": (to_config, "config.json: a link that leaves the folder"),
    "in a subfolder": (below, "sub/x.json: a link that leaves the folder"),
    "cache of its own": (false_cache, LEAVES),
    "to nothing": (link_to("gone.json"), "tokenizer.json: can't be read: No such file"),
    "circle": (circle, "a.json: can't be read: .*"),
    "pipe": (pipe, "tokenizer.json: not a file that can be copied"),
    "large": (large, "tokenizer.json: it has 500000001 bytes"),
    "large config": (large_config, "config.json: it has 10000001 bytes"),
    "deep config": (deep_config, "config.json: not JSON"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_SIDECARS.values(), ids=BAD_SIDECARS.keys())
def test_what_lies_elsewhere_is_not_copied(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    snapshots = tmp_path / "cache/snapshots"
    donor = write_checkpoint(snapshots / "c0ffee", {"x": torch.ones(2)})
    secret_beside(snapshots)
    spoil(donor)
    started = time.monotonic()
    with pytest.raises(SourceError, match=message):
        distmerge.merge(linear({donor: 1}), tmp_path / "work/out", options=Options(memory="64MB"))
    assert time.monotonic() - started < 5
    assert not (tmp_path / "work/out").exists()
    written = [p for p in (tmp_path / "work").rglob("*") if p.is_file()]
    assert not [p for p in written if b"hunter2" in p.read_bytes()]


def test_links_within_the_folder_and_into_the_hub_s_blobs_are_followed(tmp_path: Path) -> None:
    donor = write_checkpoint(tmp_path / "models--a/snapshots/c0ffee", {"x": torch.ones(2)})
    blobs = tmp_path / "models--a/blobs"
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (donor / "model.safetensors").rename(blobs / "2")
    (donor / "tokenizer.json").symlink_to("../../blobs/1")
    (donor / "model.safetensors").symlink_to("../../blobs/2")
    (donor / "vocab.json").symlink_to("tokenizer.json")
    (donor / "sub").mkdir()
    (donor / "sub/x.json").symlink_to("../../../blobs/1")
    distmerge.merge(linear({donor: 1}), tmp_path / "out")
    for name in ("tokenizer.json", "vocab.json", "sub/x.json"):
        copied = tmp_path / "out" / name
        assert not copied.is_symlink()
        assert copied.read_text() == "{}"


def test_linked_folders_are_not_entered(tmp_path: Path) -> None:
    donor = write_checkpoint(tmp_path / "donor", {"x": torch.ones(2)})
    (tmp_path / "private").mkdir()
    secret_beside(tmp_path / "private")
    (donor / "sub").symlink_to(tmp_path / "private")
    distmerge.merge(linear({donor: 1}), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "distmerge.json", "model.safetensors",
    ]  # fmt: skip


def test_endless_subfolders_are_not_followed_to_their_end(tmp_path: Path) -> None:
    donor = write_checkpoint(tmp_path / "donor", {"x": torch.ones(2)})
    at = donor
    for _ in range(1200):
        at /= "d"
    subprocess.run(["mkdir", "-p", str(at)], check=True)
    (donor / "d/d/x.json").write_text("{}")
    assert sidecars(donor) == [Path("d/d/x.json")]
    subprocess.run(["rm", "-r", str(donor / "d")], check=True)  # Python's own way fails at that


def test_a_folder_with_a_file_s_name_is_left_out(tmp_path: Path) -> None:
    donor = write_checkpoint(tmp_path / "donor", {"x": torch.ones(2)})
    for name in ("distmerge.json", "model.safetensors.d", "other.safetensors", INDEX):
        (donor / name).mkdir()
        (donor / name / "x.json").write_text("{}")
    distmerge.merge(linear({donor: 1}), tmp_path / "out")
    assert (tmp_path / "out/distmerge.json").is_file()
    assert (tmp_path / "out/model.safetensors.d/x.json").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / name)
    with pytest.raises(SourceError, match=r"no \*.safetensors in it"):
        open_checkpoint(tmp_path / "in", label="it")


def test_a_stranger_s_output_makes_us_write_nowhere_else(tmp_path: Path) -> None:
    donor = write_checkpoint(tmp_path / "donor", {"x": torch.ones(2)})
    distmerge.merge(linear({donor: 1}), tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/report").symlink_to("../elsewhere")
    with pytest.raises(OutputError, match="report: it is a link"):
        distmerge.report(tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# Code


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    """The ranks' own messages to each other are the exception: torch.distributed pickles those."""
    unsafe = {"pickle", "torch.load", "load_pickle", "eval", "exec", "compile", "__import__",
              "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "numpy.load",
              "np.load", "runpy", "marshal", "shelve"}  # fmt: skip
    found = {(path.name, name) for path in PACKAGE.rglob("*.py") for name in calls(path)}
    assert not {pair for pair in found if pair[1] in unsafe}


def test_code_beside_the_weights_is_copied_and_not_run(tmp_path: Path) -> None:
    donor = write_checkpoint(
        tmp_path / "donor",
        {"x": torch.ones(2)},
        config={"auto_map": {"AutoConfig": "evil.Config"}, "torch_dtype": "float32"},
    )
    for name in ("evil.py", "sitecustomize.py", "conftest.py"):
        (donor / name).write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    distmerge.merge(linear({donor: 1}), tmp_path / "out")
    assert (tmp_path / "out/evil.py").is_file()
    assert not (tmp_path / "pwned").exists()


# Inputs that change
