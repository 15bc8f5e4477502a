"""The running kernel as its files describe it: version, configuration, symbols and types.

No system call of bpf(2), and nothing is read before it is asked for.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from typing import TYPE_CHECKING, Iterator, Mapping, Optional

from pybpfthrottle.bpf.errors import ExternError, ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.obj.plain import Data

if TYPE_CHECKING:
    from pybpfthrottle.bpf.obj.core import Kernel

BTF_DIRECTORY = "/sys/kernel/btf"
_VMLINUX = "vmlinux"
_ELF = b"\x7fELF"
_AT_SYSINFO_EHDR = 33
_PT_NOTE = 4
_MAX_NOTES_BYTES = 4096
# The names of system calls' functions where they take struct pt_regs, by uname's machine.
_WRAPPERS = {
    "x86_64": "__x64_sys_bpf",
    "i686": "__ia32_sys_bpf",
    "aarch64": "__arm64_sys_bpf",
    "s390x": "__s390x_sys_bpf",
    "riscv64": "__riscv_sys_bpf",
}


def version() -> int:
    """LINUX_VERSION_CODE of the running kernel: 0x060C05 is 6.12.5.

    Distributions change the release that uname(2) tells; what the kernel was built as is in a note
    of its vDSO (arch/*/entry/vdso/note.S), which every process sees.
    """
    try:
        return _version_of_vdso()
    except (OSError, ValueError, struct.error):
        release = os.uname().release.encode()
    with suppress(OSError), open("/proc/version_signature", "rb") as file:  # Ubuntu's
        release = file.read().split()[-1]
    return version_code(release.decode("ascii", "replace"))


def version_code(release: str) -> int:
    """Return the number of a release such as "5.4.0-42-generic"."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    major, minor, patch = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    return major << 16 | minor << 8 | min(patch, 255)  # 4.14.336 counts as 4.14.255


def syscall_wrapper() -> Optional[str]:
    """Return what the function of bpf(2) is called where system calls take a struct pt_regs."""
    return _WRAPPERS.get(os.uname().machine)


def _version_of_vdso() -> int:
    with open("/proc/self/auxv", "rb") as file:
        entries = dict(struct.iter_unpack("@NN", file.read()))
    base = entries.get(_AT_SYSINFO_EHDR)
    if not base or struct.calcsize("P") != 8:
        raise ValueError("no 64-bit vDSO")
    with open("/proc/self/mem", "rb") as memory:
        memory.seek(base)
        image = memory.read(_MAX_NOTES_BYTES)
    return _version_of_notes(image)


def _version_of_notes(image: bytes) -> int:
    (table,) = struct.unpack_from("=Q", image, 32)
    entry_bytes, count = struct.unpack_from("=HH", image, 54)
    for index in range(count):
        kind, _, at, _, _, size = struct.unpack_from("=IIQQQQ", image, table + index * entry_bytes)
        if kind == _PT_NOTE:
            # Name "Linux", type 0, and one number.
            note = image.find(struct.pack("=III", 6, 4, 0) + b"Linux\0\0\0", at, at + size)
            if note >= 0:
                return int(struct.unpack_from("=I", image, note + 20)[0])
    raise ValueError("no note of Linux")


def config_files() -> list[str]:
    """Return where kernels (CONFIG_IKCONFIG_PROC) and distributions keep its configuration."""
    release = os.uname().release
    return ["/proc/config.gz", f"/boot/config-{release}", f"/lib/modules/{release}/config"]


class RunningKernel(Data, frozen=True):
    """The files that tell of the running kernel, each read at most once, when it is asked for.

    ``types_path`` may name other types for CO-RE than the kernel's own: BTF as it is, or an ELF
    file with a section .BTF. They may be less than the kernel's, and numbered otherwise: functions
    and targets are those of the running kernel. ``config_path`` may name another configuration,
    compressed or not.
    """

    types_path: Optional[str] = None
    config_path: Optional[str] = None
    directory: str = BTF_DIRECTORY

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """The configuration it was built with: CONFIG_HZ -> "250"; empty if that is not told.

        From one of ``config_files``. Raises OSError for a file that cannot be read.
        """
        if self.config_path:
            return _settings(self.config_path)
        path = next(filter(os.path.exists, config_files()), None)
        return {} if path is None else _settings(path)

    def setting(self, name: str) -> Optional[str]:
        """Return a setting as the configuration spells it, or one that libbpf calls LINUX_*."""
        if name == "LINUX_KERNEL_VERSION":
            return str(version())
        if name == "LINUX_HAS_SYSCALL_WRAPPER":
            return "y" if self.has_syscall_wrapper() else "n"
        if name == "LINUX_HAS_BPF_COOKIE":
            return "y" if self.has_attach_cookie() else "n"
        return self.settings.get(name)

    def has_syscall_wrapper(self) -> bool:
        """Return whether system calls take a struct pt_regs (x86-64 since Linux 4.17)."""
        wrapper = syscall_wrapper()
        return wrapper is not None and any(self._lines_of(wrapper))

    def has_attach_cookie(self) -> bool:
        """Return whether programs may ask for the cookie of their attachment (Linux 5.15)."""
        try:
            types = self.types.types
        except ExternError:
            return False
        helpers = types.find(Kind.ENUM, "bpf_func_id")
        names = (item.name for item in types.enumerators(helpers)) if helpers else ()
        return "BPF_FUNC_get_attach_cookie" in names

    def symbol(self, name: str) -> Optional[int]:
        """Return the address of a symbol of the kernel or of a module, or None if there is none.

        Raises ExternError for one that has several addresses, and where addresses may not be seen:
        that needs CAP_SYSLOG, and kernel.kptr_restrict below 2.
        """
        addresses = {int(line.split()[0], 16) for line in self._lines_of(name)}
        if len(addresses) > 1:
            raise ExternError(f"the kernel has {len(addresses)} symbols called {name!r}")
        if addresses == {0}:
            raise ExternError(
                f"cannot read the address of {name!r}: this needs CAP_SYSLOG,"
                " and sysctl kernel.kptr_restrict below 2"
            )
        return addresses.pop() if addresses else None

    def has_symbol(self, name: str) -> bool:
        """Return whether there is a symbol of this name; True where symbols are not told."""
        return not self._kallsyms or any(self._lines_of(name))

    @cached_property
    def _kallsyms(self) -> bytes:
        with suppress(OSError), open("/proc/kallsyms", "rb") as file:
            return file.read()
        return b""

    def _lines_of(self, name: str) -> Iterator[bytes]:
        text = self._kallsyms
        for match in re.finditer(rb" " + re.escape(name.encode()) + rb"(?=[\n\t])", text):
            yield text[text.rfind(b"\n", 0, match.start()) + 1 : match.start()]

    @cached_property
    def types(self) -> Kernel:
        """The types of the kernel (Linux 5.4, CONFIG_DEBUG_INFO_BTF) and of its modules (5.11).

        Raises ExternError where there are none, or ObjectFileError.
        """
        from pybpfthrottle.bpf.obj.core import Kernel

        is_own = self.directory == BTF_DIRECTORY
        with _told():
            path = os.path.join(self.directory, _VMLINUX)
            types, directory = _own_types() if is_own else _types(path), self.directory
            # Without this object: a cycle would keep megabytes until the garbage is collected.
            return Kernel(types, cache(lambda: _modules(directory, types)))

    @cached_property
    def core_types(self) -> Kernel:
        """The types that answer CO-RE: those of ``types_path``, or else the kernel's own.

        Raises ExternError where there are none, or ObjectFileError.
        """
        from pybpfthrottle.bpf.obj.core import Kernel

        if self.types_path is None:
            return self.types
        with _told():
            return Kernel(_types(self.types_path))


def _settings(path: str) -> Mapping[str, str]:
    with open(path, "rb") as file:
        data = file.read()
    if data[:2] == b"\x1f\x8b":
        import gzip  # which few objects need, and all would wait for

        data = gzip.decompress(data)
    return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", data.decode("utf-8", "replace"), re.MULTILINE))


@contextmanager
def _told() -> Iterator[None]:
    """Tell what types that cannot be read are for."""
    try:
        yield
    except OSError as error:
        raise ExternError(
            f"cannot read the kernel's types ({error}): this needs a kernel with"
            " CONFIG_DEBUG_INFO_BTF, or for CO-RE a file with the types of exactly this kernel"
        ) from error


def _modules(directory: str, base: Btf) -> tuple[Btf, ...]:
    """Return the types of the modules, each with its name; they go on from the kernel's."""
    if not os.path.isdir(directory):
        return ()
    modules = []
    for name in sorted(set(os.listdir(directory)) - {_VMLINUX}):
        # A module may be unloaded in the meantime, or have been built for another kernel.
        with suppress(OSError, ObjectFileError), open(f"{directory}/{name}", "rb") as file:
            modules.append(Btf(file.read(), base=base, name=name))
    return tuple(modules)


@cache
def _own_types() -> Btf:
    """Return the types of the running kernel, which stay what they are."""
    return _types(os.path.join(BTF_DIRECTORY, _VMLINUX), trusted=True)


def forget_types() -> None:
    """Give back the memory of the running kernel's types; whoever asks reads them again."""
    _own_types.cache_clear()


def _types(path: str, *, trusted: bool = False) -> Btf:
    # Buffers would cut the kernel's megabytes into many calls.
    with open(path, "rb", buffering=0) as file:
        if trusted:
            with suppress(OSError, ValueError):  # Linux 6.16; it refuses what is shared
                mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
                if mapped[:4] != _ELF:
                    return Btf(mapped, trusted=True)
        if file.read(4) == _ELF:
            from pybpfthrottle.bpf.obj.elffile import stored_section  # that kernel is rare

            data = stored_section(path, ".BTF")
            if data is None:
                raise ExternError(f"{path} has no section .BTF")
            return Btf(data)
        file.seek(0)
        return Btf(file.read(), trusted=trusted)
