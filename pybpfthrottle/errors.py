"""Everything that this package raises on purpose.

::

Error:
    ├── LimitError (also ValueError)   a limit that cannot be read or is out of range
    ├── CgroupError                    no cgroup v2, or not the kind of cgroup that is needed
    │   └── NoCgroupError              there is no such cgroup, or no more
    ├── ProcessError                   a process that does not exist or cannot be limited
    ├── SettingsError                  a setting that is not allowed, or cannot be read
    ├── ThrottleError                  a throttle that was refused, or is gone
    │   └── NoMarksError               single processes cannot be limited here, cgroups can
    ├── ObjectFileError                an object file that cannot be read
    ├── AmbiguousTypeError             the kernel has two types where an object asks for one
    ├── ExternError                    something of the kernel that an object needs is not there
    └── BpfError                       what the kernel refused; .errno says with what
        ├── UnsupportedMachineError    bpf(2) cannot be called from here
        ├── MapCreateError
        ├── ProgramLoadError
        │   └── VerifierError          the verifier's reason, and its whole log
        │       └── UnresolvedError    what it reached is not there in this kernel
        └── AttachError

System calls that fail raise plain ``OSError``; the errors above are raised from it where more is
known about what it means.

"""

from __future__ import annotations

from typing import Optional


class Error(Exception):
    """The base of all errors that this package raises on purpose."""


class LimitError(Error, ValueError):
    """A limit that cannot be read, or is out of range."""


class CgroupError(Error):
    """No cgroup v2, or not the kind of cgroup that is needed."""


class NoCgroupError(CgroupError):
    """There is no such cgroup, or no more."""


class ProcessError(Error):
    """A process that does not exist, or cannot be limited."""


class SettingsError(Error):
    """A setting that is not allowed, or cannot be read."""


class ThrottleError(Error):
    """A throttle that was refused, or is gone."""


class NoMarksError(ThrottleError):
    """Sockets cannot be marked here, and so single processes not be limited; cgroups can."""


class ObjectFileError(Error):
    """An object file that cannot be read; ``section`` and ``offset`` (bytes) say where."""

    def __init__(
        self, reason: str, *, section: Optional[str] = None, offset: Optional[int] = None
    ) -> None:
        where = ""
        if section is not None:
            where = f"section {section!r}: "
            if offset is not None:
                where = f"section {section!r}, offset {offset:#x}: "
        super().__init__(where + reason)
        self.section = section
        self.offset = offset


class AmbiguousTypeError(Error):
    """The kernel has several types where an object asks for one, and they answer differently."""


class ExternError(Error):
    """A variable, function or setting of the kernel that an object needs, but that is not there."""


class BpfError(Error):
    """What the kernel refused. ``errno`` is that of the system call, 0 where there was none."""

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class UnsupportedMachineError(BpfError):
    """Python cannot call bpf(2) on this machine."""


class MapCreateError(BpfError):
    """BPF_MAP_CREATE failed."""


class ProgramLoadError(BpfError):
    """BPF_PROG_LOAD failed."""


class VerifierError(ProgramLoadError):
    """The verifier rejected a program. ``reason`` is the telling line of ``log``.

    ``source`` is the line of the source that it rejects, as "file.c:12: text", if that is known.
    """

    def __init__(
        self, message: str, *, errno: int, reason: str, log: str, source: Optional[str] = None
    ) -> None:
        super().__init__(message, errno=errno)
        self.reason = reason
        self.log = log
        self.source = source


class UnresolvedError(VerifierError):
    """A program reaches an access of the kernel's types, or a call, that this kernel lacks.

    ``access`` is what it asked for, such as "struct sock.gone"; ``local_type`` the name of the
    object's own type that it did so by, such as "sock___old"; empty for a function.
    """

    def __init__(
        self,
        message: str,
        access: str,
        local_type: str,
        *,
        errno: int,
        reason: str,
        log: str,
        source: Optional[str] = None,
    ) -> None:
        super().__init__(message, errno=errno, reason=reason, log=log, source=source)
        self.access = access
        self.local_type = local_type


class AttachError(BpfError):
    """A program could not be attached."""
