from __future__ import annotations

import gzip

import pytest
from elf_builder import ObjectBuilder
from made_types import SplitTypes, Types

from pybpfthrottle.bpf import running
from pybpfthrottle.bpf.errors import ExternError
from pybpfthrottle.bpf.obj.btf import Kind
from pybpfthrottle.bpf.running import RunningKernel


@pytest.mark.parametrize(
    ("release", "code"),
    [
        ("6.18.44-fc-v595", 0x06122C),
        ("5.4.0-42-generic", 0x050400),
        ("4.14.336", 0x040EFF),
        ("7.2-rc1", 0x070200),
        ("6.1", 0x060100),
    ],
)
def test_releases_are_numbers(release, code):
    """A release counts as in LINUX_VERSION_CODE, its last part no further than 255."""
    assert running.version_code(release) == code


def test_a_configuration_may_be_compressed(tmp_path):
    """A configuration is read compressed or plain; what is not set is not in it."""
    text = b'CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="x y"\n'
    plain, compressed = tmp_path / "plain", tmp_path / "compressed"
    plain.write_bytes(text)
    compressed.write_bytes(gzip.compress(text))
    for path in (plain, compressed):
        kernel = RunningKernel(config_path=str(path))
        assert kernel.settings == {"CONFIG_A": "y", "CONFIG_C": '"x y"'}


def test_modules_are_read_by_their_names(tmp_path):
    """Each file beside the kernel's types has those of the module of this name."""
    kernel = Types()
    kernel.struct("shared", 4)
    module = SplitTypes(kernel.btf())
    module.struct("own", 8)
    (tmp_path / "vmlinux").write_bytes(kernel.build())
    (tmp_path / "some_module").write_bytes(module.build())
    types = RunningKernel(directory=str(tmp_path)).types
    (found,) = types.modules()
    assert found.name == "some_module"
    assert found.find(Kind.STRUCT, "own").id == 2


def test_symbols_that_may_not_be_seen_are_told():
    """Addresses of zero are no addresses, and the remedy is named."""
    kernel = RunningKernel()
    kernel.__dict__["_kallsyms"] = b"0000 T hidden\n0001 t twice\n0002 t twice\t[module]\n"
    with pytest.raises(ExternError, match="kptr_restrict"):
        kernel.symbol("hidden")
    with pytest.raises(ExternError, match="2 symbols"):
        kernel.symbol("twice")
    assert kernel.symbol("idden") is None


def test_a_modules_broken_types_are_passed_over(tmp_path):
    """A module whose types cannot be read does not keep those of the others from being found."""
    kernel = Types()
    kernel.struct("shared", 4)
    module = SplitTypes(kernel.btf())
    module.struct("own", 8)
    (tmp_path / "vmlinux").write_bytes(kernel.build())
    (tmp_path / "broken").write_bytes(module.build()[:-20])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "some_module").write_bytes(module.build())
    types = RunningKernel(directory=str(tmp_path)).types
    assert [found.name for found in types.modules()] == ["some_module"]


def test_core_has_types_of_its_own(tmp_path):
    """Types for CO-RE from a file leave the kernel's own as they are, modules included."""
    own, other = Types(), Types()
    own.struct("own", 4)
    other.struct("other", 4)
    (tmp_path / "vmlinux").write_bytes(own.build())
    given = tmp_path / "given.btf"
    given.write_bytes(other.build())
    kernel = RunningKernel(types_path=str(given), directory=str(tmp_path))
    assert kernel.types.types.find(Kind.STRUCT, "own")
    assert kernel.core_types.types.find(Kind.STRUCT, "other")
    assert list(kernel.core_types.modules()) == []


def test_the_kernels_own_types_may_be_an_elf_file(monkeypatch, tmp_path):
    """Who lacks types mounts what there is over the kernel's file, and that may be a vmlinux."""
    own = Types()
    own.struct("own", 4)
    elf = ObjectBuilder()
    elf.section(".BTF", own.build())
    (tmp_path / "vmlinux").write_bytes(elf.build())
    monkeypatch.setattr(running, "BTF_DIRECTORY", str(tmp_path))
    running.forget_types()
    try:
        assert RunningKernel(directory=str(tmp_path)).types.types.find(Kind.STRUCT, "own")
    finally:
        running.forget_types()
