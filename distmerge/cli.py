"""The command line: merge, plan, inspect, verify, select, report, publish."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click
from torch.distributed.elastic.multiprocessing.errors import record

import distmerge
from distmerge import log, presentation
from distmerge.document import Plain
from distmerge.errors import DistmergeError
from distmerge.launchers import detect
from distmerge.pipeline import DEFAULT_SHARD, Options
from distmerge.publication import MAIN

Command = TypeVar("Command", bound=Callable[..., object])

stream_remote_option = click.option(
    "--stream-remote", is_flag=True,
    help="Read Hub inputs by ranges as they are needed; do not download them.",
)  # fmt: skip

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
LEAVE_LAST = 2.0
"""Seconds that a rank waits whose error another rank prints: launchers stop all once one ends."""


def recipe_options(command: Command) -> Command:
    """CONFIG and the options that change how it is read."""
    for decorate in (
        click.argument("config", type=click.Path()),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE",
            help="Override a key of the recipe, dotted: --set trajectory.last=4. May be repeated.",
        ),
        click.option("--lenient", is_flag=True, help="Warn about unknown keys instead of failing."),
        click.option(
            "--shard-size", default=DEFAULT_SHARD, show_default=True, metavar="SIZE",
            help="Data in one output file, at most: 5GB, 500MB; 5B means the same as 5GB.",
        ),
    ):  # fmt: skip
        command = decorate(command)
    return command


@click.group(context_settings=CONTEXT)
@click.version_option(distmerge.__version__, prog_name="distmerge")
@click.option("--local_rank", "--local-rank", type=int, hidden=True, help="deepspeed adds this.")
def cli(local_rank: int | None) -> None:
    """Merge checkpoints of large language models that do not fit on one machine.

    \b
    distmerge plan CONFIG                 what would happen; reads headers only
    distmerge merge CONFIG OUT            merge, in this process alone
    torchrun --nproc-per-node=8 -m distmerge merge CONFIG OUT
                                          the same bytes, by eight ranks
    distmerge inspect PATH                what a checkpoint holds
    distmerge verify OUT                  whether all of OUT is as the merge wrote it
    distmerge select OUT --text FILE      choose again among the outputs of a sweep
    distmerge report OUT                  the plots and the page of a merge, made again
    distmerge publish OUT OWNER/NAME      put it on the Hub

    CONFIG is a YAML recipe: mergekit's for models (linear, task_arithmetic, ties, dare_linear,
    dare_ties, and our tsv_m, iso_c, iso_cts, star, expo), a trajectory: for checkpoints (average,
    extra_merge). calibrate: corrects a merge of tasks; sweep: makes many outputs from one read.

    Exit codes: 0 done, 1 failed, 2 a mistake that you can mend, 130 and 143 stopped by a signal
    (torchrun turns all into 1).
    """


@cli.command()
@recipe_options
@click.argument("out", type=click.Path())
@click.option(
    "--memory", metavar="SIZE",
    help="Budget of each rank's buffers, as 500MB.  [default: a share of what is free]",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="auto takes the CPU for weighted sums, which wait for the disk, and a GPU for matrices.",
)  # fmt: skip
@click.option(
    "--assemble", type=click.Choice(["auto", "direct", "gather"]), default="auto",
    show_default=True,
    help="direct: ranks write the shards in place. gather: ranks that do not see OUT send their "
    "results to ranks that do. auto: whatever a probe shows.",
)  # fmt: skip
@click.option(
    "--read", type=click.Choice(["auto", "mmap", "pread"]), default="auto", show_default=True,
    help="How to read inputs. auto: mapped where the page cache holds them, else large reads.",
)  # fmt: skip
@stream_remote_option
@click.option("--overwrite", is_flag=True, help="Replace OUT if distmerge wrote it.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier attempt has done.")
@click.option("--verify", "verifies", is_flag=True, help="Then check OUT, as `distmerge verify`.")
@click.option(
    "--allow-nonfinite", is_flag=True, help="Go on (and count) where inputs hold NaN or Inf."
)
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=600, show_default=True, metavar="SECONDS",
    help="A rank that reads and writes nothing for so long has failed: its disk may hang.",
)  # fmt: skip
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but warnings and errors.")
@click.option("--verbose", "-v", is_flag=True, help="Print what every rank does.")
def merge(
    config: str,
    out: str,
    overrides: tuple[str, ...],
    lenient: bool,
    quiet: bool,
    verbose: bool,
    verifies: bool,
    **options: Any,
) -> None:
    """Merge the checkpoints of CONFIG into the folder OUT.

    OUT appears when it is complete, and not before. Run it under torchrun, accelerate, deepspeed
    or srun to share the work; the bytes do not depend on the number of ranks. After a kill or a
    failure the same command, at any number of ranks, goes on where it stopped.

    A recipe with sweep:, or with a list of steps, makes a checkpoint for each value in a folder of
    OUT, as OUT/step=0.5. With select:, held-out data choose one of them, and OUT/best leads to it.
    """
    rank = detect(os.environ).rank
    log.configure(rank=rank, verbose=verbose, quiet=quiet)
    result = distmerge.merge(
        config,
        out,
        overrides=overrides,
        lenient=lenient,
        options=Options(progress=not quiet, **options),
    )
    if rank == 0 and not quiet:
        _echo(presentation.summary(result))
    if verifies:
        _check(out, rank, progress=not quiet)


@cli.command()
@recipe_options
@click.option(
    "--ranks", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Deal the jobs out to so many ranks.",
)  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Budget of each rank's buffers, as 500MB.")
@stream_remote_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(config: str, ranks: int, memory: str | None, as_json: bool, **how: Any) -> None:
    """Show what merging CONFIG would do: a dry run that reads headers only.

    Prints inputs with fingerprints, output shards, jobs and bytes of each of N ranks, estimated
    memory, and the digest on which the ranks agree before they touch a file.
    """
    log.configure(rank=0, verbose=False, quiet=False)
    found = distmerge.plan(config, **how)
    described = presentation.describe(found, ranks=ranks, memory=memory)
    _echo(json.dumps(described, indent=2) if as_json else presentation.plan_text(described))


@cli.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, as_json: bool) -> None:
    """List the tensors, dtypes, shapes and shards of PATH (headers only).

    PATH is a folder, one safetensors file, or a Hub repository as owner/name[@revision].
    """
    log.configure(rank=0, verbose=False, quiet=False)
    described = distmerge.inspect(path).as_plain()
    text = json.dumps(described, indent=2) if as_json else presentation.inspection_text(described)
    _echo(text)


@cli.command()
@click.argument("out", type=click.Path())
@click.option(
    "--recompute", metavar="1%|all",
    help="Merge that share of the tensors, or all, from the inputs again: compare every byte.",
)  # fmt: skip
@click.option(
    "--seed", type=int, metavar="N",
    help="Draw the tensors of --recompute with this number.  [default: from the plan's digest]",
)  # fmt: skip
@stream_remote_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(out: str, **how: Any) -> None:
    """Check what a merge left in OUT; list what is off and exit with 1 where something is.

    Every file is read once and held against its sha256 in the manifest; headers, index, shapes and
    dtypes against recipe and inputs. No value may be NaN or Inf, and the output must be no copy
    of a single input. Under a launcher the ranks share the work. What can't be looked at, because
    an input has changed or is gone, is noted.
    """
    rank = detect(os.environ).rank
    log.configure(rank=rank, verbose=False, quiet=False)
    _check(out, rank, progress=True, **how)


@cli.command()
@click.argument("out", type=click.Path())
def report(out: str) -> None:
    """Make OUT/report/report.html again, with its plots and numbers, from what a merge left in OUT.

    Shows coefficients, scores, for extra_merge the trajectory of the checkpoints and how much its
    direction explains, and what calibrate: did to each matrix. Needs neither inputs nor weights.
    """
    log.configure(rank=0, verbose=False, quiet=False)
    _echo(distmerge.report(out))


@cli.command()
@click.argument("out", type=click.Path())
@click.option("--text", metavar="PATH", help="Choose by the loss on this file or folder of text.")
@click.option(
    "--command", metavar="COMMAND",
    help="Choose by the last number that this prints; {model} stands for an output's folder.",
)  # fmt: skip
@click.option(
    "--goal", type=click.Choice(["min", "max"]), help="Which number of --command is best."
)
def select(out: str, **given: str | None) -> None:
    """Choose again among the outputs of the sweep in OUT, as select: in a recipe does.

    OUT/best then leads to the chosen one, and OUT/report shows the scores. Under a launcher the
    ranks share the outputs.
    """
    rank = detect(os.environ).rank
    log.configure(rank=rank, verbose=False, quiet=False)
    if (given["text"] is None) == (given["command"] is None):
        raise click.UsageError("give either --text, or --command with --goal")
    asked: dict[str, Plain] = {key: value for key, value in given.items() if value is not None}
    found = distmerge.select(out, {"metric": "loss", **asked} if "text" in asked else asked)
    if rank == 0:
        _echo(presentation.scores_text(found))


@cli.command()
@click.argument("out", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a private repository.")
@click.option(
    "--revision", metavar="BRANCH", default=MAIN, show_default=True,
    help="Commit to this branch; it is made where there is none.",
)  # fmt: skip
@click.option(
    "--create-pr", is_flag=True, help="Open a pull request, and leave the branch as it is."
)
@click.option(
    "--output", metavar="NAME", help="Which output of a sweep.  [default: the chosen one]"
)
def publish(out: str, **how: Any) -> None:
    """Publish what a merge left in OUT as REPO, 'owner/name', on the Hugging Face Hub.

    Weights, config, tokenizer, manifest and a model card become visible at once, in one commit.
    After a failure the same command goes on; what the Hub has is not sent again. The token is
    taken from HF_TOKEN, or from where `hf auth login` keeps it.
    """
    log.configure(rank=0, verbose=False, quiet=False)
    _echo(presentation.published_text(distmerge.publish(out, progress=True, **how)))


def _echo(text: object, *, err: bool = False) -> None:
    """Print `text`. Names in it may come from strangers' files: a terminal must not obey them."""
    click.echo(log.printable_lines(str(text)), err=err)


