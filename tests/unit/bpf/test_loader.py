from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys

import pytest
from compiled import compiled

from pybpfthrottle.bpf import loader, maps, privileges, programs
from pybpfthrottle.bpf.abi import AttachType, Cmd, MapType, ProgType
from pybpfthrottle.bpf.errors import (
    MapCreateError,
    ObjectFileError,
    ProgramLoadError,
    VerifierError,
)
from pybpfthrottle.bpf.obj import asm, elf
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.specs import (
    FunctionKey,
    FunctionSpec,
    MapReference,
    MapSpec,
    ObjectSpec,
    ProgramSpec,
)
from pybpfthrottle.bpf.program_info import ProgramInfo, program_info

INFINITY = resource.RLIM_INFINITY


def array(name):
    """A map."""
    return MapSpec(name, MapType.ARRAY, 4, 8, 2)


def spec_of(**programs_and_their_maps):
    """A spec with these programs, each of which loads the maps that it is given."""
    spec = ObjectSpec("test", sys.byteorder, license="GPL")
    for name, map_names in programs_and_their_maps.items():
        code = b"".join(asm.load_map(1, 0) for _ in map_names) + asm.return_imm(1)
        references = tuple(MapReference(16 * n, m) for n, m in enumerate(map_names))
        function = FunctionSpec(name, FunctionKey(name, 0), code, references)
        spec.functions[function.key] = function
        spec.programs[name] = ProgramSpec(
            name,
            "cgroup_skb/egress",
            ProgType.CGROUP_SKB,
            AttachType.CGROUP_INET_EGRESS,
            function,
        )
        for map_name in map_names:
            spec.maps[map_name] = array(map_name)
    return spec


def load_one(**options):
    """Load a program that only returns."""
    options = {"type": ProgType.CGROUP_SKB, "license": "GPL", "name": "main", **options}
    return programs.load(asm.return_imm(1), **options)


def loads(kernel):
    """What each load of a program was given."""
    return [attr.prog_load for attr in kernel.given(Cmd.PROG_LOAD)]


def creations(kernel):
    """What each creation of a map was given."""
    return [attr.map_create for attr in kernel.given(Cmd.MAP_CREATE)]


