from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from elf_builder import ObjectBuilder
from fake_kernel import FakeKernel
from hypothesis import settings
from since import needs_command

from pybpfthrottle.bpf import features, syscall
from pybpfthrottle.bpf.obj import elf

FIXTURES = Path(__file__).parent / "fixtures"

# How long an example takes says nothing on a machine that does other work too.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture
def kernel(monkeypatch):
    """A fake kernel in place of the real one."""
    fake = FakeKernel()
    monkeypatch.setattr(syscall, "bpf", fake)
    features.forget()
    yield fake
    features.forget()
    fake.close_all()


@pytest.fixture(params=["little", "big"])
def builder(request):
    """An empty object of either byte order."""
    return ObjectBuilder(request.param)


@pytest.fixture(params=["bpfel", "bpfeb"])
def compile_fixture(request, tmp_path):
    """Compiles a file of fixtures/ for either byte order, and reads the object."""
    needs_command("clang-14")

    def compiled(name, *flags):
        out = tmp_path / f"{name}.o"
        command = ["clang-14", "-target", request.param, "-mcpu=v1", "-O2", "-Wall", "-Werror"]
        source = str(FIXTURES / f"{name}.c")
        subprocess.run([*command, *(flags or ("-g",)), "-c", source, "-o", str(out)], check=True)
        return elf.read_file(out)

    return compiled
