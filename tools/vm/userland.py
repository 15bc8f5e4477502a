"""What runs on a kernel: this machine's Python, or one of Debian's, with what the tests need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib import import_module, metadata
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from vm import ROOT, VmError, debian, run
from vm.archive import Archive
from vm.debian import Apt, Suite
from vm.kernels import ARCHES

# Debian's releases by their Python.
SUITES = {"3.9": "bullseye", "3.11": "bookworm", "3.13": "trixie"}
# Those of busybox are no programs under another name.
IN_GUEST: tuple[str, ...] = (
    "ip",
    "tc",
    "curl",
    "bpftool",
    "unshare",
    "nsenter",
    "setpriv",
    "mount",
    "umount",
)
IN_GUEST += ("cat", "sleep", "nft", "env")
# The Debian packages of these, for another Python.
PACKAGES: tuple[str, ...] = (
    "base-files",
    "busybox-static",
    "python3",
    "iproute2",
    "curl",
    "bpftool",
    "util-linux",
)
PACKAGES += ("mount", "coreutils", "nftables")
DISTRIBUTIONS = ("pytest", "pytest-timeout", "pyelftools", "click", "rich")
# pip asks this Python what older ones require besides.
OF_OLD_PYTHONS = ("exceptiongroup", "tomli", "typing-extensions")
OF_PROJECT: tuple[str, ...] = (
    "pybpfthrottle",
    "prebuilt",
    "ebpf_src",
    "tests",
    "tools",
    "setup.cfg",
    "README.md",
)
OF_PROJECT += ("docs/examples", "docs/guides/test-on-bad-networks.md")
# Objects of tests/fixtures, for want of a compiler.
FIXTURES = "/fixtures"
# What pip has unpacked for another Python; Debian's looks there without being told.
SITE = "/usr/local/lib/python{version}/dist-packages"
_NOT_SHIPPED = {"site-packages", "dist-packages", "test", "idlelib", "tkinter", "ensurepip"}
_NOT_SHIPPED |= {"perl-base", "lib2to3", "pydoc_data", "gconv"}


class Python(NamedTuple):
    """A Python of Debian's, by its version and architecture: ("3.9", "amd64")."""

    version: str
    arch: str

    @classmethod
    def parse(cls, text: str, kernel_arch: str) -> Python:
        """Read "3.9", which is of the kernel's architecture, or "3.13/i386"."""
        version, _, arch = text.partition("/")
        python = cls(version, arch or ARCHES[kernel_arch])
        runs = {"x86_64": ("amd64", "i386"), "aarch64": ("arm64", "armhf")}[kernel_arch]
        if version not in SUITES or python.arch not in runs:
            choices = ", ".join(SUITES)
            raise VmError(
                f"there is no Python {text} for {kernel_arch};"
                f" choose from {choices}, with /{runs[1]} behind it for one of 32 bits"
            )
        return python


class Userland(NamedTuple):
    """The initramfs of a Python, the path of the interpreter in it, and its variables."""

    archive: Archive
    python: str
    path: str
    modules: str

    @property
    def environment(self) -> str:
        """As a shell sets it."""
        return f"PATH={self.path} PYTHONPATH={self.modules}"


def of_this_machine() -> Userland:
    """Return this interpreter with its packages, the checkout, and programs that tests call."""
    venv = sys.prefix != sys.base_prefix
    # A virtual environment is found by the path of its own interpreter, and no other must be.
    python = Path(sys.executable if venv else os.path.realpath(sys.executable))
    programs = [Path(shutil.which(name) or name) for name in IN_GUEST]
    files = [python, *programs, *_distributions(DISTRIBUTIONS)]
    files += _walk(Path(sysconfig.get_path("stdlib")))
    if venv:
        files.append(Path(sys.prefix, "pyvenv.cfg"))
    files += _libraries([python, *programs, *(file for file in files if file.suffix == ".so")])
    archive = Archive()
    for file in files:
        archive.copy(file)
    _add_project(archive, Path(shutil.which("busybox") or "busybox"))
    path = ":".join([*{str(program.parent) for program in programs}, "/busybox"])
    return Userland(archive, str(python), path, str(ROOT))


