"""Hand-made types of an object and of a kernel in which they are shifted, renamed or missing."""

from __future__ import annotations

import struct

import pytest
from made_types import Types

from pybpfthrottle.bpf.abi import CoreRelocationKind as K
from pybpfthrottle.bpf.errors import AmbiguousTypeError, ObjectFileError
from pybpfthrottle.bpf.obj.accesses import describe
from pybpfthrottle.bpf.obj.btf_ext import CoreRelocation
from pybpfthrottle.bpf.obj.core import Answer, Kernel, Load, Resolver
from pybpfthrottle.bpf.obj.patch import POISON, Instructions, PatchError


@pytest.fixture(params=["little", "big"])
def order(request):
    """The byte order of object and kernel."""
    return request.param


@pytest.fixture
def local(order):
    """The object's types."""
    return Types(order)


@pytest.fixture
def kernel(order):
    """The kernel's types."""
    return Types(order)


def ask(local, kernel, type_id, access, kind, *modules):
    """What a relocation comes to."""
    resolver = Resolver(
        local.btf(), lambda: Kernel(kernel.btf(), lambda: [module.btf() for module in modules])
    )
    return resolver.answer(CoreRelocation(0, type_id, access, kind))


def target(*args):
    """The value that belongs into the instruction."""
    return ask(*args).target


def shifted(local, kernel):
    """A struct of which the kernel's has another member in front."""
    number, theirs = local.int(), kernel.int()
    kernel.struct("pair", 16, ("new", theirs, 0), ("a", theirs, 8), ("b", theirs, 12))
    return local.struct("pair", 8, ("a", number, 0), ("b", number, 4))


def test_a_field_that_moved_is_found(local, kernel):
    """FIELD_BYTE_OFFSET is where the kernel has the field."""
    answer = ask(local, kernel, shifted(local, kernel), "0:1", K.FIELD_BYTE_OFFSET)
    assert answer == Answer(4, 12, checked=True, load=Load(4, 4, resizable=True))


def test_an_element_counts_by_the_kernels_size(local, kernel):
    """The first number of an access is an index, of elements as large as the kernel's are."""
    assert target(local, kernel, shifted(local, kernel), "2:1", K.FIELD_BYTE_OFFSET) == 2 * 16 + 12


def test_a_flavour_stands_for_the_type(local, kernel):
    """What follows ___ in a local name does not count."""
    number, theirs = local.int(), kernel.int()
    kernel.struct("s", 8, ("a", theirs, 4))
    ours = local.struct("s___old", 4, ("a", number, 0))
    assert target(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET) == 4


def test_a_field_that_is_missing_has_no_offset(local, kernel):
    """A field that the kernel lacks has no offset, and does not exist."""
    number = local.int()
    kernel.struct("s", 4, ("other", kernel.int(), 0))
    ours = local.struct("s", 4, ("a", number, 0))
    assert target(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET) is None
    assert target(local, kernel, ours, "0:0", K.FIELD_BYTE_SIZE) is None
    assert target(local, kernel, ours, "0:0", K.FIELD_EXISTS) == 0


def test_a_field_that_is_there_exists(local, kernel):
    """FIELD_EXISTS is 1 for a field that only moved."""
    assert target(local, kernel, shifted(local, kernel), "0:0", K.FIELD_EXISTS) == 1


@pytest.mark.parametrize("kind", [K.FIELD_BYTE_OFFSET, K.FIELD_SIGNED, K.FIELD_RSHIFT_U64])
def test_a_field_of_another_shape_is_not_the_field(local, kernel, kind):
    """An integer here and a pointer there are not the same field."""
    ours = local.struct("s", 4, ("a", local.int(), 0))
    kernel.struct("s", 8, ("a", kernel.ptr(), 0))
    assert target(local, kernel, ours, "0:0", kind) is None


def test_a_field_may_have_become_larger(local, kernel):
    """FIELD_BYTE_SIZE is the kernel's, and an unsigned load may be widened."""
    ours = local.struct("s", 4, ("a", local.int(), 0))
    kernel.struct("s", 8, ("a", kernel.int("long", 8), 0))
    assert ask(local, kernel, ours, "0:0", K.FIELD_BYTE_SIZE)[:2] == (4, 8)
    assert ask(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET).load == Load(4, 8, resizable=True)


def test_a_signed_load_is_not_widened(local, kernel):
    """A signed field of another size cannot be read by the same instruction."""
    ours = local.struct("s", 4, ("a", local.int(signed=True), 0))
    kernel.struct("s", 8, ("a", kernel.int("long", 8, signed=True), 0))
    assert not ask(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET).load.resizable


