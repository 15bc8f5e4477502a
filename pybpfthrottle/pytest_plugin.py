"""Bad networks for tests: ``@pytest.mark.network("3g")``, and the fixture ``network``.

The network is that of the test's own process and of what it starts, or of one child; it ends with
the test. A failed test tells what was done to its packets. pytest loads this by its entry point.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Iterator, Optional

import pytest

_MARK = "network"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that makes a failure of what would be a skip."""
    parser.getgroup("pybpfthrottle").addoption(
        "--network-required",
        action="store_true",
        help="Fail tests that need a bad network where none can be had, instead of skipping them.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark."""
    config.addinivalue_line(
        "markers",
        "network(profile='', **conditions): have a bad network during the test: a profile's,"
        " such as '3g', or loss='1%', delay='80ms', ... (pybpfthrottle)",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have marked tests use the fixture without naming it."""
    names = getattr(item, "fixturenames", None)
    if names is not None and item.get_closest_marker(_MARK) and _MARK not in names:
        names.append(_MARK)


class TestNetwork:
    """The network of one test; good until something else is asked for."""

    __test__ = False

    def __init__(self, required: bool) -> None:
        self._required = required
        self._pid = os.getpid()
        self._loopback = False
        self._live: Optional[Any] = None
        self._told = ""

    def only(self, pid: int) -> TestNetwork:
        """Have it be that of a child from now on, and of what it starts; return it."""
        self.close()
        self._pid = pid
        return self

    def loopback(self) -> TestNetwork:
        """Have it be bad for connections within this machine too; return it."""
        self.close()
        self._loopback = True
        return self

    def profile(self, name: str, **given: Any) -> None:
        """Make it the network of a profile, such as "3g", but for what is given."""
        if self._live is None:
            self._live = self._begin(name, given)
        else:
            self._live.profile(name, **given)

    def set(self, **given: Any) -> None:
        """Make it another one: ``set(delay="200ms", loss="5%")``, with the names of options."""
        self.profile("", **given)

    def offline(self) -> Any:
        """Have nothing get through until ``online``, or the end of ``with network.offline():``."""
        if self._live is None:
            # Online again, it is as good as one can be that is bad.
            self.profile("", outage="1us/60s")
        return self._live.offline()  # type: ignore[union-attr]

    def online(self) -> None:
        """End ``offline``."""
        if self._live is not None:
            self._live.online()

    def injected(self) -> dict[Any, Any]:
        """Return what was done to the packets of each direction until now."""
        return {} if self._live is None else dict(self._live.injected())

    def told(self) -> str:
        """Return what was asked for and done, for people."""
        if self._live is not None:
            asked = self._live.to_json()["asked"]
            done = [f"{direction}: {one}" for direction, one in self._live.injected().items()]
            self._told = "\n".join([f"network: {asked}", *done])
        return self._told

    def close(self) -> None:
        """End it: the network is good again."""
        with suppress(Exception):  # what is told is for people; the end is what matters
            self.told()
        live, self._live = self._live, None
        if live is not None:
            live.close()

    def _begin(self, profile: str, given: dict[str, Any]) -> Any:
        from pybpfthrottle.conditions import conditions
        from pybpfthrottle.conditions.remote import RemoteNetwork, socket_path

        if os.geteuid() != 0 and os.path.exists(socket_path()):
            return RemoteNetwork(self._pid, profile, loopback=self._loopback, **given)
        missing = _why_not()
        if missing is not None:
            (pytest.fail if self._required else pytest.skip)(missing)
        return conditions(profile, pid=self._pid, loopback=self._loopback, **given)


def _why_not() -> Optional[str]:
    """Return why this process may not have a bad network, or None."""
    from pybpfthrottle.backends.protocol import get
    from pybpfthrottle.model import Direction

    refused = get("ebpf").unavailable(Direction.DOWNLOAD)
    if refused is None:
        return None
    return (
        f"no bad network can be had here: {refused}. Run the tests as root, or have"
        " 'sudo pybpfthrottle network-helper' run beside them"
    )


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[TestNetwork]:
    """The network of this test: ``.profile("3g")``, ``.set(loss="1%")``, ``.offline()``.

    It is good until something is asked for, by these or by ``@pytest.mark.network``.
    """
    one = TestNetwork(request.config.getoption("--network-required"))
    try:
        mark = request.node.get_closest_marker(_MARK)
        if mark is not None:
            given = dict(mark.kwargs)
            if given.pop("loopback", False):
                one.loopback()
            one.profile(*mark.args or ("",), **given)
        yield one
    finally:
        one.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """Add what was done to its packets to the report of a test that failed."""
    outcome: Any = yield
    report = outcome.get_result()
    used = getattr(item, "funcargs", {}).get(_MARK)
    if report.when == "call" and report.failed and isinstance(used, TestNetwork):
        text = used.told()
        if text:
            report.sections.append(("Network", text))
