"""D-Bus: a real dbus-daemon, what a real NetworkManager has answered, and hostile answers."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybpfthrottle.linux import dbus, network_manager
from pybpfthrottle.linux.dbus import Bus, _Reader

# Recorded from NetworkManager 1.42.4, in a network namespace of its own, with one connection named
# Office over a bridge, whose profile says that it is metered.
RECORDED = Path(__file__).parents[1] / "fixtures/networkmanager-1.42.4.dbus"
CONFIG = """<busconfig><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow send_destination="*"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/>
<allow receive_type="error"/><allow receive_type="signal"/></policy></busconfig>"""


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Where the system's bus is, for this test, which may have to wait for a CPU."""
    monkeypatch.setattr(dbus, "_PATIENCE_S", 20)
    path = tmp_path / "bus"
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"tcp:host=x;unix:path={path},guid=1")
    return str(path)


@contextmanager
def server(address, *answers):
    """Accept connections, and send each one of the answers, whatever it asks."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()

        def serve():
            for answer in answers:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    connection.sendall(answer)
                    while connection.recv(4096):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_a_real_bus_answers(address, tmp_path):
    """A property of the bus itself; and what is not there is refused by its name."""
    config = tmp_path / "bus.conf"
    config.write_text(CONFIG.format(path=address))
    command = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"]
    own = "org.freedesktop.DBus"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as daemon:
        try:
            assert address in daemon.stdout.readline()
            with Bus() as bus:
                assert "HeaderFiltering" in bus.property(
                    own, "/org/freedesktop/DBus", own, "Features"
                )
                with pytest.raises(OSError, match=r"org\.example\.None.*does not exist"):
                    bus.property("org.example.None", "/", "a.b", "c")
            with pytest.raises(OSError, match="does not exist"):
                network_manager.networks()
        finally:
            daemon.terminate()


def test_what_a_real_network_manager_answers(address):
    """The name of its connection, and that it is metered."""
    with server(address, RECORDED.read_bytes()):
        assert network_manager.networks() == ({"Office"}, True)


@pytest.mark.parametrize("cut", [0, 20, 40, 400])
def test_a_bus_that_falls_silent_is_not_waited_for(address, cut, monkeypatch):
    """Whatever it has said before."""
    monkeypatch.setattr(dbus, "_PATIENCE_S", 0.1)
    with server(address, RECORDED.read_bytes()[:cut]), pytest.raises(TimeoutError):
        network_manager.networks()


def test_no_bus_is_an_error_at_once(address):
    """There is nobody to ask."""
    with pytest.raises(FileNotFoundError):
        Bus()


def test_an_address_without_a_path_is_told(monkeypatch):
    """Only sockets of the machine itself are used."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "tcp:host=192.0.2.1,port=1")
    with pytest.raises(OSError, match="no path of a socket in DBUS_SYSTEM_BUS_ADDRESS"):
        Bus()


def test_a_user_may_be_refused(address):
    """The bus says so before anything else."""
    with server(address, b"REJECTED EXTERNAL\r\n"), pytest.raises(PermissionError):
        Bus()


def reply(serial, signature, body):
    """An answer, as the bus sends it."""
    fields = b"\5\1u\0" + struct.pack("<I", serial)
    fields += b"\x08\1g\0" + bytes([len(signature)]) + signature.encode() + b"\0"
    start = struct.pack("<4B3I", 108, 2, 0, 1, len(body), 9, len(fields))
    message = start + fields
    return message + bytes(-len(message) % 8) + body


def variant(signature, value):
    """A variant whose value is aligned by 4."""
    start = bytes([len(signature)]) + signature.encode() + b"\0"
    return start + bytes(-len(start) % 4) + value


def text(value):
    """A string, or a path."""
    return struct.pack("<I", len(value)) + value.encode() + b"\0"


def test_a_wireless_network_has_its_own_name(address):
    """Besides that of the connection; it may be no text."""
    active, point = (
        network_manager._TOP + "/ActiveConnection/1",
        network_manager._TOP + "/AccessPoint/7",
    )
    paths = struct.pack("<I", len(text(active))) + text(active)
    answers = [
        variant("u", struct.pack("<I", 4)),
        variant("ao", paths),
        variant("s", text("Cafe profile")),
        variant("o", text(point)),
        variant("ay", struct.pack("<I", 5) + b"Caf\xc3\xa9"),
    ]
    data = b"OK 0123\r\n" + reply(1, "s", text(":1.5"))
    data += b"".join(reply(serial, "v", body) for serial, body in enumerate(answers, 2))
    with server(address, data):
        assert network_manager.networks() == ({"Cafe profile", "Café"}, False)


def test_a_message_that_is_too_long_is_not_read(address):
    """Its length is known before."""
    start = struct.pack("<4B3I", 108, 2, 0, 1, 1 << 30, 9, 0)
    with server(address, b"OK 1\r\n" + start), pytest.raises(OSError, match="too long"):
        Bus()


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60), st.text("ybnqiuxtdsogav(){}", max_size=12))
def test_any_bytes_are_values_or_an_error(data, signature):
    """Nothing else comes of them, and nothing takes long."""
    with suppress(OSError):
        _Reader(data).values(signature)


def test_a_variant_in_a_variant_in_a_variant_ends():
    """However deep it is nested."""
    with pytest.raises(OSError, match=os.strerror(dbus.errno.EBADMSG)):
        _Reader(b"\1v\0" * 5000).values("v")
