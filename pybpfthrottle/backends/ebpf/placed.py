"""Where and how the programs of one throttle are attached."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Callable, Iterable, Iterator, Mapping, Optional, Tuple

from pybpfthrottle.backends.ebpf import attached
from pybpfthrottle.backends.ebpf.attach import attach, refuse_to_override, rung
from pybpfthrottle.backends.ebpf.programs import Shipped
from pybpfthrottle.backends.ebpf.registry import refuse_to_replace
from pybpfthrottle.bpf.links import Attachment, Link
from pybpfthrottle.bpf.obj.plain import Data
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction
from pybpfthrottle.settings import AttachPolicy

# A program, the cgroup to attach it to, and how to attach it.
Wanted = Tuple[Shipped, Cgroup, AttachPolicy]


class Placed(Data):
    """An attached program; a switch replaces ``attachment``."""

    program: Shipped
    live: Program
    target: Cgroup
    policy: AttachPolicy
    attachment: Attachment

    def detach(self) -> None:
        """Detach the program."""
        self.attachment.detach()

    def switch(self, method: str) -> None:
        """Attach by another method, then end the old attachment. Raises AttachError.

        Before Linux 4.15, with only one program per hook, there is also only one method.
        """
        if rung(self.attachment).partition(" ")[0] == method:
            return
        policy = self.policy._replace(method=method)
        attachment = attach(self.live, self.target, self.program.attach_type, policy)
        before, self.attachment = self.attachment, attachment
        before.detach()

    def renew(self) -> None:
        """Attach once more, and end the old attachment. Raises AttachError or CgroupError."""
        before = self.attachment
        if not isinstance(before, Link):  # the kernel has a program at a cgroup only once
            before.detach()
        self.attachment = attach(
            self.live, self.target, self.program.attach_type, self.policy, repeats=True
        )
        if isinstance(before, Link):
            before.detach()


class Placements:
    """The attached programs of one throttle. ``detach`` detaches them all."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        """``programs`` has the loaded programs by name; more may be added later."""
        self._programs = programs
        self._placed: list[Placed] = []
        # On removed cgroups: what their sockets still have to send is limited too.
        self._outlived: list[Placed] = []
        # Those of other throttles too.
        self._shared: Optional[Placements] = None
        # Whether something is attached below the root; None if that has to be looked up.
        self._below_root: Optional[bool] = None

    def __bool__(self) -> bool:
        return bool(self._placed) or bool(self._shared)

    def share(self, shared: Placements) -> None:
        """Have the programs that others have attached too, and that they detach."""
        self._shared = shared
        self._below_root = None

    def has(self, program: Shipped) -> bool:
        """Whether a program is attached."""
        return any(one.program is program for one in self._placed)

    def attach(self, wanted: Iterable[Wanted]) -> None:
        """Attach all programs or none. Raises AttachError or CgroupError."""
        wanted = list(wanted)
        for program, target, policy in wanted:
            live = self._programs[program.name]
            refuse_to_override(live, target, program.attach_type, policy)
        placed: list[Placed] = []
        with ExitStack() as undo:
            for program, target, policy in wanted:
                live = self._programs[program.name]
                attachment = attach(
                    live,
                    target,
                    program.attach_type,
                    policy,
                    before_replacing=refuse_to_replace,
                    # One line per direction is enough; the others are the same.
                    repeats=program.direction is None
                    or any(program.direction is one.program.direction for one in placed),
                )
                one = Placed(program, live, target, policy, attachment)
                undo.callback(one.detach)
                placed.append(one)
            undo.pop_all()
        self._placed += placed
        self._below_root = None

    def attach_once_each_path(self, wanted: Iterable[Wanted]) -> None:
        """Attach one program, but not below itself, so that a packet passes it only once.

        Raises AttachError or CgroupError.
        """
        wanted = list(wanted)
        before = [one for one in self._placed if any(one.program is each[0] for each in wanted)]
        new = [each for each in wanted if not any(_is_above(one.target, each[1]) for one in before)]
        self.attach(new)
        for one in before:
            if any(_is_above(target, one.target) for _, target, _ in new):
                self._placed.remove(one)
                one.detach()

    def replace(self, gone: Cgroup, attach_to_new: Callable[[], object]) -> None:
        """Attach programs to replace the ones at a removed cgroup.

        Raises what ``attach_to_new`` raises; then nothing has changed.
        """
        before = [one for one in self._placed if one.target == gone]
        count = len(self._placed)
        try:
            attach_to_new()
        except BaseException:
            _detach(self._placed[count:])
            del self._placed[count:]
            raise
        self._placed = [one for one in self._placed if one not in before]
        outlived = [one for one in self._outlived if one.target == gone]
        self._outlived = [one for one in self._outlived if one not in outlived] + before
        _detach(outlived)

    def switch(self, method: str) -> None:
        """Attach by another method. Raises AttachError; then the old attachments remain."""
        for one in self._all():
            one.switch(method)

    def attach_last(self) -> None:
        """Have the programs for what comes in run after all that is attached by now.

        Raises AttachError or CgroupError.
        """
        for one in self._placed:
            if one.program.direction is Direction.DOWNLOAD:
                one.renew()

    def detach(self) -> None:
        """Detach all programs, last first, even if detaching one raises."""
        _detach([*self._outlived, *self._placed])

    def attached_by(self, direction: Optional[Direction] = None) -> str:
        """Return how one direction's programs, or all, are attached, such as "link"."""
        return "+".join(sorted({rung(one.attachment) for one in self._of(direction)}))

    def targets(self, direction: Optional[Direction] = None) -> list[Cgroup]:
        """Return the cgroups that one direction's programs, or all, are attached to."""
        return list(dict.fromkeys(one.target for one in self._of(direction)))

    def is_below_root(self) -> bool:
        """Whether something is attached to another cgroup than the root of all."""
        if self._below_root is None:
            self._below_root = any(not target.is_root() for target in self.targets())
        return self._below_root

    def switching_off(self) -> Iterator[str]:
        """Return others' programs, attached later and above, that these keep from running."""
        for one in self._all():
            if not attached.may_override(one.target, one.program.attach_type):
                continue
            with suppress(OSError):
                for other in attached.overridden(
                    one.target, one.program.attach_type, but=[one.live.info().id]
                ):
                    yield (
                        f"this limit switches off another program for {one.target.path}: {other},"
                        f" attached to {other.cgroup.path}, above it, with BPF_F_ALLOW_OVERRIDE;"
                        " end the limit, or have its owner attach it with BPF_F_ALLOW_MULTI"
                    )

    def links(self) -> list[Link]:
        """Return the links among the attachments; those made by the legacy call last anyway."""
        return [one.attachment for one in self._all() if isinstance(one.attachment, Link)]

    def are_links(self) -> bool:
        """Whether nothing is attached by the legacy call."""
        return all(isinstance(one.attachment, Link) for one in self._all())

    def _of(self, direction: Optional[Direction]) -> Iterator[Placed]:
        return (one for one in self._all() if direction in (None, one.program.direction))

    def _all(self) -> list[Placed]:
        return [*self._placed, *(self._shared._placed if self._shared is not None else ())]


def _detach(placed: Iterable[Placed]) -> None:
    with ExitStack() as steps:
        for one in placed:
            steps.callback(one.detach)


def _is_above(one: Cgroup, other: Cgroup) -> bool:
    return one != other and other in one
