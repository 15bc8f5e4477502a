from __future__ import annotations

import errno

import pytest
from made_types import Types

from pybpfthrottle.bpf import btf_objects
from pybpfthrottle.bpf.abi import Cmd
from pybpfthrottle.bpf.obj.btf import Btf, Kind, Linkage, Variable
from pybpfthrottle.bpf.obj.btf_rewrite import CONCESSIONS, conceding, loadable
from pybpfthrottle.bpf.obj.specs import Place, SectionLayout


@pytest.fixture
def types():
    """An empty set of types, in the byte order of this machine."""
    return Types()


def rewritten(types, layouts=None, static=()):
    """The types as a kernel takes them."""
    return Btf(loadable(types.btf(), layouts or {}, static))


def test_variables_get_their_places(types):
    """A section has its size, and its variables are in the order of their places."""
    number = types.int()
    first, second = types.var("first", number), types.var("second", number)
    section = types.datasec(".data", (second, 0, 4), (first, 0, 4))
    layout = SectionLayout(12, {"first": Place(0, 4), "second": Place(8, 4)})
    btf = rewritten(types, {".data": layout})
    assert btf.type(section).size_or_type == 12
    assert list(btf.variables(btf.type(section))) == [Variable(first, 0, 4), Variable(second, 8, 4)]


@pytest.mark.parametrize("layouts", [{}, {".data": SectionLayout(4, {})}])
def test_a_section_whose_places_are_not_known_goes(types, layouts):
    """Without all places a pointer to void is in the place of a section; ids stay."""
    number = types.int()
    section = types.datasec(".data", (types.var("lost", number), 0, 4))
    last = types.struct("last", 4)
    btf = rewritten(types, layouts)
    assert (btf.type(section).kind, btf.type(last).name) == (Kind.PTR, "last")


def test_externs_go_with_their_tags(types):
    """What the object does not define is no type for the kernel, nor are tags of it."""
    proto = types.proto(0)
    function = types.func("kernels", proto, Linkage.EXTERN)
    variable = types.var("symbol", types.int(), Linkage.EXTERN)
    types.datasec(".ksyms", (function, 0, 0), (variable, 0, 4))
    own = types.func("own", proto)
    types.add(Kind.DECL_TAG, "tag", size=function, tail=(0xFFFFFFFF,))
    types.add(Kind.DECL_TAG, "tag", size=own, tail=(0xFFFFFFFF,))
    kinds = [found.kind for found in rewritten(types).types]
    assert kinds[function] == kinds[variable] == Kind.PTR
    assert kinds[-2:] == [Kind.PTR, Kind.DECL_TAG]


def test_settings_become_variables_of_ours(types):
    """The settings lie in a map that the loader makes, so that they are not extern any more."""
    setting = types.var("CONFIG_HZ", types.int(), Linkage.EXTERN)
    types.datasec(".kconfig", (setting, 0, 4))
    btf = rewritten(types, {".kconfig": SectionLayout(8, {"CONFIG_HZ": Place(0, 4)})})
    assert btf.linkage(btf.type(setting)) == Linkage.GLOBAL


def test_hidden_functions_are_verified_with_their_callers(types):
    """A hidden function becomes static, others stay global."""
    proto = types.proto(0)
    hidden, seen = types.func("hidden", proto), types.func("seen", proto)
    btf = rewritten(types, static={"hidden"})
    assert btf.linkage(btf.type(hidden)) == Linkage.STATIC
    assert btf.linkage(btf.type(seen)) == Linkage.GLOBAL


def everything(types):
    """One type of each kind that came after Linux 4.18."""
    number = types.int()
    types.enum64("wide", A=1)
    types.add(Kind.TYPE_TAG, "tag", size=number)
    variable = types.var("v", number)
    types.add(Kind.DECL_TAG, "tag", size=variable, tail=(0xFFFFFFFF,))
    types.add(Kind.FLOAT, "double", size=8)
    types.func("f", types.proto(number, number))
    types.datasec(".data", (variable, 0, 4), size=4)
    types.struct("last", 4)
    return types.build()


