"""A command that evaluates an output: what it is given, what is taken from it, how it ends."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from distmerge import command
from distmerge.command import command_environment, last_number, run_command
from distmerge.errors import RunError

MODEL = Path("/out/step=0.5")


def run(folder: Path, script: str, *arguments: str, **environment: str) -> float:
    """Run a Python script on the model `folder`/step=0.5."""
    (folder / "eval.py").write_text(script)
    line = (sys.executable, str(folder / "eval.py"), *arguments, "{model}")
    env = {**os.environ, **environment}
    return run_command(line, folder / "step=0.5", environment=env)


def test_the_last_number_printed_is_taken(tmp_path: Path) -> None:
    assert run(tmp_path, "print('loss 3.5')\nprint('accuracy: 85.25%')\nprint('done')") == 85.25


def test_the_folder_stands_where_the_command_says(tmp_path: Path) -> None:
    script = (
        "import sys\nopen(sys.argv[1] + '.txt', 'w').write(chr(10).join(sys.argv[1:]))\nprint(1)"
    )
    run(tmp_path, script, "{model}", "--in={model}/x:{model}", "a b")
    model = str(tmp_path / "step=0.5")
    assert Path(f"{model}.txt").read_text().split("\n") == [
        model, f"--in={model}/x:{model}", "a b", model,
    ]  # fmt: skip


def test_what_it_says_on_standard_error_is_shown_and_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "import sys\nprint(1)\nprint('Grüße 2', file=sys.stderr)"
    assert run(tmp_path, script, PYTHONIOENCODING="utf-8") == 1
    assert capsys.readouterr().err == "Grüße 2\n"


def test_much_output_does_not_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import sys\nfor n in range(20000): print(n, 'x' * 20)\nsys.stderr.write('y' * 10**6)"
    assert run(tmp_path, script) == 19999
    assert len(capsys.readouterr().err) == 10**6


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys\nprint(0.5)\nsys.exit(3)", r"failed: exit code 3\n  0.5$"),
        ("print(0.5)\nraise ValueError('no data')", r"failed: exit code 1(\n  .*)*no data$"),
        ("import os\nos.abort()", "failed: ended by SIGABRT$"),
        ("print('all well')", r"printed no number\n  all well$"),
        ("pass", r"eval.py .*step=0.5 printed no number$"),
    ],
)
def test_what_fails_is_told_with_its_last_words(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        run(tmp_path, script)
    assert str(tmp_path / "step=0.5") in str(caught.value)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"can't start no-such-program /out.*No such file"):
        run_command(("no-such-program", "{model}"), MODEL, environment={})


CHILDREN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1] + ".pids")
"""


def alive(process: int) -> bool:
    """A process that ended, or waits to be reaped by whoever inherited it, is not."""
    with suppress(OSError):
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


def wait_until_gone(pids: Path) -> None:
    deadline = time.monotonic() + 5
    while any(alive(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.02)


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_interrupt_ends_the_command_and_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    monkeypatch.setattr(command, "GRACE", 0.3)
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    pids = tmp_path / "step=0.5.pids"

    def check() -> None:
        if pids.exists():
            raise KeyboardInterrupt

    (tmp_path / "eval.py").write_text(f"{deaf}{CHILDREN}time.sleep(60)")
    line = (sys.executable, str(tmp_path / "eval.py"), "{model}")
    with pytest.raises(KeyboardInterrupt):
        run_command(line, tmp_path / "step=0.5", environment=os.environ, check=check)
    wait_until_gone(pids)


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    started = time.monotonic()
    assert run(tmp_path, f"{CHILDREN}print(7)") == 7
    wait_until_gone(tmp_path / "step=0.5.pids")
    assert time.monotonic() - started < 20


def test_a_daemon_that_keeps_the_pipe_does_not_keep_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "GRACE", 0.3)
    daemon = CHILDREN.replace("60)", "30)").replace('"])', '"], start_new_session=True)')
    started = time.monotonic()
    assert run(tmp_path, f"{daemon}print(7)") == 7
    assert time.monotonic() - started < 20
    os.kill(int((tmp_path / "step=0.5.pids").read_text().split()[1]), signal.SIGKILL)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("loss=1.25", 1.25),
        ("loss: -0.5\n", -0.5),
        ("+.5", 0.5),
        ("5.", 5),
        ("It is 5.", 5),
        ("1e-3 ", 1e-3),
        ("1.5E+10", 1.5e10),
        ("85.5%", 85.5),
        ('{"loss": 1.5, "n": 7}', 7),
        ("[0.25,0.5]", 0.5),
        ("(0.5)", 0.5),
        ("1.2 +- 0.1", 0.1),
        ("inf", math.inf),
        ("loss -inf", -math.inf),
        ("-Infinity", -math.inf),
        ("1.5 in 12s", 1.5),
        ("1.5 for step5", 1.5),
        ("1.5 x2 2x 3_000 0x1F", 1.5),
        ("1.5 by version 1.2.3", 1.5),
        ("1.5 on 2026-01-31", 1.5),
        ("1.5 of 3/4", 1.5),
        ("1.5 written to /tmp/7/x-8.json", 1.5),
        ("1.5 info nano", 1.5),
        ("1.5 for /out/step=0.5", 1.5),
        ("1.5 for step=0.5.", 1.5),
        ("step=0.5: 2", 2),
        ("\x1b[32m1.5\x1b[0m", 1.5),
        ("", None),
        ("none", None),
        ("step5", None),
    ],
)
def test_a_number_stands_alone(text: str, number: float | None) -> None:
    assert last_number(text, MODEL) == number


def test_nan_is_a_number() -> None:
    found = last_number("1.5\nloss: NaN", MODEL)
    assert found is not None
    assert math.isnan(found)


def test_a_folder_that_is_called_by_a_number_does_not_hide_numbers() -> None:
    assert last_number("0.5", Path("/out/0.5")) == 0.5
    assert last_number("0.5 for /out/1", Path("/out/1")) == 0.5


LAUNCHED = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "MASTER_ADDR": "a", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "1",
    "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "ACCELERATE_USE_CPU": "1",
}  # fmt: skip


def test_the_command_hears_nothing_of_the_launcher(tmp_path: Path) -> None:
    env = {**LAUNCHED, "PATH": "/bin", "SLURM_JOB_ID": "7", "RANKING": "kept", "HOME": "/h"}
    expected = {"PATH": "/bin", "SLURM_JOB_ID": "7", "RANKING": "kept", "HOME": "/h"}
    assert command_environment(env, 0) == expected


@pytest.mark.parametrize(
    ("env", "gpus", "devices"),
    [
        ({}, 8, None),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, 2, "3,5"),
        (LAUNCHED, 0, None),
        (LAUNCHED, 1, None),
        (LAUNCHED, 2, "1"),
        (LAUNCHED, 8, "1,3,5,7"),
        ({**LAUNCHED, "CUDA_VISIBLE_DEVICES": "4,5"}, 2, "5"),
        ({**LAUNCHED, "CUDA_VISIBLE_DEVICES": "4"}, 1, "4"),
        ({**LAUNCHED, "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}, 4, "1"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 8, "3"),
    ],
)
def test_ranks_of_a_host_share_its_gpus(
    env: dict[str, str], gpus: int, devices: str | None
) -> None:
    assert command_environment(env, gpus).get("CUDA_VISIBLE_DEVICES") == devices
