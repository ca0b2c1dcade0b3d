"""Merge checkpoints of large language models on the cluster you already have.

import distmerge
result = distmerge.merge("average.yaml", "merged")
"""

from distmerge.errors import (
    ConfigError,
    DistmergeError,
    MismatchError,
    NonFiniteError,
    OutputError,
    PeerError,
    RunError,
    SourceError,
    UserError,
)
from distmerge.inspection import Inspection, inspect
from distmerge.pipeline import MergeResult, Options, merge, plan, report, select
from distmerge.planner import Plan
from distmerge.publishing.publish import Published, publish
from distmerge.verification.manifest import Finding
from distmerge.verification.verify import Verification, verify
from distmerge.version import __version__

__all__ = [
    "ConfigError",
    "DistmergeError",
    "Finding",
    "Inspection",
    "MergeResult",
    "MismatchError",
    "NonFiniteError",
    "Options",
    "OutputError",
    "PeerError",
    "Plan",
    "Published",
    "RunError",
    "SourceError",
    "UserError",
    "Verification",
    "__version__",
    "inspect",
    "merge",
    "plan",
    "publish",
    "report",
    "select",
    "verify",
]
