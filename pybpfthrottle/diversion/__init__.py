"""The diversion: what comes in for some sockets goes by way of a process of ours, and is late.

So a cgroup or a process has a longer, a lossy or a disorderly way without a qdisc or a module, and
nobody else has. docs/architecture.md says how.
"""

from pybpfthrottle.diversion.diverted import Diversion, needs_diversion, open  # noqa: A004

__all__ = ["Diversion", "needs_diversion", "open"]