def test_signs_are_the_kernels(local, kernel):
    """FIELD_SIGNED tells the sign of the kernel's integer."""
    ours = local.struct("s", 8, ("a", local.int(), 0), ("b", local.int(), 4))
    kernel.struct("s", 8, ("a", kernel.int(signed=True), 0), ("b", kernel.int(), 4))
    assert target(local, kernel, ours, "0:0", K.FIELD_SIGNED) == 1
    assert target(local, kernel, ours, "0:1", K.FIELD_SIGNED) == 0


def test_the_sign_of_an_enum_is_its_values(local, kernel):
    """FIELD_SIGNED of an enum tells whether it has negative values."""
    ours = local.struct("s", 4, ("a", local.enum("e", A=1), 0))
    kernel.struct("s", 4, ("a", kernel.enum("e", A=-1), 0))
    assert target(local, kernel, ours, "0:0", K.FIELD_SIGNED) == 1


def bit_fields(local, kernel):
    """A field of 3 bits at bit 5, which is one of 7 bits at bit 29 in the kernel."""
    ours = local.struct("s", 4, ("a", local.int(), 5, 3))
    kernel.struct("s", 8, ("pad", kernel.int(), 0, 29), ("a", 1, 29, 7))
    return ours


def test_a_bit_field_is_read_by_a_load_that_holds_it(local, kernel):
    """A bit field that crosses a word is loaded by eight bytes, unchecked."""
    ours = bit_fields(local, kernel)
    offset = ask(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET)
    assert offset == Answer(0, 0, checked=False, load=None)
    assert target(local, kernel, ours, "0:0", K.FIELD_BYTE_SIZE) == 8


def test_shifts_cut_a_bit_field_out(local, kernel, order):
    """The two shifts leave exactly the bits of the field."""
    ours = bit_fields(local, kernel)
    left = target(local, kernel, ours, "0:0", K.FIELD_LSHIFT_U64)
    right = target(local, kernel, ours, "0:0", K.FIELD_RSHIFT_U64)
    # Bit fields count from the other end in big-endian machines.
    number = 0x55 << 29 if order == "little" else 0x55 << 64 - 29 - 7
    noise = ~(0x7F << 29 if order == "little" else 0x7F << 64 - 29 - 7)
    assert ((number | noise) << left & (1 << 64) - 1) >> right == 0x55


def test_shifts_of_a_plain_field_extend_it(local, kernel, order):
    """The shifts of a field of four bytes leave its 32 bits."""
    ours = shifted(local, kernel)
    assert target(local, kernel, ours, "0:0", K.FIELD_RSHIFT_U64) == 32
    assert target(local, kernel, ours, "0:0", K.FIELD_LSHIFT_U64) == 32


def test_a_bit_field_may_have_become_plain(local, kernel):
    """A field of bits here may be a whole integer there."""
    ours = local.struct("s", 4, ("a", local.int(), 5, 3))
    kernel.struct("s", 8, ("pad", kernel.int(), 0), ("a", 1, 4))
    assert target(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET) == 4
    assert target(local, kernel, ours, "0:0", K.FIELD_RSHIFT_U64) == 32


def test_nested_members_add_their_offsets(local, kernel):
    """An access goes through members of members by their names."""
    inner = local.struct("inner", 4, ("x", local.int(), 0))
    ours = local.struct("outer", 4, ("in", inner, 0))
    theirs = kernel.struct("renamed", 8, ("x", kernel.int(), 4))
    kernel.struct("outer", 16, ("y", 1, 0), ("in", theirs, 8))
    assert target(local, kernel, ours, "0:0:0", K.FIELD_BYTE_OFFSET) == 12


def test_anonymous_members_are_looked_through(local, kernel):
    """A field may be inside of an anonymous union there, and be plain here."""
    ours = local.struct("s", 4, ("x", local.int(), 0))
    union = kernel.struct("", 4, ("y", kernel.int(), 0), ("x", 1, 0), union=True)
    kernel.struct("s", 12, ("z", 1, 0), ("", union, 8))
    assert target(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET) == 8


def test_anonymous_members_need_not_be_there(local, kernel):
    """A field may be plain there, and inside of an anonymous struct here."""
    inner = local.struct("", 4, ("x", local.int(), 0))
    ours = local.struct("s", 4, ("", inner, 0))
    kernel.struct("s", 8, ("z", kernel.int(), 0), ("x", 1, 4))
    assert target(local, kernel, ours, "0:0:0", K.FIELD_BYTE_OFFSET) == 4