def of_debian(python: Python) -> Userland:
    """Return a Python of Debian's with its own programs; pip chooses the packages for it."""
    name = f"python-{python.version}-{python.arch}"
    kept = debian.kept(name, lambda made, own: _download(python, made, own))
    archive = Archive()
    archive.tree(kept / "root", _is_shipped)
    site = SITE.format(version=python.version)
    for file in _walk(kept / "site"):
        archive.copy(file, f"{site}/{file.relative_to(kept / 'site')}")
    places = [kept / "root/usr/bin/busybox", kept / "root/bin/busybox"]
    _add_project(archive, next(place for place in places if place.exists()))
    path = "/usr/sbin:/usr/bin:/sbin:/bin:/busybox"
    return Userland(archive, f"/usr/bin/python{python.version}", path, str(ROOT))


def _download(python: Python, made: Path, own: Path) -> None:
    suite = SUITES[python.version]
    print(f"Downloading Python {python.version} ({suite}, {python.arch})", flush=True)
    apt = Apt(own, Suite("Debian", suite, python.arch))
    apt.download_with_dependencies(*PACKAGES)
    apt.unpack(made / "root")
    # Not by "pip install", which asks what this Python requires, whatever --python-version says.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--python-version", python.version, "--only-binary", ":all:", "--dest", str(own)]
    run(*pip, *options, *DISTRIBUTIONS, *OF_OLD_PYTHONS)
    for wheel in own.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(made / "site")


def _is_shipped(path: str) -> bool:
    return not path.startswith(("/usr/share", "/var")) and Path(path).name not in _NOT_SHIPPED


def _add_project(archive: Archive, busybox: Path) -> None:
    """Add what each user land has: the checkout, busybox, and compiled fixtures."""
    for name in OF_PROJECT:
        for file in _walk(ROOT / name):
            archive.copy(file)
    for path in ("/bin/busybox", "/bin/sh"):
        archive.copy(busybox, path)
    for path, data in _fixtures():
        archive.add(path, data)
    archive.add("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", 0o644)


def _fixtures() -> Iterator[tuple[str, bytes]]:
    """Compile what the toolkit's tests load, where this machine has the compiler."""
    sys.path.insert(0, str(ROOT / "tests"))
    compiled = import_module("compiled")

    if not shutil.which(compiled.CLANG):
        print(f"There is no {compiled.CLANG}: tests that need compiled fixtures are skipped")
        return
    with tempfile.TemporaryDirectory(prefix="vmtest-") as directory:
        compiled.keep(Path(directory))
        for path in Path(directory).iterdir():
            yield f"{FIXTURES}/{path.name}", path.read_bytes()


def _walk(top: Path) -> Iterator[Path]:
    """A file, or the files below a directory but for those parts of Python that no test needs."""
    if top.is_file():
        yield top
    for directory, names, files in os.walk(top):
        names[:] = [name for name in names if name not in _NOT_SHIPPED and name[:7] != "config-"]
        paths = (Path(directory, name) for name in files if ".opt-" not in name)
        yield from (path for path in paths if path.is_file())


def _distributions(names: Iterable[str]) -> Iterator[Path]:
    """The files of installed distributions, and of those that they require."""
    todo, seen = list(names), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name not in DISTRIBUTIONS:
                continue  # Required on another system, or by another Python.
            raise VmError(
                f"{sys.executable} lacks {name}; run tools/test, then use .venv-test/bin/python"
            ) from None
        paths = (Path(str(file.locate())) for file in distribution.files or ())
        yield from (path for path in paths if path.is_file())
        requirements = (text for text in distribution.requires or () if "extra ==" not in text)
        todo += [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements]


def _libraries(binaries: list[Path]) -> set[Path]:
    """The loader and the shared libraries that ldd names for some programs and libraries."""
    # Not run(): ldd fails where one of them is static.
    found = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True).stdout
    return {Path(path) for path in re.findall(r"^\s+(?:\S+ => )?(/\S+) \(0x", found, re.M)}
