"""The jobs of one rank in the merge pass: weighted sums and copies first, then task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from distmerge.dist import World
from distmerge.engine import Engine, Outcome, Sink
from distmerge.planner import Plan
from distmerge.sources.reader import Inputs
from distmerge.tasks.engine import Handling, TaskEngine


def run_jobs(
    plan: Plan, jobs: Sequence[int], inputs: Inputs, sink: Sink, world: World, how: Handling
) -> Outcome:
    """Read, compute and write `jobs`, which `assignment.assign` has put in order."""
    done = Outcome(read_bytes=0, written_bytes=0, nonfinite=0)
    on_tasks = [number for number in jobs if plan.on_tasks(plan.jobs[number])]
    streamed = jobs[: len(jobs) - len(on_tasks)]
    if streamed:
        engine = Engine(
            plan,
            elements=how.budget.elements,
            device=how.device,
            allow_nonfinite=how.allow_nonfinite,
        )
        done += engine.run(streamed, inputs, sink, world)
    if on_tasks:
        done += TaskEngine(plan, how).run(on_tasks, inputs, sink, world)
    return done