def test_elements_count_by_the_kernels_size(local, kernel):
    """An element of an array is found where the kernel has it, unless the array is too short."""
    ours = local.struct("s", 40, ("x", local.array(local.int(), 10), 0))
    kernel.struct("s", 44, ("y", kernel.int(), 0), ("x", kernel.array(1, 5), 4))
    assert target(local, kernel, ours, "0:0:3", K.FIELD_BYTE_OFFSET) == 16
    assert target(local, kernel, ours, "0:0:7", K.FIELD_EXISTS) == 0


def test_a_flexible_array_has_all_elements(local, kernel):
    """An array without a length at the end of a struct is never too short."""
    ours = local.struct("s", 40, ("x", local.array(local.int(), 10), 0))
    kernel.struct("s", 4, ("y", kernel.int(), 0), ("x", kernel.array(1, 0), 4))
    assert target(local, kernel, ours, "0:0:7", K.FIELD_BYTE_OFFSET) == 4 + 28


def test_structs_of_other_names_are_compatible_fields(local, kernel):
    """A field that is a struct stays the field when the struct is renamed."""
    ours = local.struct("s", 4, ("in", local.struct("a", 4), 0))
    kernel.struct("s", 8, ("in", kernel.struct("b", 4), 4))
    assert target(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET) == 4


def test_local_ids_are_the_objects(local, kernel):
    """TYPE_ID_LOCAL is the id in the object's own types, and needs no kernel."""
    local.int()
    ours = local.struct("s", 4)
    resolver = Resolver(local.btf(), lambda: pytest.fail("the kernel is not asked"))
    answer = resolver.answer(CoreRelocation(0, ours, "0", K.TYPE_ID_LOCAL))
    assert answer == Answer(2, 2, checked=False)


def test_types_by_name(local, kernel):
    """TYPE_ID_TARGET, TYPE_EXISTS and TYPE_SIZE tell of the type of this name, 0 if missing."""
    there, missing = local.struct("s", 4), local.struct("gone", 4)
    kernel.int()
    kernel.struct("s", 12)
    kinds = [K.TYPE_ID_TARGET, K.TYPE_EXISTS, K.TYPE_SIZE, K.TYPE_MATCHES]
    assert [target(local, kernel, there, "0", kind) for kind in kinds] == [2, 1, 12, 1]
    assert [target(local, kernel, missing, "0", kind) for kind in kinds] == [0, 0, 0, 0]


def test_a_type_of_another_kind_is_another_type(local, kernel):
    """A union is not the struct of its name."""
    ours = local.struct("s", 4)
    kernel.struct("s", 4, union=True)
    assert target(local, kernel, ours, "0", K.TYPE_EXISTS) == 0


def test_typedefs_of_functions_are_compared(local, kernel):
    """A typedef of a pointer to a function exists where the parameters go together."""
    for types, parameters in ((local, 1), (kernel, 2)):
        number = types.int()
        same = types.ptr(types.proto(number, number))
        types.typedef("same", same)
        types.typedef("other", types.ptr(types.proto(number, *[number] * parameters)))
    by_name = {found.name: found.id for found in local.btf().types}
    assert target(local, kernel, by_name["same"], "0", K.TYPE_EXISTS) == 1
    assert target(local, kernel, by_name["other"], "0", K.TYPE_EXISTS) == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "matches"),
    [
        (lambda t: t.struct("s", 4, ("a", t.int(), 0)), None, 1),
        (
            lambda t: t.struct("s", 4, ("a", t.int(), 0)),
            lambda t: t.struct("s", 8, ("b", t.int(), 0), ("a", 1, 4)),
            1,
        ),
        (
            lambda t: t.struct("s", 8, ("b", t.int(), 0), ("a", 1, 4)),
            lambda t: t.struct("s", 4, ("a", t.int(), 0)),
            0,
        ),
        (
            lambda t: t.struct("s", 4, ("a", t.int(), 0)),
            lambda t: t.struct("s", 4, ("a", t.int(signed=True), 0)),
            0,
        ),
        (
            lambda t: t.struct("s", 4, ("a", t.ptr(t.fwd("x")), 0)),
            lambda t: t.struct("s", 4, ("a", t.ptr(t.struct("x", 4)), 0)),
            1,
        ),
        (
            lambda t: t.struct("s", 4, ("a", t.ptr(t.struct("x", 4)), 0)),
            lambda t: t.struct("s", 4, ("a", t.ptr(t.fwd("x", union=True)), 0)),
            0,
        ),
        (
            lambda t: t.struct("s", 4, ("a", t.array(t.int(), 3), 0)),
            lambda t: t.struct("s", 4, ("a", t.array(t.int(), 4), 0)),
            0,
        ),
        (lambda t: t.enum("s", A=1), lambda t: t.enum("s", B=1, A=7), 1),
        (lambda t: t.enum("s", A=1), lambda t: t.enum("s", B=1), 0),
        (lambda t: t.enum("s", A=1), lambda t: t.enum64("s", A=1), 1),
        (
            lambda t: t.typedef("s", t.ptr(t.proto(t.int(), 1))),
            lambda t: t.typedef("s", t.ptr(t.proto(t.int(), 1, 1))),
            0,
        ),
    ],
)
def test_types_that_match(local, kernel, ours, theirs, matches):
    """TYPE_MATCHES wants all of the local type's members, signs, lengths and names."""
    type_id = ours(local)
    (theirs or ours)(kernel)
    assert target(local, kernel, type_id, "0", K.TYPE_MATCHES) == matches


