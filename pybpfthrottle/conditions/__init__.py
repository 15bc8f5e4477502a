"""Bad networks for one process: what is done to its packets, by what means, and how often it was.

::

    import pybpfthrottle

    with pybpfthrottle.conditions("3g", pid=browser.pid) as network:
        ...
        with network.offline():
            ...
        print(network.injected())
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from pybpfthrottle.conditions.network import Network
    from pybpfthrottle.face import Some
    from pybpfthrottle.plan import Wish

__all__ = ["conditions"]


def conditions(
    profile: str = "",
    *,
    pid: Some[int] = (),
    name: Some[str] = (),
    exe: Some[str] = (),
    user: Some[str] = (),
    cgroup: Some[str] = (),
    unit: Some[str] = (),
    children: bool = True,
    loopback: bool = False,
    label: str = "",
    stack: bool = False,
    wish: Optional[Wish] = None,
    supervise: bool = True,
    **given: Any,
) -> Network:
    """Give processes, cgroups or units a bad network; return it, to change it and to ask it.

    ``profile`` is the name of one, such as "3g". What else is given stands in place of its
    numbers: ``download`` and ``upload`` are rates, as for ``pybpfthrottle.limit``; ``delay``,
    ``jitter``, ``loss``, ``download_loss``, ``upload_loss``, ``outage``, ``duplicate``,
    ``reorder``, ``corrupt``, ``block``, ``dns`` and ``seed`` are texts, as on the command line.
    The target and all else is as for ``pybpfthrottle.limit``.

    The network is in force when this returns, and ends with the ``with`` block, by ``close``, or
    with this process. Without ``supervise`` the caller has to run what ``chores`` returns.

    Raises LimitError for what cannot be read, ThrottleError for what cannot be done here, and what
    ``pybpfthrottle.limit`` raises. Then nothing is left of it. Needs root, or CAP_BPF and
    CAP_NET_ADMIN; Linux 4.10, for processes 5.10.
    """
    from pybpfthrottle import face, registry
    from pybpfthrottle.conditions.network import Asked, begin
    from pybpfthrottle.plan import Wish

    asked = Asked.of(profile, **given)
    target = face.target_from(
        pid=pid, name=name, exe=exe, user=user, cgroup=cgroup, unit=unit, children=children
    )
    wish = wish or Wish()
    if stack:
        wish = wish.changed(stack=True)
    with face.beside_own(target, asked.limits, wish) as remember:
        network = begin(target, asked, wish=wish, loopback=loopback, label=label)
        remember(network.throttle)
    registry.tidy_up()
    if supervise:
        network.supervise()
    return network


class _Room(ModuleType):
    """The package, which can be called: ``pybpfthrottle.conditions`` is it and its function."""

    def __call__(self, profile: str = "", **given: Any) -> Network:
        """Return what ``conditions`` returns."""
        return conditions(profile, **given)


sys.modules[__name__].__class__ = _Room