@pytest.fixture
def locked_memory(monkeypatch):
    """The values of RLIMIT_MEMLOCK in the order that they are set; the real one is not touched."""
    values = [(INFINITY, INFINITY)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: values[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: values.append(new))
    return values


@pytest.fixture
def without_privileges(monkeypatch):
    """A process without capabilities."""
    monkeypatch.setattr(privileges, "effective_capabilities", lambda: 0)


def test_all_is_loaded_unless_selected(kernel):
    """Without a selection all programs and all their maps are live."""
    with loader.load(spec_of(one=["a"], two=["b"])) as loaded:
        assert list(loaded.programs) == ["one", "two"]
        assert list(loaded.maps) == ["a", "b"]


def test_only_what_is_selected_is_created(kernel):
    """A selection loads its programs, and creates the maps that they use and no others."""
    with loader.load(spec_of(one=["a", "b"], two=["b", "c"]), ["two"]) as loaded:
        assert list(loaded.programs) == ["two"]
    assert [attr.map_name for attr in creations(kernel)] == [b"b", b"c"]
    assert [attr.prog_name for attr in loads(kernel)] == [b"two"]


def test_a_map_that_no_selected_program_uses_is_not_created(kernel):
    """A map that nothing selected refers to is left out."""
    spec = spec_of(one=[])
    spec.maps["unused"] = array("unused")
    loader.load(spec, ["one"]).close()
    assert creations(kernel) == []


def test_all_maps_are_created_without_a_selection(kernel):
    """Without a selection the maps that only user space uses are there too."""
    spec = spec_of(one=[])
    spec.maps["unused"] = array("unused")
    with loader.load(spec) as loaded:
        assert list(loaded.maps) == ["unused"]


def test_what_a_map_holds_is_loaded_too(kernel):
    """A selection brings the programs of its program arrays, also those that need each other."""
    spec = spec_of(one=["tails"], two=["tails", "b"], three=["c"])
    spec.maps["tails"].type = MapType.PROG_ARRAY
    spec.maps["tails"].value_size = 4
    spec.maps["tails"].initial = {0: "two", 3: "one"}
    with loader.load(spec, ["one"]) as loaded:
        assert list(loaded.programs) == ["one", "two"]
        assert list(loaded.maps) == ["tails", "b"]
    assert len(kernel.given(Cmd.MAP_UPDATE_ELEM)) == 2


def test_a_slot_that_cannot_be_filled_closes_everything(kernel):
    """If a program cannot be put into its array, the error names both and all is closed."""
    spec = spec_of(one=["tails"])
    spec.maps["tails"].type = MapType.PROG_ARRAY
    spec.maps["tails"].initial = {9: "one"}
    spec.maps["tails"].value_size = 4
    kernel.refuse(Cmd.MAP_UPDATE_ELEM, errno.E2BIG)
    with pytest.raises(MapCreateError, match="'one' into element 9 of the map 'tails'"):
        loader.load(spec)
    assert kernel.still_open() == 0


def test_a_program_that_is_not_to_be_loaded_is_passed_over(kernel):
    """A program without autoload is loaded only when it is selected."""
    spec = spec_of(one=[], two=[])
    spec.programs["two"].autoload = False
    with loader.load(spec) as loaded:
        assert list(loaded.programs) == ["one"]
    with loader.load(spec, ["two"]) as loaded:
        assert list(loaded.programs) == ["two"]


def test_a_program_without_a_type_is_not_loaded(kernel):
    """A program whose type is not known is refused before the kernel sees it."""
    spec = spec_of(one=["a"])
    spec.programs["one"].type = ProgType.UNSPEC
    with pytest.raises(ObjectFileError, match="does not give the program type") as caught:
        loader.load(spec)
    assert (caught.value.section, caught.value.offset) == ("cgroup_skb/egress", 0)
    assert kernel.still_open() == 0


def test_a_program_has_its_flags(kernel):
    """Flags of a section, such as that of sleepable programs, go to the kernel."""
    spec = spec_of(one=[])
    spec.programs["one"].flags = 1 << 4
    loader.load(spec).close()
    assert [load.prog_flags for load in loads(kernel)] == [1 << 4]


def test_a_shared_map_is_created_once(kernel):
    """Programs that use the same map share it."""
    loader.load(spec_of(one=["a"], two=["a"])).close()
    assert len(creations(kernel)) == 1


def test_a_name_that_is_not_there_is_a_key_error(kernel):
    """A selected program that the object lacks is a KeyError, before anything is created."""
    with pytest.raises(KeyError, match="three"):
        loader.load(spec_of(one=["a"]), ["one", "three"])
    assert kernel.calls == []


def test_a_name_given_twice_leaks_nothing(kernel):
    """A program that is selected twice leaves no descriptor behind when all is closed."""
    loader.load(spec_of(one=["a"]), ["one", "one"]).close()
    assert kernel.still_open() == 0


def test_the_programs_get_what_the_spec_says(kernel):
    """A program is loaded with its type, attach type, name, license and code."""
    seen = {}

    def remember(attr):
        load = attr.prog_load
        seen["license"] = ctypes.string_at(load.license)
        seen["code"] = ctypes.string_at(load.insns, load.insn_cnt * 8)

    kernel.handlers[Cmd.PROG_LOAD] = remember
    with loader.load(spec_of(one=["a"])) as loaded:
        fd = loaded.maps["a"].fd
    (load,) = loads(kernel)
    assert (load.prog_type, load.expected_attach_type) == (8, 1)
    assert (load.log_level, load.log_size, load.log_buf) == (0, 0, 0)
    assert seen == {"license": b"GPL", "code": asm.load_map(1, fd) + asm.return_imm(1)}


def test_closing_closes_everything(kernel):
    """When the object is closed no descriptor stays open."""
    loaded = loader.load(spec_of(one=["a"], two=["b"]))
    assert kernel.still_open() == kernel.created() == 4
    loaded.close()
    loaded.close()
    assert kernel.still_open() == 0


@pytest.mark.parametrize(
    ("failing", "number"), [("two", errno.EINVAL), ("two", errno.EPERM), ("one", errno.EACCES)]
)
def test_a_program_that_fails_closes_everything(kernel, failing, number):
    """If one program is refused, all that was created before is closed."""
    kernel.refuse_if(
        Cmd.PROG_LOAD, number, lambda attr: attr.prog_load.prog_name == failing.encode()
    )
    with pytest.raises(ProgramLoadError):
        loader.load(spec_of(one=["a", "b"], two=["c"]))
    assert kernel.created() >= 3
    assert kernel.still_open() == 0


def test_a_map_that_fails_closes_everything(kernel):
    """If the last map is refused, those before it are closed, and no program is loaded."""
    kernel.refuse_if(Cmd.MAP_CREATE, errno.ENOMEM, lambda attr: attr.map_create.map_name == b"b")
    with pytest.raises(MapCreateError):
        loader.load(spec_of(one=["a", "b"]))
    assert kernel.created() == 1
    assert kernel.still_open() == 0
    assert loads(kernel) == []


@pytest.mark.parametrize("command", [Cmd.MAP_UPDATE_ELEM, Cmd.MAP_FREEZE])
def test_data_that_cannot_be_written_closes_everything(kernel, command):
    """If a data map cannot be filled or frozen, all that was created is closed."""
    spec = spec_of(one=["a", "b"])
    spec.maps["b"] = MapSpec("b", MapType.ARRAY, 4, 4, 1, contents=b"data", frozen=True)
    kernel.refuse(command, errno.EPERM)
    with pytest.raises(MapCreateError, match=f"BPF_{command.name}"):
        loader.load(spec)
    assert kernel.created() == 2
    assert kernel.still_open() == 0


def test_a_data_map_is_filled_and_then_frozen(kernel):
    """The contents are written to key 0, and only then is the map frozen."""
    spec = MapSpec("data", MapType.ARRAY, 4, 4, 1, contents=b"data", frozen=True)
    written = []

    def update(attr):
        written.append(
            (ctypes.string_at(attr.map_elem.key, 4), ctypes.string_at(attr.map_elem.value, 4))
        )

    kernel.handlers[Cmd.MAP_UPDATE_ELEM] = update
    maps.create(spec).close()
    assert written == [(bytes(4), b"data")]
    assert [c.cmd for c in kernel.calls] == [Cmd.MAP_CREATE, Cmd.MAP_UPDATE_ELEM, Cmd.MAP_FREEZE]


def test_a_kernel_that_cannot_freeze_does_not_matter(kernel):
    """Before Linux 5.2 a map cannot be frozen, and is used as it is."""
    kernel.refuse(Cmd.MAP_FREEZE, errno.EINVAL)
    maps.create(MapSpec("data", MapType.ARRAY, 4, 4, 1, contents=b"data", frozen=True)).close()


def test_an_object_for_the_other_byte_order_is_refused(kernel):
    """An object that was built for the other byte order is refused before anything is created."""
    spec = spec_of(one=["a"])
    spec.byteorder = {"little": "big", "big": "little"}[sys.byteorder]
    with pytest.raises(ObjectFileError, match=f"{spec.byteorder}-endian machines"):
        loader.load(spec)
    assert kernel.calls == []


def test_fields_that_an_older_kernel_does_not_know_are_left_out_newest_first(kernel):
    """After E2BIG the attach type is left out first, and then the name."""
    kernel.refuse(Cmd.PROG_LOAD, errno.E2BIG, errno.E2BIG, 0)
    load_one(expected_attach_type=AttachType.CGROUP_INET_EGRESS).close()
    assert [(load.expected_attach_type, load.prog_name) for load in loads(kernel)] == [
        (1, b"main"),
        (0, b"main"),
        (0, b""),
    ]


def test_an_attach_type_of_zero_is_not_left_out_again(kernel):
    """A field that is zero already is no second try."""
    kernel.refuse(Cmd.PROG_LOAD, errno.E2BIG, 0)
    load_one(expected_attach_type=AttachType.CGROUP_INET_INGRESS).close()
    assert [load.prog_name for load in loads(kernel)] == [b"main", b""]


def test_what_is_too_big_anyway_is_reported_as_such(kernel):
    """If leaving fields out does not help, the error is E2BIG."""
    kernel.refuse(Cmd.PROG_LOAD, errno.E2BIG)
    with pytest.raises(ProgramLoadError) as caught:
        load_one(expected_attach_type=AttachType.CGROUP_INET_EGRESS)
    assert caught.value.errno == errno.E2BIG


def test_another_error_without_the_fields_is_the_one_to_report(kernel):
    """If the kernel takes the shorter form and refuses the program, that refusal is reported."""
    kernel.refuse(Cmd.PROG_LOAD, errno.E2BIG, errno.EINVAL)
    with pytest.raises(ProgramLoadError) as caught:
        load_one()
    assert caught.value.errno == errno.EINVAL


def test_an_interrupted_verifier_is_tried_again(kernel):
    """EAGAIN from the verifier is tried again."""
    kernel.refuse(Cmd.PROG_LOAD, errno.EAGAIN, errno.EAGAIN, 0)
    load_one().close()
    assert len(loads(kernel)) == 3


def test_eagain_without_an_end_is_reported(kernel):
    """A verifier that is always interrupted ends in an error, not in an endless loop."""
    kernel.refuse(Cmd.PROG_LOAD, errno.EAGAIN)
    with pytest.raises(ProgramLoadError) as caught:
        load_one()
    assert caught.value.errno == errno.EAGAIN


@pytest.mark.parametrize("number", [errno.EINVAL, errno.E2BIG])
def test_a_map_is_created_without_a_name_where_there_are_none(kernel, number):
    """A kernel before 4.15, which refuses names, gets the map without one."""
    kernel.refuse_if(Cmd.MAP_CREATE, number, lambda attr: attr.map_create.map_name)
    maps.create(array("counts")).close()
    assert [attr.map_name for attr in creations(kernel)] == [b"counts", b""]


def test_the_first_error_of_a_map_is_the_one_to_report(kernel):
    """If a map is refused without its name as well, the first refusal is reported."""
    kernel.refuse(Cmd.MAP_CREATE, errno.EINVAL, errno.ENOMEM)
    with pytest.raises(MapCreateError, match="counts") as caught:
        maps.create(array("counts"))
    assert caught.value.errno == errno.EINVAL
    assert caught.value.__cause__.errno == errno.EINVAL


def test_a_map_that_is_refused_is_described(kernel):
    """The error for a map has what was asked for."""
    kernel.refuse(Cmd.MAP_CREATE, errno.ENOMEM)
    with pytest.raises(MapCreateError, match="key 4 bytes, value 8 bytes, 2 entries"):
        maps.create(array("counts"))
    assert len(creations(kernel)) == 1


def test_eperm_raises_the_limit_on_locked_memory(kernel, locked_memory):
    """After EPERM the limit is raised for one more try, and put back."""
    locked_memory.append((65536, 65536))
    kernel.refuse(Cmd.MAP_CREATE, errno.EPERM, 0)
    maps.create(array("counts")).close()
    assert locked_memory[1:] == [(65536, 65536), (INFINITY, INFINITY), (65536, 65536)]
    assert len(creations(kernel)) == 2


def test_the_limit_is_put_back_after_a_failure_too(kernel, locked_memory):
    """If the second try fails as well, the limit is put back."""
    locked_memory.append((65536, 131072))
    kernel.refuse(Cmd.PROG_LOAD, errno.EPERM)
    with pytest.raises(ProgramLoadError):
        load_one()
    assert locked_memory[-1] == (65536, 131072)
    assert (INFINITY, INFINITY) in locked_memory[2:]


def test_no_limit_on_locked_memory_is_not_raised(kernel, locked_memory):
    """Where locked memory has no limit, EPERM is not about it, and is not tried again."""
    kernel.refuse(Cmd.MAP_CREATE, errno.EPERM)
    with pytest.raises(MapCreateError):
        maps.create(array("counts"))
    assert len(creations(kernel)) == 1
    assert len(locked_memory) == 1


def test_eacces_does_not_raise_the_limit(kernel, locked_memory):
    """EACCES is a PermissionError too, but has nothing to do with locked memory."""
    locked_memory.append((65536, 65536))
    kernel.refuse(Cmd.MAP_CREATE, errno.EACCES)
    with pytest.raises(MapCreateError):
        maps.create(array("counts"))
    assert len(locked_memory) == 2


def test_without_the_privilege_the_limit_is_raised_to_the_hard_one(
    kernel, locked_memory, monkeypatch
):
    """Where only the soft limit may be raised, it is raised as far as it goes."""
    locked_memory.append((65536, 1 << 30))

    def only_soft(_, new):
        if new[1] > 1 << 30 or new[1] == INFINITY:
            raise ValueError("not allowed to raise maximum limit")
        locked_memory.append(new)

    monkeypatch.setattr(resource, "setrlimit", only_soft)
    kernel.refuse(Cmd.MAP_CREATE, errno.EPERM, 0)
    maps.create(array("counts")).close()
    assert locked_memory[2:] == [(1 << 30, 1 << 30), (65536, 1 << 30)]


@pytest.mark.parametrize("refusal", [ValueError("not allowed"), PermissionError(1, "not allowed")])
def test_a_limit_that_cannot_be_raised_leaves_the_first_error(
    kernel, locked_memory, monkeypatch, refusal
):
    """Where no limit may be changed, the kernel's own refusal is what is reported."""
    locked_memory.append((65536, 65536))

    def refuse(*_):
        raise refusal

    monkeypatch.setattr(resource, "setrlimit", refuse)
    kernel.refuse(Cmd.MAP_CREATE, errno.EPERM)
    with pytest.raises(MapCreateError) as caught:
        maps.create(array("counts"))
    assert caught.value.errno == errno.EPERM
    assert len(creations(kernel)) == 1


def verifier(kernel, log, *, number=errno.EACCES, needed=0):
    """A verifier that rejects; with a log buffer too small for ``needed`` bytes it says ENOSPC."""

    def reject(attr):
        load = attr.prog_load
        error = number
        if load.log_level:
            text = log.encode()[: load.log_size - 1] + b"\0"
            ctypes.memmove(load.log_buf, text, len(text))
            if load.log_size < needed:
                error = errno.ENOSPC
        raise OSError(error, "refused", "BPF_PROG_LOAD")

    kernel.handlers[Cmd.PROG_LOAD] = reject


LOG = """\
0: (b7) r0 = 5
1: (95) exit
At program exit the register R0 has value (0x5; 0x0) should have been in (0x0; 0x1)
processed 2 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
REASON = "At program exit the register R0 has value (0x5; 0x0) should have been in (0x0; 0x1)"


def test_a_verifier_error_has_the_reason_and_the_log(kernel):
    """A rejection tells the line that gives the reason, and keeps the whole log."""
    verifier(kernel, LOG)
    with pytest.raises(VerifierError) as caught:
        load_one()
    error = caught.value
    assert (error.reason, error.log, error.errno) == (REASON, LOG, errno.EACCES)
    assert REASON in str(error)
    assert "'main'" in str(error)
    assert "EACCES" in str(error)


def test_a_rejection_is_not_blamed_on_privileges(kernel, without_privileges):
    """A verifier's EACCES never tells the user to run as root."""
    verifier(kernel, LOG)
    with pytest.raises(VerifierError) as caught:
        load_one()
    assert "root" not in str(caught.value)
    assert not isinstance(caught.value, OSError)


def test_the_log_is_asked_for_only_after_a_refusal(kernel):
    """The first try has no log buffer, the second has."""
    verifier(kernel, LOG)
    with pytest.raises(VerifierError):
        load_one()
    assert [load.log_level for load in loads(kernel)] == [0, 1]


def test_the_log_grows_until_it_fits(kernel):
    """A log buffer that is too small (ENOSPC) is made larger, and the whole log is kept."""
    log = "x" * 300_000 + "\nthe reason\nprocessed 9 insns\n"
    verifier(kernel, log, needed=300_100)
    with pytest.raises(VerifierError) as caught:
        load_one()
    assert caught.value.log == log
    assert caught.value.reason == "the reason"
    assert caught.value.errno == errno.EACCES
    sizes = [load.log_size for load in loads(kernel)]
    assert sizes == sorted(set(sizes))


def test_a_log_that_never_fits_ends(kernel):
    """A log that is larger than any buffer is cut, and the rejection is reported all the same."""
    verifier(kernel, LOG, needed=1 << 30)
    with pytest.raises(VerifierError) as caught:
        load_one()
    assert caught.value.errno == errno.EACCES
    assert max(load.log_size for load in loads(kernel)) < 1 << 24


def test_a_refusal_that_passes_is_not_blamed_on_the_verifier(kernel):
    """Where the program is accepted when the log is asked for, its log is no rejection."""

    def once(attr):
        if not attr.prog_load.log_level:
            raise OSError(errno.ENOMEM, "Cannot allocate memory", "BPF_PROG_LOAD")
        text = b"processed 2 insns (limit 1000000)\n\0"
        ctypes.memmove(attr.prog_load.log_buf, text, len(text))

    kernel.handlers[Cmd.PROG_LOAD] = once
    with pytest.raises(ProgramLoadError) as caught:
        load_one()
    assert not isinstance(caught.value, VerifierError)
    assert caught.value.errno == errno.ENOMEM
    assert kernel.still_open() == 0


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (LOG, REASON),
        ("", ""),
        ("processed 2 insns\n", ""),
        ("the reason\n\n", "the reason"),
        ("first\nsecond\nverification time 9 usec\nstack depth 8\nprocessed 1 insns\n", "second"),
    ],
)
def test_the_telling_line_is_the_last_before_the_statistics(log, line):
    """The reason is the last line of a log that is not statistics."""
    assert programs.telling_line(log) == line


