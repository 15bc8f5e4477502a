"""A throttle in the kernel: its maps, its programs, and where they are attached."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import (
    Any,
    Callable,
    ContextManager,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    Sequence,
    Union,
)

from pybpfthrottle.backends.ebpf import connections, pins, programs
from pybpfthrottle.backends.ebpf import crowd as crowds
from pybpfthrottle.backends.ebpf.bucket import (
    Bucket,
    put_networks,
    too_fast_for_queue,
    with_room,
)
from pybpfthrottle.backends.ebpf.connections import SOCKETS, Connections, Guard
from pybpfthrottle.backends.ebpf.crowd import NOT_SHAPED, Crowd, Member
from pybpfthrottle.backends.ebpf.dial import MapDial
from pybpfthrottle.backends.ebpf.gate import Gate
from pybpfthrottle.backends.ebpf.loaded import Loaded
from pybpfthrottle.backends.ebpf.marks import MARKS, Marks, Processes
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.own_record import OwnRecord
from pybpfthrottle.backends.ebpf.placed import Placements, Wanted
from pybpfthrottle.backends.ebpf.programs import Role, Scope
from pybpfthrottle.backends.ebpf.records import RECORD
from pybpfthrottle.backends.ebpf.shared import Seat, sharing
from pybpfthrottle.backends.ebpf.strays import OfCgroups, Strays
from pybpfthrottle.backends.protocol import Foothold, Match, Order
from pybpfthrottle.bpf import running
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.errors import (
    AttachError,
    BpfError,
    CgroupError,
    Error,
    NoMarksError,
    ProcessError,
    ThrottleError,
)
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import clock, process, sockets
from pybpfthrottle.linux.cgroup import Cgroup, locked
from pybpfthrottle.linux.sockets import Borrowed, Place
from pybpfthrottle.logger import INFO, Logger
from pybpfthrottle.model import Counters, Direction, Limits, Rate
from pybpfthrottle.settings import SHAPES, AttachPolicy
from pybpfthrottle.supervisor import Chore, Look
from pybpfthrottle.targets import Selection

log = Logger(__name__)

# Of a reason in the record, which has 4 KB.
_MOST_TEXT = 200
# By what is told of it.
_UDP = {
    "queue": "UDP over the download limit waits in a queue: {}",
    "early drops": "UDP over the download limit loses packets early: {}",
}
# How soon it is noticed that another tool's program above does not run since this one does.
_LOOK_ABOVE_S = 1.0


class EbpfThrottle:
    """The limits of one order. ``put_in_force`` attaches them, ``remove`` ends them."""

    def __init__(self, order: Order, throttle_id: str) -> None:
        self._id = throttle_id
        self._order = order
        self._options: Options = order.options or Options()
        self._seat: Optional[Seat] = None
        # Those with which it shares the programs for marked sockets.
        self._crowd: Optional[Crowd] = None
        self._loaded = Loaded(order.limits, self._options)
        self._placed = Placements(self._loaded.programs)
        self._marks: Optional[Marks] = None
        # Where connections of processes are shaped.
        self._marked_cgroups: Sequence[Cgroup] = ()
        self._connections: Optional[Connections] = None
        self._gate: Gate
        self._strays: Optional[Strays] = None
        # Where marks are looked at.
        self._marked_at: Sequence[Cgroup] = ()
        self._notes: list[str] = []
        self._udp: dict[str, str] = {}
        self._look_for_carriers = False
        self._bucket: Bucket
        # The directory of its pins, if it is kept.
        self._pins = ""
        self._record = OwnRecord(self)
        self._is_removed = False
        # What to undo, in this order. If one step raises, the rest still runs.
        self._undo = ExitStack()
        self._seated = self._undo.enter_context(ExitStack())
        self._undo.callback(self._loaded.close)
        self._followed, self._attached, self._guarded = (
            self._undo.enter_context(ExitStack()) for _ in range(3)
        )
        self._attached.callback(self._placed.detach)
        self._attached.callback(lambda: self._unpin(self._pins))
        self._undo.callback(self._restore)
        self._undo.callback(self._record.say_removed)
        self._looking_above = Look(_LOOK_ABOVE_S, self._look_above)

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""
        return self._bucket.rates

    def apply(self, order: Order, throttle_id: str) -> EbpfThrottle:
        """Put in force what was prepared for an order like this one.

        Raises BpfError, CgroupError, ProcessError or ThrottleError; then all is undone.
        """
        self._order, self._id = order, throttle_id
        if self._seat is not None:
            self._seat.limit(order)
        self.put_in_force()
        return self

    def prepare(self) -> None:
        """Load the programs and follow processes, once.

        Raises BpfError or ThrottleError; then all is undone.
        """
        with self._all_or_nothing():
            self._prepare()

    def put_in_force(self) -> None:
        """Prepare, unless that is done already, and attach to each target.

        Raises BpfError, CgroupError, ProcessError or ThrottleError; then all is undone.
        """
        with self._all_or_nothing():
            if not self._loaded.maps:
                self._prepare()
            if self._order.cgroups:
                self._limit_cgroups(self._order.cgroups)
            if self._order.processes is not None:
                self._limit_processes(self._order.processes)
            # Whoever finds pins is to find what they are for.
            self._register()
            self._keep()
            for direction in self._order.limits:
                self._log(direction)
            if self._order.cgroups and self._order.processes is None:
                self._strays = Strays(
                    lambda: self._order.cgroups, connections.pids, self, self._order.command
                )
                self._strays.run()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.remove()
            raise
        finally:
            # All is fitted to the kernel's types, and the throttle may last for days.
            running.forget_types()

    def _prepare(self) -> None:
        order = self._order
        self._take_seat(sharing.join(order))
        scope = Scope.ALL if order.cgroups else Scope.MARKED
        self._gate = Gate(scope, self._pids, self._why_no_gate())
        self._guarded.callback(self._gate.close)
        if order.cgroups:
            self._load(Scope.ALL)
        if order.processes is not None:
            try:
                self._load(Scope.MARKED)
            except BpfError as error:
                needs = programs.with_role(Role.MARK)[0].needs
                raise NoMarksError(
                    f"the kernel takes no marks on sockets: {needs.why_refused(error)}"
                ) from error
        if not self._loaded.object_name:
            raise ThrottleError("no target was given")
        # First: the guard may be needed as soon as something is shaped, and has to be forked
        # before there is a thread.
        if self._options.guard and not order.spec.kept and SOCKETS in self._loaded.maps:
            # By the time the guard acts, processes may have left the cgroups.
            holders = partial(connections.pids, [cgroups_v2.root()])
            guard = Guard(holders, self._loaded.maps, RECORD, self._slot)
            self._guarded.callback(guard.end)
            self._record.add(guard=list(process.Process(guard.pid).identity))
        gate = self._gate.load(self._loaded.maps, self._seat, of_crowd=not self._loaded.programs)
        if gate is not None:
            self._loaded.add(gate)
        if order.processes is not None:
            self._marks = self._marks_of(order.processes)
            self._followed.callback(self._marks.close)
            self._marks.follow()

    def _marks_of(
        self, selection: Selection, spares: Callable[[Borrowed], bool] = lambda found: False
    ) -> Marks:
        maps = self._loaded.maps
        if self._crowd is not None:
            processes: Processes = Member(self._crowd, self._slot)
        else:
            processes = Processes(maps, self._slot)
        return Marks(selection, maps, self._adopting_marked, spares, processes=processes)

    def _take_seat(self, seat: Optional[Seat]) -> None:
        """Share programs and maps with other throttles, if there is a seat."""
        self._seat = seat
        self._seated.callback(sharing.leave if seat is None else seat.leave)
        if seat is not None:
            self._loaded.share(seat)

    @property
    def _slot(self) -> int:
        """Where it has its elements in maps that may be shared."""
        return 0 if self._seat is None else self._seat.slot

    def _log(self, direction: Direction) -> None:
        """Log in one line what is attached, how, and at what rate."""
        if not log.isEnabledFor(INFO):
            return
        how = self.describe(direction)
        log.info(
            "%s: limited to %s, attached by %s to %s; %s, since %s",
            direction,
            self._bucket.rates[direction] or "no rate",
            how["attached_by"],
            ", ".join(cgroup.path for cgroup in self._placed.targets(direction)),
            how["shape"],
            how["shape_reason"],
        )

    def _load(self, scope: Scope) -> None:
        """Load the programs for a scope, which share the maps of those that are loaded already."""
        if scope is Scope.MARKED and self._seat is not None and self._enter_crowd(self._seat):
            return

        def spec() -> ObjectSpec:
            return with_room(self._gate.spec(programs.object_for(scope)), self._order.traffic)

        try:
            refused = self._loaded.load(scope, spec)
        except BpfError as error:
            if self._seat is None or self._loaded.programs:
                raise
            sharing.refuse(str(error))
            self._loaded.share(None)
            self._seated.close()
            self._take_seat(sharing.join(self._order))
            refused = self._loaded.load(scope, spec)
        self._begin(None if refused is None else dict.fromkeys(SHAPES, refused))

    def _enter_crowd(self, seat: Seat) -> bool:
        """Share the programs for marked sockets with other throttles; return False if refused."""
        self._crowd = None if self._options.own_marks else crowds.join(seat)
        if self._crowd is None:
            return False
        self._loaded.enter(self._crowd, seat.slot)
        refused = self._crowd.unshaped
        self._begin(None if refused is None else dict.fromkeys(SHAPES, refused))
        return True

    def _begin(self, refused: Optional[Mapping[str, str]]) -> None:
        """Put the rates in force, before anything is attached."""
        if not hasattr(self, "_bucket"):
            self._bucket = Bucket(
                self._loaded.maps,
                self._order.limits,
                traffic=self._order.traffic,
                shapes=self._options.shape,
                owner=process.identity(),
                expires_ns=self._order.spec.expires_ns,
                slot=self._slot,
            )
            self._bucket.lift_others()
            if self._seat is None:
                put_networks(self._loaded.maps, self._order.traffic)
        # The gate comes last: until its keeper serves it, it opens no window.
        self._bucket.begin(refused or {"gate": "it is not open yet"})

    # Attaching.

    def _limit_cgroups(self, cgroups: Sequence[Cgroup]) -> None:
        """Limit all packets of cgroups. Raises AttachError or CgroupError."""
        self._placed.attach(self._loaded.policers(Scope.ALL, cgroups))
        if self._shape(Scope.ALL, cgroups):
            with self._adopting(Scope.ALL, cgroups) as adopt:
                for found in sockets.Scan().new(connections.pids(cgroups)):
                    adopt(found)

    def _limit_processes(self, selection: Selection) -> None:
        """Limit the packets of the sockets that processes have or create.

        Raises AttachError, CgroupError, ProcessError or ThrottleError.
        """
        cgroups = self._marked_at = self._place_for_marks(selection)
        self._marked_cgroups = cgroups if self._shape(Scope.MARKED, cgroups) else []
        if self._marks is not None:
            self._marks.begin(selection)
            self._look_for_carriers = True

    # Beside the cgroups, for Strays.

    def mark(self, place: Place) -> None:
        """Limit a socket of another cgroup. Raises BpfError, AttachError or OSError."""
        self._look_at_marks()
        marks = self._marks_of(Selection(new_sockets=False))
        with sockets.borrow(place) as own:
            marks.mark(Borrowed(own, place))

    def follow(self, pids: Sequence[int]) -> None:
        """Limit processes in other cgroups, and their children.

        Raises BpfError, AttachError, ProcessError or OSError.
        """
        self._look_at_marks()
        if self._marks is not None:
            self._marks.take_in(pids)
            return
        selection = Selection(tuple(map(process.Process, pids)))
        spares = OfCgroups(lambda: self._order.cgroups)
        marks = self._marks_of(selection, spares)
        try:
            marks.follow()
            marks.begin(selection)
        except BaseException:
            marks.close()
            raise
        self._followed.callback(marks.close)
        self._marks = marks

    def expect(self, names: Sequence[str]) -> bool:
        """Have the kernel limit processes that begin to have such a name; return if it can."""
        return self._marks is not None and self._marks.expect(names)

    def by_name(self, pids: Sequence[int]) -> list[int]:
        """Return those of some processes that are limited for their names alone, as expected."""
        return [] if self._marks is None else self._marks.by_name(pids)

    def let_go(self, pids: Sequence[int]) -> None:
        """Limit some processes no longer, and restore the sockets that they have."""
        if self._marks is None:
            return
        for own in self._marks.let_go(pids):
            if self._connections is not None:
                self._connections.forget(own)

    def _look_at_marks(self) -> None:
        """Limit marked sockets too, wherever they are. Raises BpfError or AttachError."""
        if self._marked_at:
            return
        if MARKS not in self._loaded.maps:
            self._load(Scope.MARKED)
        top = [cgroups_v2.root()]
        if self._crowd is not None:
            self._begin_in(self._crowd)
        else:
            self._placed.attach(self._for_marks(Selection(), top))
        self._marked_at = top
        self._marked_cgroups = top if self._shape(Scope.MARKED, top) else []
        self._keep()
        self._record.add(maps=self._loaded.ids())
        self._record.update()
        running.forget_types()

    def _place_for_marks(self, selection: Selection) -> list[Cgroup]:
        """Attach at the root, which sees each socket, or else at the cgroups of the processes."""
        top = cgroups_v2.root()
        if self._crowd is not None:
            self._begin_in(self._crowd)
            return [top]
        try:
            self._placed.attach(self._for_marks(selection, [top]))
        except AttachError as error:
            own = dict.fromkeys(cgroups_v2.from_pid(one.pid) for one in selection.processes)
            below = [one for one in own if one != top]
            if not below:
                raise
            self._placed.attach(self._for_marks(selection, below))
            self._notes.append(
                "sockets that were made in cgroups other than"
                f" {', '.join(one.path for one in below)} are not limited: {error}"
            )
            return below
        return [top]

    def _begin_in(self, crowd: Crowd) -> None:
        """Limit marked sockets by shared programs. Raises AttachError."""
        crowd.begin()
        self._attached.callback(crowd.end)
        self._placed.share(crowd.placed)

    def _shape(self, scope: Scope, cgroups: Sequence[Cgroup]) -> bool:
        """Shape TCP, and open the gate. If another tool prevents that, the policer remains."""
        if not self._attach_shaper(scope, cgroups):
            return False
        if self._connections is None:
            self._connections = Connections(
                self._loaded.maps,
                self._bucket,
                load=self._loaded.for_a_moment,
                slot=self._slot,
                limited=self._pids,
                holders=self._holders,
                advertised=self._gate.advertised,
                policed=self._gate.share,
                # Whatever the method of the limit: it is attached for a moment only.
                policy=AttachPolicy(override_others=self._loaded.policy().override_others),
            )
        self._open_gate(scope, cgroups)
        return True

    def _attach_shaper(self, scope: Scope, cgroups: Sequence[Cgroup]) -> bool:
        crowd = self._crowd_for(scope)
        if crowd is not None:  # it is attached, if it can be
            self._notes += crowd.notes
            if crowd.unshaped is None and self._loaded.shapes():
                self._gate.wait()
                return True
            return False
        shaper = self._loaded.shaper(scope)
        if shaper is None:
            return False
        self._gate.wait()
        try:
            self._placed.attach(self._loaded.everywhere(shaper, cgroups))
        except AttachError as error:
            self._bucket.begin(dict.fromkeys(SHAPES, str(error)))
            self._notes.append(f"{NOT_SHAPED}: {error}")
            return False
        return True

    def _crowd_for(self, scope: Scope) -> Optional[Crowd]:
        """Return those with which the programs for a scope are shared, if they are."""
        return self._crowd if scope is Scope.MARKED else None

    def _why_no_gate(self) -> Optional[str]:
        """Return why downloads do not go through the gate, or None if they are to."""
        download = Direction.DOWNLOAD
        if download not in self._order.limits:
            return "downloads are not limited"
        return None if self._loaded.shaping(download).method == "gate" else "it was not asked for"

    def _open_gate(self, scope: Scope, cgroups: Sequence[Cgroup]) -> None:
        """Attach the gate. Without it only the kernel moves the receive window."""
        crowd = self._crowd_for(scope)
        if self._gate.refused is None:
            try:
                if crowd is not None:
                    self._gate.enter(crowd)
                else:
                    # An acknowledgement is to pass it once.
                    self._placed.attach_once_each_path(
                        self._loaded.everywhere(self._gate.program, cgroups)
                    )
            except (Error, OSError) as error:
                self._gate.refuse(str(error))
        self._bucket.begin({} if self._gate.refused is None else {"gate": self._gate.refused})

    def _for_marks(self, selection: Selection, cgroups: Sequence[Cgroup]) -> Iterator[Wanted]:
        yield from self._loaded.policers(Scope.MARKED, cgroups)
        yield from self._loaded.markers(cgroups) if selection.new_sockets else ()

    def add(self, cgroup: Cgroup) -> None:
        """Limit another cgroup, too. Raises AttachError or CgroupError; then it is not limited."""
        self._placed.replace(cgroup, lambda: self._limit_cgroups([cgroup]))
        cgroups = list(dict.fromkeys([*self._order.cgroups, cgroup]))
        self._order = self._order._replace(cgroups=cgroups)
        self._keep()
        self._record.update_soon()

    def move(self, gone: Cgroup, come: Cgroup) -> None:
        """Limit the cgroup ``come`` instead of ``gone``, which was removed.

        Raises AttachError or CgroupError; then ``come`` is limited no more than before.
        """
        self._placed.replace(gone, lambda: self._limit_cgroups([come]))
        cgroups = [come if one == gone else one for one in self._order.cgroups]
        self._order = self._order._replace(cgroups=cgroups)
        self._keep()
        self._record.update_soon()

    def _adopting_marked(self) -> ContextManager[Callable[[Borrowed], None]]:
        return self._adopting(Scope.MARKED, self._marked_cgroups)

    def _adopting(
        self, scope: Scope, cgroups: Sequence[Cgroup]
    ) -> ContextManager[Callable[[Borrowed], None]]:
        """Shape connections that were open before, if anything is shaped."""
        if self._connections is None or not cgroups:
            return nullcontext(lambda found: None)
        return self._connections.adopting(scope, cgroups)

    # The record of it in the kernel.

    def _register(self) -> None:
        """Create the record, once the throttle is in force."""
        self._record.add(
            id=self._id,
            owner=list(process.identity()),
            since_ns=clock.boottime_ns(),
            match=(Match.CGROUP if self._order.cgroups else Match.MARKS).value,
            shapes={str(direction): shape for direction, shape in self._options.shape.items()},
            maps=self._loaded.ids(),
            slot=self._slot,
        )
        self._record.create(self._loaded.maps, kept=self._order.spec.kept)

    def _keep(self) -> None:
        """Pin all links anew if the throttle is to outlive this process."""
        if not self._order.spec.kept:
            return
        kept = [
            *self._placed.links(),
            *(self._marks.links() if self._marks is not None else ()),
            *(self._seat.places() if self._seat is not None else ()),
            *self._kept_for_crowd(),
        ]
        before, self._pins = self._pins, ""
        try:
            with locked():
                # What somebody has removed meanwhile is not to have pins again.
                if not self._record.is_removed():
                    self._pins = pins.pin(self._id, kept)
        except OSError as error:
            self._notes.append(
                f"the limit ends with process {process.identity().pid}, which keeps it, since the"
                f" kernel refused to pin it: {error}"
            )
        self._unpin(before)

    def _kept_for_crowd(self) -> Sequence[Union[Link, Map[Any, Any]]]:
        """Return what else is pinned where programs are shared: none of them holds the record."""
        if self._crowd is None:
            return ()
        return [*self._crowd.links(), self._loaded.maps[RECORD]]

    def _unpin(self, path: str) -> None:
        if path:
            with locked():
                pins.unpin(path)

    def recorded(self) -> Mapping[str, Any]:
        """Return the fields of the record that change while the throttle is in force."""
        spec = self._order.spec.changed(limits=dict(self._bucket.rates))
        cgroups = self._order.cgroups or self._placed.targets()
        return {
            "spec": spec.to_json(),
            "cgroups": [cgroup.path for cgroup in cgroups],
            "cgroup_ids": cgroups_v2.ids(cgroups),
            "attached_by": self._placed.attached_by(),
            "refused": self._bucket.refused,
            "udp": {name: text[:_MOST_TEXT] for name, text in self._udp.items()},
        }

    def _look_above(self) -> None:
        """Say what was attached above later, and does not run because of what is attached here."""
        self._notes += [note for note in self._placed.switching_off() if note not in self._notes]

    # What others do with it.

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction counted, over all CPUs."""
        return self._bucket.counters()

    def burst_bytes(self, direction: Direction) -> int:
        """Return what may pass at once after an idle time, beyond the rate."""
        return self._bucket.burst_bytes(direction)

    def set_rate(
        self, direction: Direction, rate: Optional[Rate], *, paused: Optional[Rate] = None
    ) -> None:
        """Change the limit of a direction immediately; None lifts it. Raises ThrottleError."""
        self.change_rate(direction, rate, paused)
        self._record.update()

    def change_rate(
        self, direction: Direction, rate: Optional[Rate], paused: Optional[Rate] = None
    ) -> None:
        """Change a limit, and leave it to the caller to record that. Raises ThrottleError."""
        self._bucket.set_rate(direction, rate)
        self._order = self._order._replace(
            spec=self._order.spec.with_limit(direction, rate, paused)
        )
        self._log(direction)
        if self._connections is not None:
            self._connections.follow()

    def dial(self, direction: Direction) -> MapDial:
        """Return what moves a direction's rate many times a second."""

        def moved(rate: Rate) -> None:
            if self._connections is not None and direction is Direction.UPLOAD:
                self._connections.move_rate(rate)

        return MapDial(
            *(self._loaded.maps, self._bucket, direction),
            moved=moved,
            is_gone=lambda: self._is_removed,
        )

    def foothold(self) -> Foothold:
        """Return where its packets pass. Raises ThrottleError where others share its marks."""
        if self._crowd is not None:
            raise ThrottleError("this limit shares its marks: make it with own_marks")
        return self._foothold(self._marked_at)

    def before_limit(self) -> Foothold:
        """Return where packets pass that come in, before they meet the limit.

        Programs that others share cannot be attached once more, so that they come last. They are at
        the root: what is attached below runs before them. Raises ThrottleError.
        """
        return self.foothold() if self._crowd is None else self._foothold(self._below_root())

    def _foothold(self, marked_at: Iterable[Cgroup]) -> Foothold:
        return Foothold(
            *(self._loaded.maps, tuple(self._order.cgroups), tuple(marked_at)),
            policy=self._loaded.policy(),
            slot=self._slot,
        )

    def _below_root(self) -> Iterable[Cgroup]:
        """Return the highest cgroups below the root that have its processes."""
        pids, found = self.processes(), []
        for pid in pids:
            with suppress(CgroupError, ProcessError):
                found += [*cgroups_v2.from_pid(pid).with_ancestors()][-2:-1]
        if pids and not found:
            raise ThrottleError("its processes are in the root of all cgroups")
        return dict.fromkeys(found)

    def drops_early(self) -> bool:
        """Whether downloads without a receive window are over the limit now."""
        return self._bucket.drops_early(Direction.DOWNLOAD)

    def on_datagram(self, call: Callable[[], object]) -> None:
        """Call something once a large datagram has left, as far as that is told."""
        if self._hears_of_datagrams():
            self._gate.on_datagram(call)

    def lend(self, is_lent: bool) -> None:
        """Say whether a queue is to come: what comes before it may be owed."""
        self._bucket.lend(is_lent and self._hears_of_datagrams())

    def _hears_of_datagrams(self) -> bool:
        # The gate of both is told of all processes' datagrams.
        return not (self._order.cgroups and self._marks is not None)

    def why_no_queue(self) -> Optional[str]:
        """Return why what has no receive window is not to wait in a queue, or None."""
        shape = self._options.shape.get(Direction.DOWNLOAD, "auto")
        if shape not in ("auto", "gate"):
            return f"--shape {shape}"
        if self._options.own_marks:
            return "packets are impaired in another way"
        return too_fast_for_queue(self._bucket.rates[Direction.DOWNLOAD])

    def tell_udp(self, how: str, reason: str) -> None:
        """Have it known how what has no receive window is kept to the limit, and why."""
        self._udp = {"udp": how, "udp_reason": reason}
        log.info("UDP downloads: %s, since %s", how, reason)
        self._record.update_soon()

    def attach_last(self) -> None:
        """Have what comes in meet it after all that is attached by now.

        Raises AttachError or CgroupError.
        """
        self._placed.attach_last()
        self._keep()

    def switch(self, method: str) -> None:
        """Attach by another method. Raises AttachError; then what was attached before still is."""
        self.attach_by(method)
        self._record.update()

    def attach_by(self, method: str) -> None:
        """Attach by another method, and leave it to the caller to record that."""
        if self._crowd is not None and self._order.spec.kept and method != "link":
            raise AttachError("throttles that stay and share their programs are attached by links")
        self._placed.switch(method)

    def describe(self, direction: Direction) -> dict[str, str]:
        """Return how it is attached and shaped, and which of the shipped objects it comes from."""
        shaping = self._bucket.shaping(direction)
        how = {
            "backend": "ebpf",
            "object": self._loaded.object_name,
            "attached_by": self._placed.attached_by(direction),
            "shape": shaping.method,
            "shape_reason": shaping.reason,
        }
        about_open = self._connections.describe(direction) if self._connections else None
        if about_open is not None:
            how["open_connections"] = about_open
        if direction is Direction.DOWNLOAD:
            how.update(self._udp)
        return how

    def processes(self) -> list[int]:
        """Return the selected processes that are limited now, and their children."""
        return [] if self._marks is None else self._marks.pids()

    def notes(self) -> list[str]:
        """Return what is not covered, or covered in addition, a line each."""
        if self._look_for_carriers and self._marks is not None:
            self._look_for_carriers = False
            # To look at all processes takes a while, so not before somebody wants to know.
            from pybpfthrottle.linux import carriers

            loopback = self._order.traffic.loopback
            self._notes += carriers.notes(self._marks.pids(), loopback=loopback)
        found = [*self._notes, *self._bucket.shapes_not_kept()]
        # What was to be expected is not worth a note.
        if self._udp and self._udp["udp_reason"] != self.why_no_queue():
            found.append(_UDP[self._udp["udp"]].format(self._udp["udp_reason"]))
        found += self._connections.notes if self._connections is not None else ()
        found += self._gate.notes()
        for one in (self._strays, self._marks):
            found += one.notes() if one is not None else ()
        return found

    def chores(self) -> Sequence[Chore]:
        """Return the chores that keep the throttle up to date."""
        found: list[Chore] = [self._record.chore, *self._gate.chores()]
        if self._placed.is_below_root():
            found.append(self._looking_above)
        if self._strays is not None:
            found.append(self._strays)
        processes = self._order.processes
        if self._marks is not None and (processes is None or processes.new_sockets):
            found.append(self._marks)
        if self._connections is not None:
            found += self._connections.chores()
        return found

    def removed_by_others(self) -> bool:
        """Whether somebody else has removed the limit."""
        return self._record.removed_by_others

    def hand_over(self) -> Callable[[], None]:
        """Remove the throttle: there is a successor only for one whose process has ended."""
        self.remove()
        return self.remove

    def remove(self) -> None:
        """Restore connections, detach everything, and close what was loaded."""
        self._is_removed = True
        self._undo.close()

    def close(self) -> None:
        """Remove the throttle: what this process holds ends with it."""
        self.remove()

    def _restore(self) -> None:
        if self._placed and SOCKETS in self._loaded.maps:
            # The shaper sets nothing any more.
            self._bucket.lift()
            if self._connections is not None:
                self._connections.release()
            connections.restore(self._holders(), self._loaded.maps[SOCKETS], self._slot)

    def _pids(self) -> list[int]:
        """Return the processes whose sockets are limited."""
        return sorted({*connections.pids(self._order.cgroups), *self.processes()})

    def _holders(self) -> list[int]:
        """Return all processes that may hold a shaped socket: a marked one may be handed over."""
        marked = self._order.processes is not None or bool(self._marked_at)
        # The shaper of a crowd goes on, and restores what is sent by whoever has a socket now.
        if marked and self._crowd is not None:
            return self._pids()
        return connections.pids([cgroups_v2.root()] if marked else self._order.cgroups)
