"""Everything that this package raises on purpose.

::

    Error                              the base of all of them
    ├── ObjectFileError                an object file that cannot be read
    ├── AmbiguousTypeError             the kernel has two types where an object asks for one
    ├── CompileError                   a source that could not be compiled; .output says why
    ├── ExternError                    something of the kernel that an object needs is not there
    ├── BpfError                       what the kernel refused; .errno says with what
    │   ├── UnsupportedMachineError    bpf(2) cannot be called from here
    │   ├── MapCreateError             a map that could not be created, filled or pinned
    │   ├── ProgramLoadError           a program that could not be loaded
    │   │   └── VerifierError          the verifier's reason, and its whole log
    │   │       └── UnresolvedError    what it reached is not there in this kernel
    │   └── AttachError                a program that could not be attached
    ├── LimitError (also ValueError)   a limit that cannot be read or is out of range
    ├── CgroupError                    no cgroup v2, or not the kind of cgroup that is needed
    │   └── NoCgroupError              there is no such cgroup, or no more
    ├── ProcessError                   a process that does not exist or cannot be limited
    ├── SettingsError                  a setting that is not allowed, or cannot be read
    ├── RulesError                     rules with mistakes; .mistakes has a line for each
    ├── StoreError                     the file of what was counted cannot be used
    ├── ThrottleError                  a throttle that was refused, or is gone
    │   ├── BackendError               what one backend cannot do here; another one may
    │   │   └── NoNamespaceError       the network namespace of a throttle is gone
    │   ├── NoMarksError               single processes cannot be limited here, cgroups can
    │   ├── DiversionError             packets cannot be held and given back here
    │   └── ShareError                 what a group or its members ask for cannot be
    ├── LaunchError                    a command that could not be started; .status is a shell's
    ├── ServiceError                   a service that cannot be limited or installed by systemd
    ├── NamespaceError                 a network namespace that cannot be made, or joined to this
    └── DemoError                      a transfer of the demo that failed

System calls that fail raise plain ``OSError``; the errors above are raised from it if more is known
about its meaning. ``pybpfthrottle.bpf.errors`` defines the toolkit's errors.

"""

from __future__ import annotations

from typing import Sequence

from pybpfthrottle.bpf.errors import (
    AmbiguousTypeError,
    AttachError,
    BpfError,
    CompileError,
    Error,
    ExternError,
    MapCreateError,
    ObjectFileError,
    ProgramLoadError,
    UnresolvedError,
    UnsupportedMachineError,
    VerifierError,
)

__all__ = [
    "AmbiguousTypeError",
    "AttachError",
    "BackendError",
    "BpfError",
    "CgroupError",
    "CompileError",
    "DemoError",
    "DiversionError",
    "Error",
    "ExternError",
    "LaunchError",
    "LimitError",
    "MapCreateError",
    "NamespaceError",
    "NoCgroupError",
    "NoMarksError",
    "NoNamespaceError",
    "ObjectFileError",
    "ProcessError",
    "ProgramLoadError",
    "RulesError",
    "ServiceError",
    "SettingsError",
    "ShareError",
    "StoreError",
    "ThrottleError",
    "UnresolvedError",
    "UnsupportedMachineError",
    "VerifierError",
]


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


class RulesError(Error):
    """Rules that cannot be used. ``mistakes`` has a line for each mistake, with file and line."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        super().__init__(mistakes[0] + more)
        self.mistakes = tuple(mistakes)


class StoreError(Error):
    """The file of what was counted cannot be used; what is counted goes on without it."""


class ThrottleError(Error):
    """A throttle that was refused, or is gone."""


class BackendError(ThrottleError):
    """A backend other than eBPF, or the program that it runs, has failed; another may work."""


class NoNamespaceError(BackendError):
    """The network namespace of a throttle is gone, and with it what was in force there."""


class NoMarksError(ThrottleError):
    """Sockets cannot be marked here, so single processes cannot be limited; cgroups can."""


class DiversionError(ThrottleError):
    """Packets cannot be held and given back here: no TAP device, or no rights to make one."""


class ShareError(ThrottleError):
    """What a group or its members ask for cannot be: unknown groups, floors above the total."""


class LaunchError(Error):
    """A command that could not be started. ``status`` is the exit status, as in shells.

    It has no message if a signal, such as that of Ctrl-C, came before the command was started.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServiceError(Error):
    """A service that cannot be limited, or installed, by means of systemd."""


class NamespaceError(Error):
    """A network namespace cannot be made here, or not be joined to this one."""


class DemoError(Error):
    """A transfer of the demo that failed."""