def test_each_concession_takes_its_kinds_away(types):
    """After all concessions only kinds that Linux 4.18 knows are there, with the same ids."""
    data = everything(types)
    names = [found.name for found in Btf(data).types]
    for concession in CONCESSIONS:
        changed = conceding(data, concession)
        assert changed is not None
        data = changed
    found = Btf(data).types
    assert {item.kind for item in found} <= set(Kind) - set(CONCESSIONS[-1].kinds) - {
        *(Kind.ENUM64, Kind.TYPE_TAG, Kind.DECL_TAG, Kind.FLOAT, Kind.DATASEC, Kind.VAR)
    }
    assert len(found) == len(names)
    assert found[-1].name == "last"


def test_nothing_is_conceded_twice(types):
    """Types that have nothing of a concession stay as they are."""
    types.struct("s", 4)
    assert [conceding(types.build(), concession) for concession in CONCESSIONS] == [None] * 7


def test_only_what_is_refused_is_conceded(kernel, types):
    """A kernel that knows no 64-bit enums gets all other types as they are."""
    tried = []

    def refuse(attr):
        tried.append(attr.btf_load.btf_size)
        if len(tried) == 1:
            raise OSError(errno.EINVAL, "no")

    kernel.handlers[Cmd.BTF_LOAD] = refuse
    with btf_objects.load(everything(types)) as loaded:
        assert loaded.functions
    assert len(tried) == 2
    assert tried[1] < tried[0]


def test_a_kernel_without_functions_is_told_none(kernel, types):
    """Before Linux 5.0 programs cannot refer to functions' types."""
    tried = []

    def refuse(attr):
        tried.append(attr)
        if len(tried) < 8:
            raise OSError(errno.EINVAL, "no")

    kernel.handlers[Cmd.BTF_LOAD] = refuse
    with btf_objects.load(everything(types)) as loaded:
        assert not loaded.functions


def test_a_kernel_that_takes_no_types_is_no_error(kernel, types):
    """Before Linux 4.18, and without privileges, objects do without their types."""
    for number in (errno.EINVAL, errno.EPERM):

        def refuse(attr, number=number):
            raise OSError(number, "no")

        kernel.handlers[Cmd.BTF_LOAD] = refuse
        assert btf_objects.load(everything(types)) is None


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("box<u32>", "box_u32_"),
        ("std::pair", "std__pair"),
        ("[]const u8", "__const_u8"),
        ("été", "__t__"),
        ("7up", "_up"),
        ("counter.1", "counter.1"),
        ("__0", "__0"),
    ],
)
def test_names_of_other_languages_become_those_of_c(types, name, legal):
    """What a name in C cannot have becomes an underscore, in types and all that is in them."""
    number = types.int()
    types.struct(name, 4, (name, number, 0))
    types.enum("values", **{name: 1})
    types.add(Kind.FUNC_PROTO, vlen=1, tail=(name, number))
    btf = rewritten(types)
    struct, enum, proto = btf.type(2), btf.type(3), btf.type(4)
    found = [*btf.members(struct), *btf.enumerators(enum), *btf.parameters(proto)]
    assert [struct.name, *(item.name for item in found)] == [legal] * 4


def test_names_of_what_has_none_are_taken_away(types):
    """Rust gives pointers names, which the kernel refuses."""
    types.add(Kind.PTR, "*mut u8")
    types.add(Kind.ARRAY, "[u8; 4]", tail=(1, 1, 4))
    assert [found.name for found in rewritten(types).types] == ["", "", ""]


def test_texts_that_are_no_names_stay(types):
    """Tags, and the source's lines among the strings, are not names."""
    number = types.int()
    types.add(Kind.DECL_TAG, "exception_callback:f", size=number, tail=(0xFFFFFFFF,))
    line = types._strings.add("if (a < b)")
    btf = rewritten(types)
    assert btf.type(2).name == "exception_callback:f"
    assert btf.string(line) == "if (a < b)"
