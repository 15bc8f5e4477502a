"""BPF tokens: what a privileged process lets those in a user namespace do. Linux 6.9.

The administrator mounts a bpf file system in the namespace, with the options
``delegate_cmds=any,delegate_maps=any,delegate_progs=any,delegate_attachs=any``, or with names of
commands and types instead of ``any``. Source: kernel/bpf/token.c of the kernel.
"""

from __future__ import annotations

import errno
import os
from contextvars import Token as Former
from typing import Optional, Union

from pybpfthrottle.bpf import descriptors, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.bpf.errors import BpfError

_WHY = {
    errno.ENOENT: "it was mounted without delegate_cmds, delegate_maps, delegate_progs or"
    " delegate_attachs",
    errno.EPERM: "it is of another user namespace, or this process lacks CAP_BPF in its own",
    errno.EOPNOTSUPP: "tokens are for user namespaces, and this process is in none of its own",
    errno.EINVAL: "it is no bpf file system, or the kernel has no tokens (Linux 6.9)",
}


class Token:
    """The right to load programs, maps and types in this context, while it is entered.

    ::

        with token.create("/sys/fs/bpf"):
            loaded = bpf.load("filter.o")

    It owns one descriptor; ``close`` or the end of ``with`` ends it. What was loaded stays.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._former: Optional[Former[int]] = None

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Token:
        self._former = syscall.token_fd.set(self.fd)
        return self

    def __exit__(self, *_: object) -> None:
        if self._former is not None:
            syscall.token_fd.reset(self._former)
        self.close()


def create(mounted: Union[descriptors.Path, int] = "/sys/fs/bpf") -> Token:
    """Return a token of a bpf file system, by its path or a descriptor of its root. Linux 6.9.

    Raises BpfError with what the mount or the process lacks, or OSError for the path.
    """
    root = mounted if isinstance(mounted, int) else os.open(mounted, os.O_DIRECTORY)
    attr = Attr()
    attr.token_create.bpffs_fd = root
    try:
        return Token(syscall.bpf(Cmd.TOKEN_CREATE, attr))
    except OSError as error:
        why = _WHY.get(error.errno or 0, str(error))
        raise BpfError(f"cannot get a token of {mounted}: {why}", errno=error.errno or 0) from error
    finally:
        if root is not mounted:
            os.close(root)
