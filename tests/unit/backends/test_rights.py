from __future__ import annotations

import pytest

from pybpfthrottle.backends.ebpf import privileges
from pybpfthrottle.bpf import privileges as toolkit

NET_ADMIN, SYS_ADMIN, BPF = 1 << 12, 1 << 21, 1 << 39


@pytest.fixture
def held(monkeypatch):
    """Sets the capabilities that this process seems to have."""
    return lambda bits: monkeypatch.setattr(toolkit, "effective_capabilities", lambda: bits)


@pytest.mark.parametrize(
    ("bits", "missing"),
    [
        (0, ["CAP_BPF", "CAP_NET_ADMIN"]),
        (NET_ADMIN, ["CAP_BPF"]),
        (BPF, ["CAP_NET_ADMIN"]),
        (BPF | NET_ADMIN, []),
        (SYS_ADMIN, []),
        ((1 << 41) - 1, []),
        (~(BPF | NET_ADMIN | SYS_ADMIN) & (1 << 41) - 1, ["CAP_BPF", "CAP_NET_ADMIN"]),
    ],
)
def test_missing_capabilities_are_named(held, bits, missing):
    """CAP_BPF and CAP_NET_ADMIN are needed, or CAP_SYS_ADMIN in their place."""
    held(bits)
    assert privileges.missing_capabilities() == missing


def test_after_a_refusal_cap_net_admin_is_missing_too(held):
    """CAP_SYS_ADMIN stands in for it on some kernels alone."""
    held(SYS_ADMIN)
    assert privileges.missing_capabilities(refused=True) == ["CAP_NET_ADMIN"]
    assert "lacks CAP_NET_ADMIN;" in privileges.why_not_permitted("BPF_LINK_CREATE")
