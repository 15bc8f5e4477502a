"""The diversion: what comes in for some sockets goes by way of a process of ours, and is late.

So a cgroup or a process has a longer, a lossy or a disorderly way without a qdisc or a module, and
nobody else has. docs/architecture.md says how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pybpfthrottle.diversion.diverted import (
        Diversion,
        needs_diversion,
        open,  # noqa: A004 - it is diversion.open
        open_queue,
        prepare_queue,
    )

__all__ = ["Diversion", "needs_diversion", "open", "open_queue", "prepare_queue"]


def __getattr__(name: str) -> Any:
    """Import the owner's side when it is asked for: the keeper starts without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pybpfthrottle.diversion import diverted

    return getattr(diverted, name)
