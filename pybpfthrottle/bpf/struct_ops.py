"""Structs of functions that the kernel calls (struct_ops): a congestion control, a scheduler."""

from __future__ import annotations

import errno
from typing import Any

from pybpfthrottle.bpf import abi, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.privileges import why_refused


class Registration(Link):
    """A struct in a section .struct_ops, which has no link: ``detach`` takes it back."""

    def __init__(self, struct_map: Map[Any, Any]) -> None:
        super().__init__(-1)
        self._map = struct_map
        self._registered = True

    def detach(self) -> None:
        """Take the struct back. A second time this does nothing. Raises OSError."""
        if self._registered:
            self._registered = False
            del self._map.typed(U32, RAW)[0]


class StructOps:
    """A struct of functions whose programs are loaded; ``attach`` hands it to the kernel.

    ``map`` has its state, and is the object's.
    """

    def __init__(self, struct_map: Map[Any, Any], value: bytes) -> None:
        self.map = struct_map
        self._value = value

    @property
    def fd(self) -> int:
        """The descriptor of the map, by which a link is updated."""
        return self.map.fd

    def attach(self) -> Link:
        """Have the kernel use it, and return the link that takes it back when closed.

        Linux 5.6; sections .struct_ops.link 6.4. One without a link can be attached once only.
        Raises AttachError, such as for a name that is in use or for functions that the kernel
        wants and that are missing.
        """
        try:
            self._put()
            if not self.map.spec.flags & abi.BPF_F_LINK:
                return Registration(self.map)
            attr = Attr()
            attr.link_create.prog_fd = self.fd
            attr.link_create.attach_type = AttachType.STRUCT_OPS
            return Link(syscall.bpf(Cmd.LINK_CREATE, attr))
        except OSError as error:
            number = error.errno or 0
            raise AttachError(
                f"cannot attach the struct {self.map.spec.name!r}: {_why(error)}", errno=number
            ) from error

    def replace(self, link: Link) -> None:
        """Put it in the place of the struct that a link has, as one step. Linux 6.4.

        Raises OSError: EINVAL for a struct of another kind or name.
        """
        self._put()
        attr = Attr()
        attr.link_update.link_fd = link.fd
        attr.link_update.new_prog_fd = self.fd
        syscall.bpf(Cmd.LINK_UPDATE, attr)

    def _put(self) -> None:
        try:
            self.map.typed(U32, RAW)[0] = self._value
        except OSError as error:
            # It is there already; after a link was closed it stays, to be linked again.
            if error.errno != errno.EBUSY or not self.map.spec.flags & abi.BPF_F_LINK:
                raise

    def __repr__(self) -> str:
        return f"<StructOps {self.map.spec.name!r}>"


def _why(error: OSError) -> str:
    if error.errno == errno.EEXIST:
        return "the kernel has one of this name already"
    if error.errno == errno.EBUSY:
        return "it was attached before; load the object again, or use section .struct_ops.link"
    if error.errno in (errno.EOPNOTSUPP, syscall.ENOTSUPP):
        return "this kernel does not take structs of this kind"
    return why_refused(error, str(error.filename or ""))