@pytest.mark.parametrize(
    ("create", "missing"),
    [
        (load_one, "CAP_BPF and CAP_NET_ADMIN;"),
        (lambda: maps.create(array("counts")), "CAP_BPF;"),
    ],
)
def test_eperm_names_the_capabilities_that_are_missing(kernel, without_privileges, create, missing):
    """A process without capabilities learns which ones it needs, for this very object."""
    kernel.refuse(Cmd.PROG_LOAD, errno.EPERM)
    kernel.refuse(Cmd.MAP_CREATE, errno.EPERM)
    with pytest.raises((ProgramLoadError, MapCreateError), match=f"lacks {missing}"):
        create()


@pytest.mark.parametrize("create", [load_one, lambda: maps.create(array("counts"))])
def test_enosys_names_the_kernels_option(kernel, create):
    """A kernel without bpf(2) is named as such, with the option that it was built without."""
    kernel.refuse(Cmd.PROG_LOAD, errno.ENOSYS)
    kernel.refuse(Cmd.MAP_CREATE, errno.ENOSYS)
    with pytest.raises((ProgramLoadError, MapCreateError), match="CONFIG_BPF_SYSCALL"):
        create()


def test_program_info_is_what_the_kernel_writes(kernel):
    """The kernel's record of a program becomes plain values."""
    from pybpfthrottle.bpf import abi

    def info(attr):
        found = abi.ProgInfo.from_address(attr.info.info)
        assert attr.info.info_len == ctypes.sizeof(found)
        found.id, found.type, found.name, found.load_time = 7, 8, b"main", 99
        found.tag[:] = bytes(range(8))

    kernel.handlers[Cmd.OBJ_GET_INFO_BY_FD] = info
    assert program_info(3) == ProgramInfo(7, "main", 8, "0001020304050607", 99, 0)


