"""A pure-Python BPF toolkit, and a bandwidth limiter for programs on Linux made with it.

As a library::

    from pybpfthrottle import Direction, Rate, apply, cgroup

    with apply([cgroup.from_path(path)], {Direction.DOWNLOAD: Rate.parse("1M")}) as throttle:
        ...
        print(throttle.counters())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pybpfthrottle.errors import Error
    from pybpfthrottle.linux import cgroup
    from pybpfthrottle.linux.process import Process
    from pybpfthrottle.model import Counters, Direction, Rate, Verdict
    from pybpfthrottle.targets import Selection
    from pybpfthrottle.throttle import Throttle, apply

__all__ = [
    "Counters",
    "Direction",
    "Error",
    "Process",
    "Rate",
    "Selection",
    "Throttle",
    "Verdict",
    "apply",
    "cgroup",
]
__version__ = "0.1.0"

_HOMES = {
    "Counters": "model",
    "Direction": "model",
    "Error": "errors",
    "Process": "linux.process",
    "Rate": "model",
    "Selection": "targets",
    "Throttle": "throttle",
    "Verdict": "model",
    "apply": "throttle",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the command line starts faster for it."""
    from importlib import import_module

    if name == "cgroup":
        return import_module("pybpfthrottle.linux.cgroup")
    if name in _HOMES:
        return getattr(import_module(f"pybpfthrottle.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
