"""Kernels that can be booted: Debian's, or any image with its modules."""

from __future__ import annotations

import gzip
import lzma
import re
import subprocess
from pathlib import Path
from typing import Iterable, NamedTuple, Optional

from vm import VmError, debian
from vm.archive import Archive
from vm.debian import Apt, Suite

# The label of the archive, and the suite.
DEBIAN = {
    "5.10": ("Debian-Security", "bullseye-security"),
    "6.1": ("Debian-Security", "bookworm-security"),
    "6.12": ("Debian-Security", "trixie-security"),
    "sid": ("Debian", "sid"),
}
# Debian's names of architectures, by those of uname.
ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
_ARM64_MAGIC_AT, _ARM64_MAGIC = 56, b"ARM\x64"


class Kernel(NamedTuple):
    """An image to boot, and where its modules and its configuration are, if they are known."""

    name: str
    arch: str
    image: Path
    modules: Optional[Path] = None
    config: Optional[Path] = None


def of_debian(name: str, arch: str) -> Kernel:
    """Return one of Debian's kernels, which is downloaded if it is not in the cache."""
    suffix = "" if arch == "x86_64" else f"-{arch}"
    directory = debian.kept(f"{name}{suffix}", lambda made, own: _download(name, arch, made, own))
    image = next(directory.rglob("vmlinuz*"))
    return Kernel(name, arch, image, directory, next(directory.rglob("boot/config-*"), None))


def given(image: Path, modules: Optional[Path]) -> Kernel:
    """Return a kernel from its image; its configuration may lie beside it, as in /boot."""
    try:
        with image.open("rb") as file:
            head = file.read(_ARM64_MAGIC_AT + len(_ARM64_MAGIC))
    except OSError as error:
        raise VmError(f"cannot read the kernel {image}: {error.strerror}") from None
    if modules and not any(modules.rglob("*.ko*")):
        raise VmError(f"there are no modules (*.ko) below {modules}")
    release = image.name.partition("-")[2]
    config = image.with_name(f"config-{release}")
    arch = "aarch64" if head.endswith(_ARM64_MAGIC) else "x86_64"
    return Kernel(release or image.name, arch, image, modules, config if config.exists() else None)


def modules(kernel: Kernel, names: Iterable[str]) -> bytes:
    """Return the part of an initramfs with modules, the order to load them in, and options."""
    found = kernel.modules.rglob("*.ko*") if kernel.modules else ()
    paths = {path.name.split(".")[0].replace("-", "_"): path for path in found}
    archive, order = Archive(), []

    def add(name: str) -> None:
        if name in order or name not in paths:  # Not there: it is built in.
            return
        data = _content(paths[name])
        # Packages have no modules.dep; this is what depmod would make it of.
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in depends[1].decode().split(",") if depends else ():
            add(needed.replace("-", "_"))
        order.append(name)
        archive.add(f"/modules/{name}", data)

    for name in names:
        add(name)
    if kernel.config:
        archive.copy(kernel.config, f"/boot/{kernel.config.name}")
    archive.add("/modules/order", "\n".join(order).encode())
    return archive.finish()


def _download(name: str, arch: str, made: Path, own: Path) -> None:
    label, suite = DEBIAN[name]
    of_arch = ARCHES[arch]
    print(f"Downloading the kernel {name} ({suite}, {of_arch})", flush=True)
    apt = Apt(own, Suite(label, suite, of_arch))
    # Newer ones are split: the image only depends on the two that have the files.
    wanted = rf"^linux-(?:image|binary|modules)-\d\S*-cloud-{of_arch}$"
    apt.download(*apt.required(f"linux-image-cloud-{of_arch}", wanted))
    apt.unpack(made)


def _content(path: Path) -> bytes:
    """Return a module, which distributions compress in different ways."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        done = subprocess.run(["zstd", "-qdc", str(path)], capture_output=True)
        if done.returncode:
            raise VmError(f"cannot unpack {path}: {done.stderr.decode().strip()}")
        return done.stdout
    return data
