"""Programs of Debian that know HTTP/3, unpacked in a cache and run from there.

They run by the loader and the libraries that they were built for, whatever this machine has.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from vm import VmError, debian, run

_RELEASE = "trixie"
_PACKAGES = ("curl", "nginx", "ngtcp2-server")


class Unpacked(NamedTuple):
    """Where they are."""

    root: Path

    def curl(self, *arguments: str) -> list[str]:
        """Return a command of curl."""
        return self._command("usr/bin/curl", *arguments)

    def nginx(self, *arguments: str) -> list[str]:
        """Return a command of nginx."""
        return self._command("usr/sbin/nginx", *arguments)

    def ngtcp2(self, *arguments: str) -> list[str]:
        """Return a command of ngtcp2's server."""
        return self._command("usr/sbin/gtlsserver", *arguments)

    def _command(self, program: str, *arguments: str) -> list[str]:
        libraries = next(self.root.glob("usr/lib/*/libc.so.6")).parent
        loader = next(self.root.glob("usr/lib*/**/ld-linux*.so.*"))
        options = ("--library-path", str(libraries))
        return [str(loader), *options, str(self.root / program), *arguments]


def unpacked() -> Unpacked:
    """Return them, downloaded if they are not there yet. Raises VmError."""
    try:
        debian.install_missing({})
        arch = run("dpkg", "--print-architecture").strip()
        return Unpacked(debian.kept(f"http3-{_RELEASE}-{arch}", partial(_make, arch)))
    except OSError as error:
        raise VmError(f"they cannot be kept: {error}") from error


def _make(arch: str, made: Path, own: Path) -> None:
    apt = debian.Apt(own, debian.Suite("Debian", _RELEASE, arch))
    apt.download_with_dependencies(*_PACKAGES)
    apt.unpack(made)
