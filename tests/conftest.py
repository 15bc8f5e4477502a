"""Lies beside compiled.py, so that all tests can import it, and watches over all of them."""

from __future__ import annotations

import signal
from typing import Iterator

import pytest
from since import Lack, needs_release


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked as newer than this kernel."""
    for mark in item.iter_markers("since"):
        needs_release(*mark.args)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Make a failure of each skip, and each expected failure, that is not for a checked lack."""
    outcome = yield
    report = outcome.get_result()
    error = call.excinfo.value if call.excinfo else None
    if not report.skipped:
        return
    path, line, name = item.location
    if isinstance(error, Lack):
        report.longrepr = (path, (line or 0) + 1, f"Skipped: {error}")
    else:
        report.outcome = "failed"
        report.longrepr = f"{path}: {name} may be skipped only by what since.py offers: {error}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Make an error of a file that is skipped as a whole."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} is skipped as a whole: {report.longrepr}"


@pytest.fixture(scope="session", autouse=True)
def _signals_for_children() -> Iterator[None]:
    """Start each program with default signals, also where pytest runs by nohup or with "&".

    A program inherits that a signal is ignored, but not that a handler does nothing.
    """
    ignored = [number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
               if signal.getsignal(number) is signal.SIG_IGN]  # fmt: skip
    for number in ignored:
        signal.signal(number, lambda *_: None)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
