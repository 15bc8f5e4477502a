"""pybpfthrottle bpf compile and bpf stubs: from a source in C to typed Python, by clang alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from compiled import CLANG, FIXTURES, compiled
from since import needs_command, since

from pybpfthrottle.bpf import compiling, loader
from pybpfthrottle.bpf.running import RunningKernel
from pybpfthrottle.cli.commands.bare import cli
from pybpfthrottle.errors import CompileError, ExternError

SOURCE = FIXTURES / "with_headers.src.c"


@pytest.fixture(autouse=True)
def clang(monkeypatch):
    """The compiler that the other tests use."""
    monkeypatch.setenv("CLANG", needs_command(CLANG))


def run(*arguments):
    """The result of a command."""
    return CliRunner().invoke(cli, ["bpf", *map(str, arguments)])


def test_a_source_is_compiled_with_our_headers(tmp_path):
    """CO-RE, maps and helper functions work with no header but those that come along."""
    built, headers = tmp_path / "built.o", tmp_path / "headers"
    arguments = ("-o", built, "-D", "VALUE=77", "--headers", headers)
    assert run("compile", SOURCE, *arguments).output == f"{built}\n"
    with loader.load(str(built), ["enter", "newtask", "counts_ports"]) as loaded:
        loaded.programs["enter"].test_run()
        values = {name: variable.get() for name, variable in loaded.variables.items()}
        assert (values["parent"], values["known"]) == (os.getppid(), 7)
        assert loaded.programs["counts_ports"].test_run(bytes(64)).retval == 0
        assert dict(loaded.maps["counts"].typed(int, int)) == {77: 1}
    assert (headers / "vmlinux.h").stat().st_size > 1 << 20
    # The header is there now, and not made again.
    compiling.write_vmlinux(str(headers), RunningKernel(directory="/nowhere"))


def test_the_compilers_own_words_are_shown(tmp_path):
    """A mistake in the source is told as clang tells it, with one line of ours."""
    broken = tmp_path / "broken.bpf.c"
    broken.write_text("int wrong(void) { return nowhere; }\n")
    done = run("compile", broken)
    assert "broken.bpf.c:1:" in done.stderr
    assert "undeclared identifier 'nowhere'" in done.stderr
    assert isinstance(done.exception, CompileError)
    assert str(done.exception) == f"clang cannot compile {broken}"
    assert not (tmp_path / "broken.bpf.o").exists()


def test_a_missing_compiler_is_told(monkeypatch):
    """Without clang the error says what to install."""
    monkeypatch.setenv("CLANG", "no-such-clang")
    with pytest.raises(CompileError, match=r"no no-such-clang.*apt-get install clang"):
        compiling.compile_object(str(SOURCE))


def test_a_kernel_without_types_is_told_where_they_are_needed(tmp_path):
    """vmlinux.h needs the kernel's types; a source without it does not."""
    kernel = RunningKernel(directory=str(tmp_path))
    with pytest.raises(ExternError, match="CONFIG_DEBUG_INFO_BTF"):
        compiling.compile_object(str(SOURCE), str(tmp_path / "a.o"), kernel=kernel)
    plain = tmp_path / "plain.bpf.c"
    plain.write_text(
        '#include <bpf/bpf_helpers.h>\nSEC("tc") int f(void *context)\n{ return 0; }\n'
    )
    assert compiling.compile_object(str(plain), kernel=kernel) == str(tmp_path / "plain.bpf.o")


USE = """\
import flows
import values

with flows.load() as loaded:
    flow: flows.Flow = loaded.maps.flows[0]
    seen: int = loaded.variables.seen.get()
    loaded.variables.seen.set(flow.packets + seen)
    loaded.programs.count.pin("/nowhere")
    per_cpu: list[values.Inner] = values.load().maps.per_cpu[0]
"""
MISUSE = """\
import flows

loaded = flows.load()
loaded.maps.flows[0].misspelt
loaded.maps.misspelt
loaded.variables.seen.set("text")
loaded.maps.flows["text"] = flows.Flow(packets="text")
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules and stubs of objects, and the objects beside them."""
    monkeypatch.chdir(tmp_path)
    for name in ("flows", "values", "object_data", "object_maps", "object_templates"):
        (tmp_path / f"{name}.o").write_bytes(compiled(name))
        done = run("stubs", f"{name}.o")
        assert done.exit_code == 0
        (tmp_path / f"{name}.py").write_text(done.stdout)
    return tmp_path


def check(directory, *files):
    """What mypy says of files, as strict as it is with this package, whose cache it shares."""
    root = FIXTURES.parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", "setup.cfg"]
    command += [str(directory / name) for name in files]
    environment = {**os.environ, "MYPYPATH": f"{root}:{directory}"}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    return done.stdout


def test_type_checkers_know_what_is_in_an_object(modules):
    """Mypy --strict accepts the modules and what uses them, and finds each mistake."""
    (modules / "use.py").write_text(USE)
    # What is in the checker's cache from an earlier run has that run's directory.
    (modules / "misuse.py").write_text(f"{MISUSE}# {modules}\n")
    told = check(modules, *sorted(path.name for path in modules.glob("*.py")))
    wrong = {line.partition(": error")[0] for line in told.splitlines()[:-1]}
    assert wrong == {f"{modules}/misuse.py:{line}" for line in (4, 5, 6, 7)}
    (modules / "flows.py").rename(modules / "flows.pyi")
    assert "Success" in check(modules, "use.py", "flows.pyi")


def load_module(path):
    """A module of a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def imported(modules):
    """The modules of two objects, imported."""
    yield load_module(modules / "flows.py"), load_module(modules / "values.py")
    for name in ("flows", "values"):
        del sys.modules[name]


def test_a_module_has_the_objects_own_types(imported):
    """Maps, programs and variables of a module work with dataclasses, enums and texts."""
    flows, values = imported
    with flows.load() as loaded:
        assert loaded.programs.count.test_run(bytes(214)).retval == 1
        assert loaded.maps.flows[0] == flows.Flow(packets=1, bytes=200)
        assert loaded.variables.seen.get() == 1
        loaded.variables.seen.set(7)
        assert loaded.variables.seen.get() == 7
    with values.load() as loaded:
        value = values.Value(
            packets=7,
            delta=-3,
            flag=True,
            name="a name",
            raw=[1, 2, 3],
            state=values.State.BUSY,
            thirty=1 << 29,
            minus=-2,
            nameless=9,
            either=values.ValueEither(word=0x01020304),
            list_=[values.Inner(1, 2), values.Inner(3, 4)],
        )
        loaded.maps.values[values.Key(1, 2)] = value
        ((key, found),) = loaded.maps.values.items()
        assert key == values.Key(1, 2)
        assert found.either.bytes == [4, 3, 2, 1]
        found.either.bytes = []
        assert found == value
        assert found.state is values.State.BUSY
        assert loaded.maps.per_cpu[1][0] == values.Inner()


def test_a_type_that_no_map_has_can_be_asked_for(modules):
    """--type adds a struct, and names what to do where the compiler has left it out."""
    done = run("stubs", "flows.o", "--type", "flow")
    assert "TYPES = ['flow']" in done.stdout
    missing = run("stubs", "flows.o", "--type", "report")
    assert "struct report *unused_report;" in str(missing.exception)


@since("5.2")
def test_only_what_was_loaded_is_there(imported):
    """Programs and maps that a selection leaves out are missing, not empty."""
    flows, _ = imported
    with flows.load(select=["who"]) as loaded:
        assert repr(loaded.programs) == "<Programs who>"
        with pytest.raises(AttributeError, match="flows"):
            print(loaded.maps.flows)
