"""Limit the bandwidth of any process, service or cgroup on Linux; and a pure-Python BPF toolkit.

::

    import pybpfthrottle

    with pybpfthrottle.limit(pid=1234, upload="8mbit") as throttle:
        ...
        throttle.set(upload="4mbit")
        print(throttle.counters())

``pybpfthrottle.bpf`` is the toolkit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pybpfthrottle import bpf, traffic
    from pybpfthrottle.conditions import conditions
    from pybpfthrottle.errors import Error
    from pybpfthrottle.face import limit, throttles
    from pybpfthrottle.groups import group
    from pybpfthrottle.linux import cgroup
    from pybpfthrottle.linux.process import Process
    from pybpfthrottle.model import (
        Counters,
        Direction,
        Rate,
        Target,
        ThrottleSpec,
        Traffic,
        Verdict,
    )
    from pybpfthrottle.plan import Wish
    from pybpfthrottle.shares import GroupSpec, Member
    from pybpfthrottle.targets import Selection
    from pybpfthrottle.throttle import Throttle, apply, start

__all__ = [
    "Counters",
    "Direction",
    "Error",
    "GroupSpec",
    "Member",
    "Process",
    "Rate",
    "Selection",
    "Target",
    "Throttle",
    "ThrottleSpec",
    "Traffic",
    "Verdict",
    "Wish",
    "apply",
    "bpf",
    "cgroup",
    "conditions",
    "group",
    "limit",
    "start",
    "throttles",
    "traffic",
]
__version__ = "0.1.0"

# Where each name is; modules by their own names.
_HOMES = {
    "Counters": "model",
    "Direction": "model",
    "Error": "errors",
    "GroupSpec": "shares",
    "Member": "shares",
    "Process": "linux.process",
    "Rate": "model",
    "Selection": "targets",
    "Target": "model",
    "Throttle": "throttle",
    "ThrottleSpec": "model",
    "Traffic": "model",
    "Verdict": "model",
    "Wish": "plan",
    "apply": "throttle",
    "group": "groups",
    "limit": "face",
    "start": "throttle",
    "throttles": "face",
}
_MODULES = {
    "bpf": "bpf",
    "cgroup": "linux.cgroup",
    "conditions": "conditions",
    "traffic": "traffic",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the command line starts faster for it."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"pybpfthrottle.{_MODULES[name]}")
    if name in _HOMES:
        return getattr(import_module(f"pybpfthrottle.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