def _check(out: str, rank: int, *, as_json: bool = False, **how: Any) -> None:
    """Print what a verification finds, and exit with 1 where something is off."""
    found = distmerge.verify(out, **how)
    if rank == 0:
        text = presentation.verification_text(found)
        _echo(json.dumps(found.as_plain(), indent=2) if as_json else text)
    if not found.sound:
        raise SystemExit(1)


class _Stopped(BaseException):
    """A signal: unwind, so that what is done can be gone on with."""


def _on_signal(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    """Launchers send SIGTERM twice; who presses Ctrl-C twice wants an end at once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise _Stopped(number)


def main() -> None:
    """Run the command and exit with its code; one line for what the user can mend."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    code = 0
    try:
        _run()
    except _Stopped as stopped:
        code = 128 + stopped.args[0]
        _tell_of_end(signal.Signals(stopped.args[0]).name)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    if code:
        # Threads may hang in a system call, or wait for bytes of a rank that is gone.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(0)


def _tell_of_end(name: str) -> None:
    """A signal reaches all ranks: the first says how to go on, the others only that they ended."""
    _echo(f"error: stopped by {name}; OUT is complete or as it was before", err=True)
    if sys.argv[1:2] == ["merge"] and detect(os.environ).rank == 0:
        _echo(f"to go on: distmerge {shlex.join(sys.argv[1:])}", err=True)


@record
def _run() -> None:
    """The command. What people can mend leaves as a line and a code, anything else as a traceback:
    `record` puts that into torchrun's summary."""
    try:
        cli()
    except DistmergeError as error:
        _let_others_print(told=error.reported)
        if not error.reported:
            _echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    except SystemExit as stop:
        if stop.code:
            _let_others_print(told=detect(os.environ).rank > 0)
        raise


def _let_others_print(*, told: bool) -> None:
    """Launchers stop all ranks once one ends; `told` says that another rank prints why."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if told:
        time.sleep(LEAVE_LAST)
