"""Hand-made BTF by what C calls its types."""

from __future__ import annotations

from elf_builder import BtfBuilder

from pybpfthrottle.bpf.obj.btf import Btf, Kind


class Types(BtfBuilder):
    """Types by what C calls them; each answers with its id."""

    def int(self, name="int", size=4, *, signed=False):
        """An integer."""
        return self.add(Kind.INT, name, size=size, tail=(signed << 24 | size * 8,))

    def ptr(self, to=0):
        """A pointer."""
        return self.add(Kind.PTR, size=to)

    def array(self, of, count):
        """An array."""
        return self.add(Kind.ARRAY, tail=(of, of, count))

    def struct(self, name, size, *members, union=False):
        """Members are (name, type, byte offset), or (name, type, bit offset, width)."""
        bits = any(len(member) == 4 for member in members)
        tail = []
        for member_name, type_id, offset, *width in members:
            place = width[0] << 24 | offset if width else offset * 8
            tail += [member_name, type_id, place]
        kind = Kind.UNION if union else Kind.STRUCT
        return self.add(kind, name, size=size, vlen=len(members), flag=bits, tail=tail)

    def enum(self, name, **values):
        """An enum of 32 bits."""
        tail = [part for pair in values.items() for part in (pair[0], pair[1] & 0xFFFFFFFF)]
        signed = any(value < 0 for value in values.values())
        return self.add(Kind.ENUM, name, size=4, vlen=len(values), flag=signed, tail=tail)

    def enum64(self, name, **values):
        """An enum of 64 bits."""
        tail = []
        for key, value in values.items():
            tail += [key, value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF]
        return self.add(Kind.ENUM64, name, size=8, vlen=len(values), tail=tail)

    def typedef(self, name, of):
        """Another name."""
        return self.add(Kind.TYPEDEF, name, size=of)

    def proto(self, result, *parameters):
        """The prototype of a function."""
        tail = [part for parameter in parameters for part in ("", parameter)]
        return self.add(Kind.FUNC_PROTO, size=result, vlen=len(parameters), tail=tail)

    def fwd(self, name, *, union=False):
        """A struct or union that is only declared."""
        return self.add(Kind.FWD, name, flag=union)

    def btf(self):
        """The types as they are read."""
        return Btf(self.build())

    def func(self, name, proto, linkage=1):
        """A function."""
        return self.add(Kind.FUNC, name, size=proto, vlen=linkage)

    def var(self, name, of, linkage=1):
        """A variable."""
        return self.add(Kind.VAR, name, size=of, tail=(linkage,))

    def datasec(self, name, *variables, size=0):
        """A section of data; variables are (id, offset, size)."""
        tail = [part for variable in variables for part in variable]
        return self.add(Kind.DATASEC, name, size=size, vlen=len(variables), tail=tail)


class SplitTypes(Types):
    """Types of a module, which go on from those of the kernel."""

    def __init__(self, base):
        super().__init__(base.byteorder)
        self.base = base
        self._strings.data = b""
        self._first_string = base.string_bytes
        self._count = base.count - 1

    def add(self, kind, name="", *, size=0, vlen=0, flag=False, tail=()):
        """Add a type; strings that the base has not are the module's own."""
        return super().add(
            kind,
            self._place(name),
            size=size,
            vlen=vlen,
            flag=flag,
            tail=[self._place(item) if isinstance(item, str) else item for item in tail],
        )

    def _place(self, text):
        return self._first_string + self._strings.add(text) if text else 0

    def btf(self, name="module"):
        """The types as they are read."""
        return Btf(self.build(), base=self.base, name=name)
