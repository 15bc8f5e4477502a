"""A rescue image: a kernel, busybox, a stripped Python of Debian's, and the single file."""

from __future__ import annotations

import compileall
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator, NamedTuple

from vm import VmError, debian, kernels
from vm.archive import Archive
from vm.console import Console
from vm.debian import Apt, Suite
from vm.kernels import Kernel

KERNEL = "6.12"
_SUITE, _PYTHON = "bookworm", "3.11"
_PACKAGES = ("busybox-static", "python3.11-minimal", "libpython3.11-stdlib")
_MODULES = ("virtio_pci", "virtio_net")
# Of the standard library. What a rescue system has no use for, and the program does not need.
_WITHOUT = {"asyncio", "config-3.11-x86_64-linux-gnu", "curses", "dbm", "distutils", "email"}
_WITHOUT |= {"ensurepip", "html", "http", "idlelib", "lib2to3", "multiprocessing", "pydoc_data"}
_WITHOUT |= {"sqlite3", "test", "tkinter", "tomllib", "turtledemo", "unittest", "venv", "wsgiref"}
_WITHOUT |= {"xml", "xmlrpc", "dist-packages"}
# Libraries that the rest does not need, by the beginning of their names.
_OTHER_LIBRARIES: tuple[str, ...] = (
    "libsqlite3",
    "libncurses",
    "libpanel",
    "libssl",
    "libcrypto",
    "libkrb5",
)
_OTHER_LIBRARIES += ("libgssapi", "libk5crypto", "libdb-", "libtirpc", "libnsl", "libreadline")
_OTHER_LIBRARIES += ("libform", "libmenu", "libhistory", "libcom_err", "libkeyutils", "libperl")
_OTHER_LIBRARIES += ("libstdc++", "gconv", "engines-3", "ossl-modules", "krb5", "perl-base", "perl")
_MB = 1_000_000
_IMAGE_BYTES = 3 * _MB
PROGRAM = "/usr/bin/pybpfthrottle"
PROMPT = "rescue:~# "
_INITTAB = """\
::sysinit:/etc/rc
ttyS0::respawn:-/bin/sh
::shutdown:/bin/umount -a -r
"""
_RC = """\
#!/bin/sh
/bin/busybox mkdir -p /bin /sbin /proc /sys /dev /tmp /run
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module 2>/dev/null; done
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
stty -F /dev/ttyS0 cols 100 rows 40
"""
_PROFILE = f"export PATH=/bin:/sbin:/usr/bin HOME=/ TERM=dumb PS1='{PROMPT}'\n"


class Image(NamedTuple):
    """What is booted."""

    kernel: Kernel
    initramfs: bytes


