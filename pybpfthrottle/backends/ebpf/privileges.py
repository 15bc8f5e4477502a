"""What the limiter may ask of bpf(2), and what to do where it may not."""

from __future__ import annotations

from pybpfthrottle.bpf import privileges
from pybpfthrottle.bpf.abi import ProgType

_NEEDED = privileges.capabilities_for(ProgType.CGROUP_SKB)


def missing_capabilities(*, refused: bool = False) -> list[str]:
    """Return the names of the capabilities that this process lacks for limiting.

    After an EPERM, with ``refused``, CAP_NET_ADMIN is not taken as included in CAP_SYS_ADMIN.
    """
    return privileges.missing_capabilities(_NEEDED, refused=refused)


def why_not_permitted(command: str) -> str:
    """Return what is behind the EPERM of a bpf(2) command, and what to do."""
    return privileges.why_not_permitted(command, _NEEDED)


def why_refused(error: OSError, command: str) -> str:
    """Return what is behind a failed bpf(2) command, where its errno alone tells too little."""
    return privileges.why_refused(error, command, _NEEDED)
