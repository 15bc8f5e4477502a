"""The owner's side of the line's keeper, which it starts, and replaces if that dies."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from pybpfthrottle.conditions.model import Impairment
from pybpfthrottle.diversion import impairing
from pybpfthrottle.diversion.tally import Tally
from pybpfthrottle.errors import NamespaceError
from pybpfthrottle.linux.helper import SharedHelper
from pybpfthrottle.model import Direction

# Starting takes a twentieth of a second, on a machine that is busy with other things far longer.
_READY_S = 20.0


class LineKeeper(SharedHelper):
    """The process that carries packets between two devices.

    Its owner has the devices too: they stay if the keeper has to be replaced.
    """

    title = "The keeper of the line"
    module = "pybpfthrottle.line.keeper"

    def __init__(self) -> None:
        """Begin to start the process. Raises OSError."""
        self._fds: list[int] = []
        self._way_id = ""
        self._wanted: Sequence[Impairment] = ()
        self._is_open = self._is_empty = False
        # Which of the devices somebody has removed: the source of what comes in, or goes out.
        self.gone: set[Direction] = set()
        super().__init__()
        self.start()

    def restore_later(self, way_id: str) -> None:
        """Have a way out ended by the keeper if this process is killed, from now on."""
        with self._busy:
            self._way_id = way_id
            self.tell({"way": way_id})

    def serve(
        self,
        devices: Sequence[int],
        tallies: Sequence[Tally],
        wanted: Sequence[Impairment],
    ) -> None:
        """Carry packets between two devices, the command's first, and wait until that has begun.

        ``tallies`` and ``wanted`` are of what comes in, and of what goes out. Raises
        NamespaceError.
        """
        with self._busy:
            self._fds = [*devices, *(tally.fd for tally in tallies)]
            self._wanted = wanted
            self._introduce()
        self.wait_until(lambda: self._is_open, _READY_S)
        if not self._is_open:
            raise NamespaceError(
                f"{self.title.lower()} does not start ({self.ended or 'it hangs'})"
            )

    def change(self, wanted: Sequence[Impairment], *, anew: bool) -> None:
        """Have what comes from now on impaired in another way."""
        with self._busy:
            self._wanted = wanted
            self.tell({"change": list(map(impairing.to_json, wanted)), "anew": anew})

    def drain(self, patience_s: float) -> None:
        """Wait until nothing is held, but for no longer than a time."""
        with self._busy:
            self._is_empty = False
            self.tell({"drain": True})
        self.wait_until(lambda: self._is_empty, patience_s)

    def _hear(self, message: Mapping[str, Any]) -> None:
        self._is_open = "opened" in message or self._is_open
        self._is_empty = "drained" in message
        if "gone" in message:
            self.gone.add(Direction(message["gone"]))

    def _introduce(self) -> None:
        wanted = list(map(impairing.to_json, self._wanted))
        self.tell({"open": wanted, "way": self._way_id}, self._fds)

    def _abandon(self) -> None:
        """Do nothing: the kernel waits for nobody."""

    def _close(self) -> None:
        """Do nothing: the devices are the owner's."""
