"""The power supply and the default routes, from files as the kernel has them."""

from __future__ import annotations

import pytest

from pybpfthrottle.linux import surroundings

# Of a laptop: the columns are the kernel's.
ROUTE = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
{more}wlan0\t0002A8C0\t00000000\t0001\t0\t0\t600\t00FFFFFF\t0\t0\t0
"""
ZEROS = "0" * 32
ROUTE6 = f"""{ZEROS} 00 {ZEROS} 00 fe80{"0" * 27}1 00000400 00000003 00000000 00000003     wwan0
fe80{"0" * 28} 40 {ZEROS} 00 {ZEROS} 00000100 00000001 00000000 00000001     wlan0
{ZEROS} 00 {ZEROS} 00 {ZEROS} ffffffff 00000001 00000000 00200200       lo
"""


def put(directory, **files):
    """Write files into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text + "\n")


BATTERY = {"type": "Battery", "status": "Discharging", "scope": "System"}


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, False),
        ({"AC": {"type": "Mains", "online": "1"}}, False),
        ({"BAT0": BATTERY}, True),
        ({"BAT0": {**BATTERY, "status": "Charging"}}, False),
        ({"AC": {"type": "Mains", "online": "0"}, "BAT0": BATTERY}, True),
        # It is full, so nothing flows yet.
        (
            {"AC": {"type": "Mains", "online": "0"}, "B": {**BATTERY, "status": "Not charging"}},
            True,
        ),
        # The charger is too weak.
        ({"AC": {"type": "Mains", "online": "1"}, "BAT0": BATTERY}, False),
        ({"USB": {"type": "USB", "online": "1"}, "A": {"type": "Mains", "online": "0"}}, False),
        ({"USB": {"type": "USB", "online": "0"}}, False),
        ({"mouse": {**BATTERY, "scope": "Device"}}, False),
    ],
)
def test_on_battery(tmp_path, supplies, expected):
    """Only if no charger is plugged in, and there is a battery of the machine itself."""
    for name, files in supplies.items():
        put(tmp_path / name, **files)
    assert surroundings.on_battery(str(tmp_path)) is expected


def test_a_kernel_without_power_supplies_tells_nothing(tmp_path):
    """That is not the same as no battery."""
    assert surroundings.on_battery(str(tmp_path / "none")) is None


def devices(tmp_path, more="", **states):
    """What is found, where these devices are in these states."""
    put(tmp_path / "proc", route=ROUTE.format(more=more), ipv6_route=ROUTE6)
    for name, state in states.items():
        put(tmp_path / "net" / name, operstate=state)
    return surroundings.default_devices(str(tmp_path / "proc"), str(tmp_path / "net"))


def test_the_devices_of_the_default_routes(tmp_path):
    """One of each family; a tunnel does not know whether it is up."""
    assert devices(tmp_path, wlan0="up", wwan0="unknown") == {"wlan0", "wwan0"}


def test_the_best_route_counts(tmp_path):
    """A cable beside the wireless network is preferred by its metric."""
    cable = "eth0\t00000000\t0102A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
    assert devices(tmp_path, cable, wlan0="up", eth0="up") == {"eth0"}
    assert devices(tmp_path, cable, wlan0="up", eth0="down") == {"wlan0"}


def test_no_route_is_no_device(tmp_path):
    """Also without IPv6, whose file is then missing."""
    assert surroundings.default_devices(str(tmp_path), str(tmp_path)) == frozenset()