def image(program: bytes) -> Image:
    """Return the image; what is not in the cache is downloaded."""
    kept = debian.kept(f"rescue-{_PYTHON}", _download)
    archive = Archive()
    archive.tree(kept, _is_wanted)
    busybox = next(
        path for path in (kept / "bin/busybox", kept / "usr/bin/busybox") if path.exists()
    )
    archive.copy(busybox, "/bin/busybox")
    for path in ("/init", "/bin/sh"):
        archive.link(path, "/bin/busybox")
    archive.link("/usr/bin/python3", f"python{_PYTHON}")
    archive.link("/usr/bin/env", "/bin/busybox")
    archive.add("/etc/inittab", _INITTAB.encode(), 0o644)
    archive.add("/etc/rc", _RC.encode())
    archive.add("/etc/profile", _PROFILE.encode(), 0o644)
    archive.add("/etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)
    archive.add(PROGRAM, program)
    kernel = kernels.of_debian(KERNEL, "x86_64")
    return Image(kernel, archive.finish() + kernels.modules(kernel._replace(config=None), _MODULES))


def _download(made: Path, own: Path) -> None:
    print(f"Downloading Python {_PYTHON} ({_SUITE})", flush=True)
    apt = Apt(own, Suite("Debian", _SUITE, "amd64"))
    apt.download_with_dependencies(*_PACKAGES)
    apt.unpack(made)
    # Debian compiles modules when it installs them. This one can only do so for its own kind.
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == _PYTHON:
        library = made / f"usr/lib/python{_PYTHON}"
        compileall.compile_dir(library, stripdir=str(made), quiet=2, workers=1)


def _is_wanted(path: str) -> bool:
    name = Path(path).name
    if path.startswith(("/usr/share", "/var", "/usr/include", "/etc", "/usr/sbin", "/sbin")):
        return False
    return name not in _WITHOUT and not name.startswith(_OTHER_LIBRARIES)


class Step(NamedTuple):
    """What is typed, and what has to be found in what is shown then."""

    command: str
    expected: str


# {url} is that of the server; {id} is the throttle's, as the command before has shown it.
STEPS = (
    Step("uname -sr && python3 -V", "Python 3"),
    Step("pybpfthrottle run --download-limit 200K -- true", "mount -t cgroup2"),
    Step("mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2", ""),
    Step("pybpfthrottle verify-setup | tail -n 2", "This machine can limit"),
    Step("time wget -q -O /image {url}/image", r"real\s+0m [0-9]\."),
    Step(
        "pybpfthrottle run --download-limit 200K -- wget -q -O /image {url}/image",
        r"ratio=(0\.[6-9]\d|1\.0\d)x",
    ),
    Step("wget -q -O /dev/null {url}/backup &", ""),
    Step("pybpfthrottle --pid $! --download-limit 500K --detach", ""),
    Step("pybpfthrottle list", r"500\.0 KB/s"),
    Step("pybpfthrottle set {id} --download-limit 200K", ""),
    Step("pybpfthrottle list", r"200\.0 KB/s"),
    Step("pybpfthrottle remove {id}", ""),
    Step("pybpfthrottle list", "Nothing is limited"),
)


class Session(NamedTuple):
    """What was seen on the console, and how long it took to the first prompt."""

    text: str
    boot_s: float
    ratio: str


def play(directory: Path, made: Image, timeout_s: float) -> Session:
    """Boot the image, type the steps, and power off. Raises VmError where one fails."""
    initramfs = directory / "initramfs"
    initramfs.write_bytes(made.initramfs)
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "512", "-no-reboot"]
    command += ["-display", "none", "-nodefaults", "-no-user-config", "-serial", "stdio"]
    command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    command += ["-kernel", str(made.kernel.image), "-initrd", str(initramfs)]
    command += ["-append", "console=ttyS0 panic=-1 oops=panic quiet loglevel=1"]
    begin = time.monotonic()
    with (
        _server() as url,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        try:
            console = Console(process, PROMPT, timeout_s)
            console.wait_for_prompt()
            boot_s = time.monotonic() - begin
            first = len(console.text) - len(PROMPT)
            ratio = _type_all(console, url)
            console.type_last("poweroff")
        finally:
            process.kill()
    return Session(console.text[first:].partition("poweroff\n")[0] + "poweroff\n", boot_s, ratio)


def _type_all(console: Console, url: str) -> str:
    """Return the ratio of the transfer to its limit."""
    ratio, throttle = "?", "?"
    for command, expected in STEPS:
        typed = command.format(url=url, id=throttle)
        output = console.type(typed)
        if not re.search(expected, output):
            raise VmError(f"{typed!r} did not show {expected!r} but\n{output}")
        for found in re.finditer(r"^(\w{6}) .*KB/s|ratio=([\d.]+)x", output, re.M):
            throttle, ratio = found[1] or throttle, found[2] or ratio
    return ratio


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        size = _IMAGE_BYTES if self.path == "/image" else 1000 * _MB
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        try:
            for _ in range(size // _MB):
                self.wfile.write(bytes(_MB))
        except OSError:  # It has what it wanted.
            return

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def _server() -> Iterator[str]:
    """A server of this machine, at the address where the emulated one sees it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://10.0.2.2:{server.server_address[1]}"
        finally:
            server.shutdown()