def test_enumerators_by_name(local, kernel):
    """ENUMVAL_VALUE is the kernel's number; one that is missing does not exist and has none."""
    ours = local.enum("e", A=1, GONE=2)
    kernel.enum("e", NEW=1, A=-7)
    assert ask(local, kernel, ours, "0", K.ENUMVAL_VALUE)[:2] == (1, (1 << 64) - 7)
    assert target(local, kernel, ours, "0", K.ENUMVAL_EXISTS) == 1
    assert target(local, kernel, ours, "1", K.ENUMVAL_EXISTS) == 0
    assert target(local, kernel, ours, "1", K.ENUMVAL_VALUE) is None


def test_enumerators_of_64_bits(local, kernel):
    """An enum may have become one of 64 bits."""
    ours = local.enum("e", A___flavour=1)
    kernel.enum64("e", A=1 << 40 | 3)
    assert target(local, kernel, ours, "0", K.ENUMVAL_VALUE) == 1 << 40 | 3


def test_two_types_that_answer_alike_are_no_matter(local, kernel):
    """Several candidates are allowed as long as they agree."""
    ours = local.struct("s", 4, ("a", local.int(), 0))
    kernel.struct("s", 8, ("a", kernel.int(), 4))
    kernel.struct("s___other", 12, ("b", 1, 0), ("a", 1, 4))
    kernel.struct("s", 12, ("c", 1, 0))
    assert target(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET) == 4


def test_two_types_that_answer_differently_are_ambiguous(local, kernel):
    """Candidates that disagree are an error that names the access."""
    ours = local.struct("s", 4, ("a", local.int(), 0))
    kernel.struct("s", 8, ("a", kernel.int(), 4))
    kernel.struct("s", 12, ("a", 1, 0))
    with pytest.raises(AmbiguousTypeError, match=r"struct s\.a .*\[0, 4\]"):
        ask(local, kernel, ours, "0:0", K.FIELD_BYTE_OFFSET)


def test_modules_are_looked_into_last(local, kernel, order):
    """A type that the kernel itself lacks is looked for in its modules."""
    module = Types(order)
    ours, common = local.struct("s", 4), local.struct("common", 4)
    kernel.struct("common", 8)
    module.struct("common", 16)
    module.struct("s", 12)
    assert target(local, kernel, ours, "0", K.TYPE_SIZE, module) == 12
    assert target(local, kernel, common, "0", K.TYPE_SIZE, module) == 8


@pytest.mark.parametrize(
    ("access", "kind"),
    [
        ("", K.FIELD_EXISTS),
        ("0:x", K.FIELD_EXISTS),
        ("-1", K.FIELD_EXISTS),
        ("0:9", K.FIELD_BYTE_OFFSET),
        ("0:0:0", K.FIELD_BYTE_OFFSET),
        (":".join("0" * 65), K.FIELD_BYTE_OFFSET),
        ("1", K.TYPE_SIZE),
        ("0", K.ENUMVAL_VALUE),
    ],
)
def test_an_access_that_goes_nowhere_is_refused(local, kernel, access, kind):
    """An access that the object's own types do not have is an ObjectFileError."""
    with pytest.raises(ObjectFileError, match="CO-RE"):
        ask(local, kernel, shifted(local, kernel), access, kind)


def test_a_type_without_a_name_is_refused(local, kernel):
    """There is nothing to look for without a name."""
    with pytest.raises(ObjectFileError, match="no name"):
        ask(local, kernel, local.struct("", 4), "0", K.TYPE_EXISTS)


def test_a_struct_that_holds_itself_ends(local, kernel):
    """Types that are nested without end are an ObjectFileError."""
    ours = local.struct("s", 4, ("a", local.int(), 0))
    kernel.struct("s", 4, ("", 1, 0))
    with pytest.raises(ObjectFileError, match="too deep"):
        ask(local, kernel, ours, "0:0", K.FIELD_EXISTS)