def test_info_by_id_closes_its_descriptor(kernel):
    """Looking a program up by its id leaves no descriptor open."""
    kernel.handlers[Cmd.PROG_GET_FD_BY_ID] = lambda attr: kernel.create()
    programs.info_by_id(7)
    assert kernel.created() == 1
    assert kernel.still_open() == 0


def test_the_types_of_an_object_are_parsed_once(kernel, monkeypatch):
    """Reading an object parses its types, and loading it takes these: also a second time."""
    parsed = []
    parse = Btf.__init__
    monkeypatch.setattr(
        Btf, "__init__", lambda self, data, **more: parsed.append(data) or parse(self, data, **more)
    )
    spec = elf.read_object(compiled("object_data"))
    assert len(parsed) == 1
    for _ in range(2):
        loader.load(spec).close()
    assert len(kernel.given(Cmd.BTF_LOAD)) == 2
    assert parsed == [bytes(spec.btf)]


def test_the_same_bytes_are_the_same_spec():
    """Two readings of an object are equal, with their types, and another object is not."""
    data = compiled("object_data")
    assert elf.read_object(data) == elf.read_object(data)
    other = elf.read_object(data)
    other.btf = elf.read_object(compiled("object_maps")).btf
    assert elf.read_object(data) != other


def test_a_path_and_bytes_are_loaded_as_well(kernel, tmp_path):
    """What is loaded may be a spec, the path of an object file, or its bytes."""
    data = compiled("object_data")
    path = tmp_path / "object_data.bpf.o"
    path.write_bytes(data)
    for source in (elf.read_object(data), data, path, str(path)):
        with loader.load(source) as loaded:
            assert list(loaded.programs) == list(elf.read_object(data).programs)


