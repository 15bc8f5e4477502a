"""What the devices of a network namespace have carried."""

from __future__ import annotations

import pytest

from pybpfthrottle.linux.traffic import DeviceBytes, differ, parse

DEV = """Inter-|   Receive                            |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls
    lo:     100    1    0    0    0     0          0         0      100    1    0    0    0    0
  eth0: 1000 1 0 0 0 0 0 0 2000 1 0 0 0 0 0 0
a:b:5 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0
"""


def test_the_loopback_device_is_told_from_others() -> None:
    """A name may have a colon, and need not be followed by a space."""
    assert parse(DEV) == DeviceBytes(200, 3012)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (DeviceBytes(5, 5), DeviceBytes(5, 5), False),
        (DeviceBytes(5, 5), DeviceBytes(6, 5), True),
        (DeviceBytes(5, 5), DeviceBytes(5, 900), False),
        (DeviceBytes(5, 5), DeviceBytes(5, 9000), True),
        (None, DeviceBytes(5, 9000), False),
        (DeviceBytes(5, 5), None, False),
    ],
)
def test_what_the_kernel_sends_by_itself_does_not_count(before, after, moved) -> None:
    """It asks for routers and addresses, but never by the loopback device."""
    assert differ(before, after) is moved