def test_an_access_reads_as_in_c(local):
    """An access is described as C spells it."""
    inner = local.struct("", 16, ("x", local.array(local.int(), 4), 0), union=True)
    ours = local.struct("s___v2", 16, ("", inner, 0))
    enum = local.enum("e", A=1)
    btf = local.btf()
    field = CoreRelocation(0, ours, "0:0:0:3", K.FIELD_BYTE_OFFSET)
    assert describe(btf, field) == "struct s___v2.x[3]"
    assert describe(btf, CoreRelocation(0, enum, "0", K.ENUMVAL_VALUE)) == "enum e.A"
    assert describe(btf, CoreRelocation(0, ours, "0", K.TYPE_SIZE)) == "struct s___v2"


class Code:
    """One or two instructions, and what an answer makes of them."""

    def __init__(self, order):
        self.order = order
        self.mark = "<" if order == "little" else ">"

    def insn(self, code, off=0, imm=0):
        """One instruction."""
        return struct.pack(self.mark + "BBhi", code, 0, off, imm)

    def patched(self, code, answer, poison=0):
        """The opcode, offset and immediate value of each instruction afterwards."""
        code = bytearray(code)
        Instructions(code, self.order).answer(0, answer, poison)
        rows = struct.iter_unpack(self.mark + "BBhi", code)
        return [(opcode, off, imm) for opcode, _, off, imm in rows]


@pytest.fixture
def code(order):
    """Instructions of either byte order."""
    return Code(order)


def test_a_load_takes_the_offset(code):
    """The offset goes into the instruction's own."""
    assert code.patched(code.insn(0x61, off=4), Answer(4, 12, checked=True)) == [(0x61, 12, 0)]


@pytest.mark.parametrize(("size", "opcode"), [(1, 0x71), (2, 0x69), (8, 0x79)])
def test_a_load_takes_the_size(code, size, opcode):
    """A load of four bytes becomes one of as many as the field has."""
    answer = Answer(4, 12, checked=True, load=Load(4, size, resizable=True))
    assert code.patched(code.insn(0x61, off=4), answer) == [(opcode, 12, 0)]


def test_a_load_that_cannot_change_its_size_is_poisoned(code):
    """A load that would have to extend a sign becomes a call that no kernel has."""
    answer = Answer(4, 12, checked=True, load=Load(4, 8, resizable=False))
    assert code.patched(code.insn(0x61, off=4), answer, 3) == [(0x85, 0, POISON + 3)]


def test_an_addition_takes_the_offset_of_a_field_of_any_size(code):
    """Only loads and stores mind the size of a field."""
    answer = Answer(4, 12, checked=True, load=Load(4, 8, resizable=False))
    assert code.patched(code.insn(0x07, imm=4), answer) == [(0x07, 0, 12)]


def test_a_64_bit_load_takes_both_halves(code):
    """The value goes into both halves of a 64-bit load."""
    found = code.patched(
        code.insn(0x18, imm=1) + code.insn(0), Answer(1, 7 << 32 | 9, checked=True)
    )
    assert found == [(0x18, 0, 9), (0, 0, 7)]


def test_both_halves_are_poisoned(code):
    """A 64-bit load without an answer becomes two calls."""
    found = code.patched(code.insn(0x18, imm=1) + code.insn(0), Answer(1, None, checked=True))
    assert found == [(0x85, 0, POISON)] * 2


@pytest.mark.parametrize(
    ("opcode", "answer", "match"),
    [
        (0x61, Answer(8, 12, checked=True), "should contain 8"),
        (0x61, Answer(0, 1 << 15, checked=True), "too large"),
        (0x07, Answer(8, 12, checked=True), "should contain 8"),
        (0x0F, Answer(0, 12, checked=True), "opcode 0xf"),
        (0x18, Answer(0, 12, checked=True), "opcode 0x18"),
        (0xDB, Answer(0, 12, checked=True, load=Load(8, 4, resizable=True)), "moves"),
    ],
)
def test_what_does_not_fit_is_refused(code, opcode, answer, match):
    """An instruction that cannot hold the answer, or held another one before, is refused."""
    with pytest.raises(PatchError, match=match):
        code.patched(code.insn(opcode), answer)


@pytest.mark.parametrize("at", [-8, 4, 8])
def test_what_is_no_instruction_is_refused(code, order, at):
    """An answer belongs to the beginning of an instruction."""
    with pytest.raises(PatchError, match="no instruction"):
        Instructions(bytearray(8), order).answer(at, Answer(0, 1, checked=True), 0)
