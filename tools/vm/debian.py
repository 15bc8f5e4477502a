"""Debian's packages of any release and architecture, unpacked in a cache and never installed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple

from vm import VmError, run

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Suite(NamedTuple):
    """A release of Debian for one architecture: ("Debian-Security", "trixie-security", "amd64")."""

    label: str
    name: str
    arch: str


class Apt:
    """An apt of its own in a directory, which knows nothing of this machine's packages."""

    def __init__(self, directory: Path, suite: Suite) -> None:
        self._directory = directory
        sources = directory / "sources.list"
        signed = f"arch={suite.arch} signed-by={KEYRING}"
        sources.write_text(f"deb [{signed}] {_mirror(suite.label)} {suite.name} main\n")
        # With the real one, apt refuses what is installed here already.
        (directory / "status").touch()
        for name in ("lists/partial", "cache/archives/partial"):
            (directory / name).mkdir(parents=True)
        settings = {
            "APT::Architecture": suite.arch,
            "APT::Architectures::": suite.arch,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Dir::Cache": directory / "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": directory / "lists",
            "Dir::State::status": directory / "status",
        }
        self._options = [f"-o{key}={value}" for key, value in settings.items()]
        run("apt-get", *self._options, "update")

    def required(self, package: str, pattern: str) -> list[str]:
        """Return the names of what a package needs, directly or not, that match a pattern."""
        depends = ("depends", "--recurse", "--important", package)
        return sorted(set(re.findall(pattern, run("apt-cache", *self._options, *depends), re.M)))

    def download(self, *packages: str) -> None:
        """Download these packages alone."""
        run("apt-get", *self._options, "download", *packages, cwd=self._archives)

    def download_with_dependencies(self, *packages: str) -> None:
        """Download these packages with all that they need."""
        run("apt-get", *self._options, "-y", "--download-only", "install", *packages)

    def unpack(self, into: Path) -> None:
        """Unpack what was downloaded; first what makes /lib a link to /usr/lib, where it is one."""
        archives = sorted(
            self._archives.glob("*.deb"), key=lambda path: not path.name.startswith("base-files_")
        )
        for path in archives:
            run("dpkg-deb", "-x", str(path), str(into))

    @property
    def _archives(self) -> Path:
        return self._directory / "cache" / "archives"


def kept(name: str, make: Callable[[Path, Path], None]) -> Path:
    """Return a directory of the cache; ``make`` fills it, and has another one for its own use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "pybpfthrottle-vmtest" / name
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            made, own = Path(scratch, "made"), Path(scratch, "own")
            made.mkdir()
            own.mkdir()
            make(made, own)
            made.rename(directory)
    return directory


def install_missing(commands: dict[str, str]) -> None:
    """Install by apt-get the packages of those commands that are missing on this machine."""
    missing = list(dict.fromkeys(commands[name] for name in commands if not shutil.which(name)))
    if not os.path.exists(KEYRING):
        missing.append("debian-archive-keyring")
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise VmError(f"please install: {' '.join(missing)}")
    print("Installing:", *missing, flush=True)
    run("apt-get", "-qq", "update")
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y"]
    run(*apt, "--no-install-recommends", "install", *missing)


def _mirror(label: str) -> str:
    """Return where this machine gets its packages of Debian, or where everybody does."""
    found = run("apt-get", "indextargets", "--format", "$(REPO_URI)", f"Label: {label}").split()
    mirrors = [mirror for mirror in found if mirror.startswith("http")]
    return mirrors[0] if mirrors else f"http://deb.debian.org/{label.lower()}"