def test_a_path_that_is_no_object_is_named(kernel, tmp_path):
    """The path stands in front of what is wrong with the file."""
    path = tmp_path / "text.o"
    path.write_text("no object")
    with pytest.raises(ObjectFileError, match=str(path)):
        loader.load(path)
    with pytest.raises(FileNotFoundError):
        loader.load(tmp_path / "missing.o")


def boast(monkeypatch, release):
    """Have this machine say that its kernel is of a release."""
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "here", release, "", "x86")))


@pytest.mark.parametrize(
    ("fixture", "select", "release", "newer"),
    [
        ("object_data", "adds", "4.14.0", "data sections (.data, .rodata, .bss) (Linux 5.2)"),
        (
            "object_calls",
            "calls_static",
            "4.14",
            "calls of the object's own functions",
        ),
        ("object_callbacks", "calls_back", "5.10.0-46-amd64", "callbacks (Linux 5.13)"),
        ("object_callbacks", "calls_back", "6.12", ""),
        ("object_callbacks", "calls_back", "unheard of", ""),
    ],
)
def test_what_the_kernel_is_too_old_for(kernel, monkeypatch, fixture, select, release, newer):
    """A refusal that may be an old kernel's has what the selected programs need of newer ones."""
    spec = elf.read_object(compiled(fixture))
    boast(monkeypatch, release)
    kernel.refuse(Cmd.PROG_LOAD, errno.EINVAL)
    kernel.refuse(Cmd.MAP_CREATE, errno.EINVAL)
    with pytest.raises((MapCreateError, ProgramLoadError)) as caught:
        loader.load(spec, [select])
    told = str(caught.value).partition(f"; this kernel ({release}) is too old for: ")[2]
    assert newer in told
    assert bool(told) == bool(newer)


def test_a_refusal_for_want_of_rights_is_not_the_kernels_age(kernel, monkeypatch):
    """EPERM has nothing to do with what a kernel knows."""
    spec = elf.read_object(compiled("object_calls"))
    boast(monkeypatch, "4.14.0")
    kernel.refuse(Cmd.PROG_LOAD, errno.EPERM)
    with pytest.raises(ProgramLoadError) as caught:
        loader.load(spec, list(spec.programs)[:1])
    assert "newer" not in str(caught.value)
