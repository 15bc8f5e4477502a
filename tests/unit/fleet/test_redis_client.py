"""The client for Redis: a real server, and servers that only look like one."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis_server import fake, free_port, redis

from pybpfthrottle.errors import SettingsError
from pybpfthrottle.fleet.redis import Connection, Server, parse

PASSWORD, UNUSUAL, SHORT = "se cret", "a/b", "pw"


def ask(port, *commands, patience_s=20.0, **server):
    """Ask a server at a port of this machine."""
    with Connection(Server("127.0.0.1", port, **server), patience_s) as connection:
        return connection.ask(*commands)


def test_a_real_server_answers():
    """Every kind of answer, also to a user with a password, and in another database."""
    default = {"password": PASSWORD}
    fleet = {"user": "fleet", "password": PASSWORD[::-1], "database": 3}
    with redis("--requirepass", PASSWORD) as (_, port):
        rights = ("on", f">{PASSWORD[::-1]}", "+@all", "~*")
        assert ask(port, ("ACL", "SETUSER", "fleet", *rights), **default) == [b"OK"]
        answers = ask(port, ("SET", "a", "ä"), ("INCR", "n"), ("GET", "none"), **fleet)
        assert answers == [b"OK", 1, None]
        assert ask(port, ("MGET", "a", "b"), **default, database=3) == [["ä".encode(), None]]
        assert ask(port, ("GET", "a"), **default) == [None]
        for code, command, known in (
            ("NOAUTH", "PING", {}),
            ("WRONGPASS", "PING", {"password": "x" + PASSWORD}),
            ("WRONGTYPE", "HGETALL n", fleet),
            ("ERR", "PING", {**default, "database": 99}),
        ):
            with pytest.raises(PermissionError, match=rf"it refuses \({code}\)"):
                ask(port, tuple(command.split()), **known)


def test_tls_needs_a_certificate_that_is_trusted(tmp_path):
    """With its authority it is, and only for its name."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-subj", "/CN=x"]
    command += [
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    files += ("--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no")
    tls = ("--tls-port", str(port := free_port()), "--port", "0", *files)
    with redis(*tls):
        url = f"rediss://localhost:{port}/0"
        with Connection(parse(f"{url}?ssl_ca_certs={certificate}"), 20.0) as connection:
            assert connection.ask(("PING",)) == [b"PONG"]
        for wrong in (url, f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"):
            with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                Connection(parse(wrong), 20.0)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "does not answer as Redis does"),
        (b"$99999999999999999999999\r\n", "does not answer as Redis does"),
        (b"$999999999\r\n" + b"x" * 600_000, "too long|does not answer"),
        (b"$-2\r\n", "does not answer as Redis does"),
        (b"$1_0\r\n", "does not answer as Redis does"),
        (b"$\xd9\xa1\r\n", "does not answer as Redis does"),
        (b":--1\r\n", "does not answer as Redis does"),
        (b"*1\r\n" * 1000, "does not answer as Redis does"),
        (b"*99999999\r\n" + b":1\r\n" * 99999, "does not answer as Redis does"),
        (b"x" * 1000, "does not answer as Redis does"),
        (b"-" + b"\x1b[2J" * 10 + b" pass\r\n", r"it refuses \(ERR\)"),
        (b"", "in time|timed out"),
        (b"$100\r\nfew", "in time|timed out"),
        (b"*2\r\n:1\r\n", "in time|timed out"),
    ],
)
def test_a_wrong_answer_is_an_error(answer, complaint):
    """It is told in words of our own."""
    with fake(answer) as port, pytest.raises(OSError, match=complaint):
        ask(port, ("PING",), patience_s=0.3 if "time" in complaint else 20.0)


def test_a_server_that_does_not_end_is_left():
    """After as many bytes as are allowed."""
    with fake(b"*100\r\n$10000\r\n" + b"x" * 10000 + b"\r\n", endless=True) as port:
        with pytest.raises(OSError, match=r"too long|does not answer"):
            ask(port, ("PING",))


def test_a_server_that_hangs_up_is_an_error():
    """Also in the middle of an answer."""
    with fake(b"*2\r\n:1\r\n", hang_up=True) as port:
        with pytest.raises(ConnectionResetError, match="hung up"):
            ask(port, ("PING",))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([b"$", b"*", b"+", b"-", b":", b"1", b"2", b"9", b"\r\n", b"x"])))
@example([b"*", b"1", b"\r\n", b"*", b"1", b"\r\n", b"$", b"-", b"1", b"\r\n"])
def test_any_bytes_are_an_answer_or_an_error(parts):
    """Nothing else comes of them."""
    ours, theirs = socket.socketpair()
    with theirs, suppress(OSError):
        theirs.sendall(b"".join(parts))
        theirs.shutdown(socket.SHUT_WR)
        with over(ours) as connection:
            connection.ask(("PING",), ("PING",))


def over(connected):
    """A client that is connected already."""
    from unittest import mock

    with mock.patch("socket.create_connection", return_value=connected):
        return Connection(Server("x"), 20.0)


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("redis://host", Server("host")),
        ("redis://host/2", Server("host", database=2)),
        ("redis://:a%2Fb@[2001:db8::1]:7000/", Server("2001:db8::1", 7000, password=UNUSUAL)),
        ("rediss://me:pw@host/0", Server("host", user="me", password=SHORT, tls=True)),
    ],
)
def test_addresses(url, server):
    """As redis-cli and others take them; shown without the password."""
    assert parse(url) == server
    assert "pw" not in str(server)
    assert parse(str(server)) == server._replace(user="", password="")


@pytest.mark.parametrize(
    "url",
    [
        *("", "host:6379", "http://host", "redis://", "redis://:pw@host:port", "redis://host/x"),
        *("redis://host:99999", "redis://host/-1", "redis://h?db=1", "redis://[h", "redis://h?x"),
        "redis://:pw@h/0?ssl_ca_certs=/no/such/file",
    ],
)
def test_other_addresses_are_refused(url):
    """In one line, with what is allowed, and without the password."""
    with pytest.raises(SettingsError, match=r"shared (is no address|names)") as raised:
        parse(url)
    assert "pw" not in str(raised.value)


def test_nothing_listens():
    """The kernel says so at once."""
    begin = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        ask(free_port(), ("PING",))
    assert time.monotonic() - begin < 10
