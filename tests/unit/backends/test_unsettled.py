"""Of the machine's BPF objects only those are looked at that may matter, and new ones."""

from __future__ import annotations

from pybpfthrottle.backends.ebpf.registry import Unsettled


class Objects:
    """Ids of objects, and what was listed of them."""

    def __init__(self, *ids: int) -> None:
        self.ids = list(ids)
        self.listed: list[int] = []

    def above(self, last: int):
        """Those with higher ids, as the kernel lists them."""
        for found in sorted(self.ids):
            if found > last:
                self.listed.append(found)
                yield found


def test_what_is_settled_is_not_even_listed_again() -> None:
    """A machine may have thousands, and a look at them is needed for each limit."""
    objects = Objects(3, 8, 9)
    unsettled = Unsettled(objects.above)
    assert unsettled.ids() == [3, 8, 9]
    unsettled.settle(3)
    unsettled.settle(9)
    objects.listed.clear()
    assert unsettled.ids() == [8]
    assert objects.listed == []
    objects.ids += [11]
    assert unsettled.ids() == [8, 11]
    assert objects.listed == [11]


def test_the_highest_may_end() -> None:
    """Those that come next still have higher ids."""
    objects = Objects(3, 8)
    unsettled = Unsettled(objects.above)
    unsettled.ids()
    unsettled.settle(8)
    objects.ids = [3, 12]
    assert unsettled.ids() == [3, 12]


def test_before_the_kernel_begins_anew_all_are_listed() -> None:
    """After 2^31 ids, new objects have low ones again."""
    objects = Objects(3, (1 << 31) - 1)
    unsettled = Unsettled(objects.above)
    unsettled.ids()
    unsettled.settle(3)
    objects.ids += [5]
    assert 5 in unsettled.ids()
