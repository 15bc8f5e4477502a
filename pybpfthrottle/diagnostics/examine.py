"""Run all checks and walk the decision tree; the examination as a value."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Callable, NamedTuple, Optional

from pybpfthrottle.diagnostics import (
    cgroups,
    company,
    decision,
    kernel,
    kernel_log,
    rights,
    shipped,
    trials,
)
from pybpfthrottle.diagnostics.check import Check, Outcome, Result, Setup
from pybpfthrottle.diagnostics.decision import Conclusion, Step
from pybpfthrottle.linux.signals import held_back

# A check comes after all that it needs.
CHECKS: tuple[Check, ...] = (
    *kernel.CHECKS,
    *rights.CHECKS,
    *cgroups.CHECKS,
    *company.CHECKS,
    *shipped.CHECKS,
    *trials.LOAD_CHECKS,
    *kernel.FEATURE_CHECKS,
    *trials.CHECKS,
    *kernel_log.CHECKS,
)


class Examination(NamedTuple):
    """The result of each check, and the conclusion from all of them."""

    results: list[tuple[Check, Result]]
    path: list[Step]
    conclusion: Conclusion

    def sections(self) -> dict[str, list[tuple[Check, Result]]]:
        """The results by section."""
        found: dict[str, list[tuple[Check, Result]]] = {}
        for check, result in self.results:
            found.setdefault(check.section, []).append((check, result))
        return found

    def reasons(self) -> list[Result]:
        """Return the failures and warnings of the checks that the conclusion names."""
        by_id = {check.id: result for check, result in self.results}
        named = [by_id[check_id] for check_id in self.conclusion.because]
        return [result for result in named if result.outcome in (Outcome.FAIL, Outcome.WARN)]


def examine(
    *,
    pid: Optional[int] = None,
    cgroup: Optional[str] = None,
    unit: Optional[str] = None,
    root_cgroup: bool = False,
    progress: Callable[[Check], None] = lambda check: None,
) -> Examination:
    """Run all checks; undo every change, even if interrupted.

    The target is a process, a path or a unit; the default is this process's cgroup. With
    ``root_cgroup`` attaching to the root cgroup is tried as well. ``progress`` is called with
    each check before it runs.
    """
    stack = ExitStack()
    setup = Setup(stack, pid=pid, cgroup=cgroup, unit=unit, root_cgroup=root_cgroup)
    try:
        for check in CHECKS:
            progress(check)
            setup.results[check.id] = check.run(setup)
    finally:
        with held_back():
            stack.close()
    path, conclusion = decision.walk(setup.results, decision.TREE)
    return Examination([(check, setup.results[check.id]) for check in CHECKS], path, conclusion)
