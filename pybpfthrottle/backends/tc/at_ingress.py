"""Limits at the ingress hooks of devices: the filters come and go with the qdisc they need."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Mapping, Sequence

from pybpfthrottle.backends.tc.ingress import Ingress
from pybpfthrottle.backends.tc.iproute import Listing
from pybpfthrottle.backends.tc.on_devices import OnDevices


class AtIngress(OnDevices):
    """The base of what has filters there; ``_ingress`` has them."""

    _ingress: Ingress

    def _prepare_ingress(self, handles: Mapping[str, Any], action: Mapping[str, str]) -> None:
        """Find the filters by their handles, or choose where to put them."""
        self._ingress = Ingress(self._id, self._ip, handles, action)
        if not self._ingress.preference:
            self._ingress.choose_preference(self._devices)

    @property
    def handles(self) -> Mapping[str, Any]:
        """What finds it again."""
        return {**super().handles, **self._ingress.handles}

    @abstractmethod
    def _filters(self, device: str) -> Sequence[str]:
        """Return the commands that put the filters on a device."""

    def _begin(self, device: str, qdiscs: Listing) -> None:
        if not self._ingress.has_qdisc(qdiscs, device):
            self._ingress.will_make(device)
            self._save(self.handles)
            self._ingress.make(device)
        self._ip.change(self._filters(device))

    def _end(self, device: str, qdiscs: Listing) -> None:
        if self._ingress.has_qdisc(qdiscs, device):
            self._ingress.remove(device, surely=device in self._devices)
