"""Files of /proc as the kernel writes them, with names that somebody hostile has chosen.

The kernel decides what is where in them; a name must neither move that, nor be taken for it.
"""

from __future__ import annotations

import io
from random import Random
from typing import Any, Callable, Optional

from pybpfthrottle import targets
from pybpfthrottle.linux import carriers, cgroup, endpoints, process, tables

# What separates fields and lines, for the kernel or for Python.
_SPECIAL = [b" ", b"\t", b"\n", b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\\", b")", b"("]
_SPECIAL += [b"0::/", b" - ", b":", b"/", b"..", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff", b"\x1b["]
_SPECIAL += [
    b"@",
    b"#",
    b"\\040",
    b" (deleted)",
    b"Tgid:\t1",
    b"\rUid: 0 0",
    b"iff:\tlo",
    b"00000000:",
]
_LONGEST_COMM = 15


def make(random: Random) -> bytes:
    """Return an input: the kind of file, and the name."""
    kind = random.choice(sorted(_USES))
    parts = [
        random.choice(_SPECIAL) if random.randrange(2) else bytes([random.randint(1, 255)])
        for _ in range(random.randint(1, 8))
    ]
    return kind.encode() + b"\0" + b"".join(parts)


def use(data: bytes) -> None:
    """Read a file that has the name, and compare with what the kernel says in it."""
    kind, _, name = data.partition(b"\0")
    _USES[kind.decode()](name)


def _files(files: dict[str, bytes]) -> None:
    """Have what reads /proc see these files."""

    def contents(path: str) -> bytes:
        if path not in files:
            raise FileNotFoundError(2, "No such file", path)
        return files[path]

    def opened(path: str, errors: Optional[str] = None, **more: Any) -> Any:
        return io.TextIOWrapper(io.BytesIO(contents(path)), "utf-8", errors, **more)

    tables.contents = contents
    process.open = opened  # type: ignore[attr-defined]


def _escaped(name: bytes, what: bytes) -> bytes:
    """Escape as seq_escape of the kernel does: octal."""
    return b"".join(b"\\%03o" % one if one in what else bytes([one]) for one in name)


def _stat(name: bytes) -> None:
    numbers = b" ".join(b"%d" % number for number in range(50))
    line = b"7 (" + name[:_LONGEST_COMM] + b") S " + numbers + b"\n"
    _files({"/proc/7/stat": line})
    found = process._stat(7)
    assert found is not None
    assert found[:4] == ["S", "0", "1", "2"], found
    assert not process.has_ended(7)


def _comm(name: bytes) -> None:
    _files({"/proc/7/comm": name[:_LONGEST_COMM] + b"\n"})
    assert process._name(7).encode(errors="replace") != b"?" or name == b"?"


def _status(name: bytes) -> None:
    shown = _escaped(name[:_LONGEST_COMM], b"\n\\")
    text = b"Name:\t" + shown + b"\nUmask:\t0022\nTgid:\t42\nUid:\t1\t2\t3\t4\nCapEff:\t0\n"
    _files({"/proc/7/status": text, "/proc/self/status": text})
    assert cgroup._leader(7) == 42
    assert targets.effective_user(7) == 2
    assert process.own_status()["CapEff"] == "0"


def _mountinfo(name: bytes) -> None:
    path = _escaped(b"/home/" + name, b" \t\n\\")
    line = b"30 25 0:27 / " + path + b" rw - fuse.x " + _escaped(name, b" \t\n\\#") + b" rw\n"
    cgroups = b"31 25 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    _files({"/proc/self/mountinfo": line + cgroups})
    found = cgroup.mounts()
    assert len(found) == 2, found
    assert found[0].path.encode(errors="surrogateescape") == b"/home/" + name
    assert found[1].path == "/sys/fs/cgroup"


def _cgroup(name: bytes) -> None:
    inside = name.replace(b"\n", b"").replace(b"/", b"") or b"x"
    text = b"1:name=systemd:/\n0::/user/" + inside + b"\n"
    _files({"/proc/7/cgroup": text})
    where = cgroup.Mount("0:28", "/", "/sys/fs/cgroup", "cgroup2")
    if inside in (b".", b"..") or inside.endswith(b" (deleted)"):
        return
    found = cgroup.from_pid(7, where)
    path = found.path.encode(errors="surrogateescape")
    assert path == b"/sys/fs/cgroup/user/" + inside, path


def _unix(name: bytes) -> None:
    header = b"Num       RefCount Protocol Flags    Type St Inode Path\n"
    line = b"0000000000000000: 00000002 00000000 00010000 0001 01 "
    table = header + line + b"4711 " + name + b"\n" + line + b"4712 @safe\n"
    _files({"/proc/7/net/unix": table})
    found = endpoints.listed_in_proc(7)
    assert {4711, 4712} <= found.keys(), found


def _fdinfo(name: bytes) -> None:
    device = name.replace(b"/", b"").replace(b":", b"")[:_LONGEST_COMM]
    # The kernel allows no blanks in the names of devices.
    device = b"".join(bytes([one]) for one in device if not chr(one).isspace())
    text = b"pos:\t0\nflags:\t0104002\nmnt_id:\t30\niff:\t" + device + b"\n"
    _files({"/proc/7/fdinfo/3": text})
    assert len(carriers._interface(7, "3")) <= 1


_USES: dict[str, Callable[[bytes], None]] = {
    "stat": _stat,
    "comm": _comm,
    "status": _status,
    "mountinfo": _mountinfo,
    "cgroup": _cgroup,
    "unix": _unix,
    "fdinfo": _fdinfo,
}
