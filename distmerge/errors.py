"""The exceptions of distmerge.

DistmergeError
|-- UserError            the user can mend it; exit code 2
|   |-- ConfigError      the recipe
|   |-- SourceError      an input: missing, damaged or hostile
|   |-- MismatchError    inputs that do not fit each other
|   |-- NonFiniteError   NaN or Inf in an input, or made by rounding
|   `-- OutputError      the output folder, the disk, the budget
`-- RunError             the run failed; exit code 1
    `-- PeerError        another rank failed, and this rank stopped with it
"""


class DistmergeError(Exception):
    """Root of all that distmerge raises on purpose.

    `reported`: another rank prints it, so that a thousand ranks do not print a thousand lines.
    """

    exit_code = 1
    reported = False


class UserError(DistmergeError):
    """Something that the user can mend: the message says what, where and how."""

    exit_code = 2


class ConfigError(UserError):
    """The recipe is wrong."""


class SourceError(UserError):
    """An input checkpoint is missing, damaged, hostile or of an unsupported kind."""


class MismatchError(UserError):
    """The inputs do not hold the same tensors."""


class NonFiniteError(UserError):
    """An input holds NaN or Inf, or a value overflows the output dtype."""


class OutputError(UserError):
    """The output can't be written as asked: folder, disk space or memory budget."""


class RunError(DistmergeError):
    """The run failed for a reason that is not the user's."""


class PeerError(RunError):
    """Another rank failed first; `exit_code` is that of the first cause."""

    def __init__(self, message: str, *, exit_code: int = 1, reported: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.reported = reported
