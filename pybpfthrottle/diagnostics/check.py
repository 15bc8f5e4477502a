"""A check of this machine as a value: its subject, how to run it, and its result."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Callable, Optional, Sequence

from pybpfthrottle.errors import Error
from pybpfthrottle.linux.cgroup import Cgroup


class Outcome(Enum):
    """The outcome of a check."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Result:
    """What a check found: one line, and the evidence for it, a line each.

    ``cause`` distinguishes kinds of failure for the decision tree.
    """

    outcome: Outcome
    text: str
    evidence: tuple[str, ...] = ()
    cause: str = ""


def passed(text: str, *evidence: str) -> Result:
    """Return the result of a check that passed."""
    return Result(Outcome.PASS, text, evidence)


def warned(text: str, *evidence: str, cause: str = "") -> Result:
    """Return a result that need not prevent limits, but is worth knowing."""
    return Result(Outcome.WARN, text, evidence, cause)


def failed(text: str, *evidence: str, cause: str = "") -> Result:
    """Return a result that prevents limits."""
    return Result(Outcome.FAIL, text, evidence, cause)


def skipped(because: str, *evidence: str, cause: str = "") -> Result:
    """Return the result of a check that could not be run."""
    return Result(Outcome.SKIP, because, evidence, cause)


@dataclass
class Setup:
    """What is examined: the target requested, and what the checks have found so far.

    A check registers every change to the machine with ``stack``, which undoes it.
    """

    stack: ExitStack
    pid: Optional[int] = None
    cgroup: Optional[str] = None
    unit: Optional[str] = None
    root_cgroup: bool = False
    target: Optional[Cgroup] = None
    scratch: Optional[Cgroup] = None
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def named(self) -> bool:
        """Whether a target was requested."""
        return (self.pid, self.cgroup, self.unit) != (None, None, None)

    def failed(self, check_id: str) -> bool:
        """Whether a check has failed."""
        result = self.results.get(check_id)
        return result is not None and result.outcome is Outcome.FAIL


@dataclass(frozen=True)
class Check:
    """One thing to try.

    ``meaning`` says why it matters, ``remedy`` what to do if it fails. It is skipped if one of
    the checks that it ``needs`` did not pass.
    """

    id: str
    section: str
    title: str
    meaning: str
    remedy: str
    attempt: Callable[[Setup], Result]
    needs: Sequence[str] = ()

    def run(self, setup: Setup) -> Result:
        """Run the check; an unforeseen error is a warning, not the end of the examination."""
        for needed in self.needs:
            if setup.results[needed].outcome in (Outcome.FAIL, Outcome.SKIP):
                return skipped(f"{needed} did not pass", cause="needs")
        try:
            return self.attempt(setup)
        except (Error, OSError, ValueError) as error:
            return warned(f"could not be checked: {error}")
