"""Everything that the toolkit raises on purpose.

System calls that fail raise plain ``OSError``; the errors here are raised from it where more is
known about what it means. ``pybpfthrottle.errors`` draws the tree.
"""

from __future__ import annotations

from typing import Optional


class Error(Exception):
    """The base of all errors that are raised on purpose."""


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
    """Several types of the kernel that an object may mean, and that answer differently."""


class CompileError(Error):
    """A source that could not be compiled; ``output`` is what the compiler said."""

    def __init__(self, message: str, *, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class ExternError(Error):
    """A variable, function or setting of the kernel that an object needs, but that is not there."""


class BpfError(Error):
    """A refusal by the kernel. ``errno`` is that of the system call, 0 where there was none."""

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class UnsupportedMachineError(BpfError):
    """A machine on which Python cannot call bpf(2)."""


class MapCreateError(BpfError):
    """A map that could not be created, filled or pinned."""


class ProgramLoadError(BpfError):
    """A program that could not be loaded."""


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
    """A program that could not be attached."""
