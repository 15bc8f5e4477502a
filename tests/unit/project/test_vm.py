"""What tools/vmtest makes of kernels, packages and results; booting takes too long for a test."""

from __future__ import annotations

import lzma
import os
import runpy
import stat
import sys
from pathlib import Path

import pytest
from vm import VmError, kernels, page, suite
from vm.archive import Archive
from vm.machine import Machine, Run
from vm.userland import Python, Userland

ROOT = Path(__file__).resolve().parents[3]
XML = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite>
<testcase classname="tests.kernel.limiter.test_throttle" name="test_a" time="1" />
<testcase classname="tests.kernel.limiter.test_throttle" name="test_b" time="1">{b}</testcase>
<testcase classname="tests.kernel.bpf.test_arena" name="test_c[x]" time="0">
<skipped type="pytest.skip" message="needs Linux 6.9">conftest.py:1: needs Linux 6.9</skipped>
</testcase></testsuite></testsuites>"""
AGAIN = """<testsuites><testsuite>
<testcase classname="tests.kernel.limiter.test_throttle" name="test_b" time="1" />
</testsuite></testsuites>"""
FAILED = XML.format(b='<failure message="no">no</failure>')


def entries(data: bytes) -> dict[str, tuple[int, bytes]]:
    """The modes and contents of a cpio archive."""
    found, at = {}, 0
    while True:
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        begin = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], data[begin : begin + fields[6]])
        at = (begin + fields[6] + 3) // 4 * 4


def report(*xml: str, status: int = 0, name: str = "6.12", shown: str = "") -> suite.Report:
    """The report on a machine that has said this."""
    said = f"{suite.STARTED} on Linux 6.12.1-cloud, Python 3.11.7 of 64 bits\n{shown}\n"
    output = said + "".join(f"vmtest: results\n{one}" for one in xml)
    machine = Machine(name, "x86_64", Path("k"), Path("i"))
    return suite.report(Run(machine, f"{suite.FINISHED} {status}\n", output, 4.2, 60.4), 1800)


def test_a_tree_becomes_files_and_links(tmp_path):
    """Directories come before what is in them; a link to a directory stays a link."""
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/share").mkdir()
    (tmp_path / "usr/share/doc").write_text("not wanted")
    (tmp_path / "usr/lib/libc.so").write_bytes(b"ELF")
    (tmp_path / "lib").symlink_to("usr/lib")
    archive = Archive()
    archive.tree(tmp_path, lambda path: path != "/usr/share")
    found = entries(archive.finish())
    assert found["lib"] == (stat.S_IFLNK | 0o777, b"usr/lib")
    assert found["usr/lib/libc.so"][1] == b"ELF"
    assert [name for name in found if name.startswith("usr")] == [
        *("usr", "usr/lib", "usr/lib/libc.so")
    ]


def test_modules_come_after_what_they_depend_on(tmp_path):
    """The order is that of depmod; what is not there is built in."""
    (tmp_path / "net").mkdir()
    needs_core = b"\0depends=nf-core,absent\0"
    (tmp_path / "net/nf_tables.ko.xz").write_bytes(lzma.compress(needs_core))
    (tmp_path / "nf_core.ko").write_bytes(b"\0depends=\0")
    kernel = kernels.Kernel("k", "x86_64", tmp_path / "vmlinuz", tmp_path)
    found = entries(kernels.modules(kernel, ["nf_tables", "built_in"]))
    assert found["modules/order"][1] == b"nf_core\nnf_tables"
    assert found["modules/nf_tables"][1] == needs_core


def test_a_kernel_that_is_given(tmp_path):
    """Its name tells its release, its first bytes the processor; the configuration lies beside."""
    image = tmp_path / "vmlinuz-5.4.1"
    image.write_bytes(bytes(56) + b"ARM\x64" + bytes(9))
    (tmp_path / "config-5.4.1").write_text("CONFIG_BPF=y\n")
    kernel = kernels.given(image, None)
    assert (kernel.name, kernel.arch, kernel.config) == (
        *("5.4.1", "aarch64"),
        tmp_path / "config-5.4.1",
    )
    assert "boot/config-5.4.1" in entries(kernels.modules(kernel, ["veth"]))
    image.write_bytes(b"MZ")
    assert kernels.given(image, None).arch == "x86_64"


@pytest.mark.parametrize(
    ("image", "modules", "message"),
    [
        ("absent", None, "cannot read the kernel .*: No such file"),
        ("vmlinuz", ".", r"there are no modules \(\*\.ko\) below"),
    ],
)
def test_what_is_no_kernel(tmp_path, image, modules, message):
    """It is said at once, not after a machine that does not boot."""
    (tmp_path / "vmlinuz").write_bytes(b"MZ")
    with pytest.raises(VmError, match=message):
        kernels.given(tmp_path / image, modules and tmp_path / modules)


@pytest.mark.parametrize(
    ("text", "kernel", "python"),
    [
        ("3.9", "x86_64", ("3.9", "amd64")),
        ("3.13/i386", "x86_64", ("3.13", "i386")),
        ("3.13", "aarch64", ("3.13", "arm64")),
    ],
)
def test_a_python_is_of_the_kernel_s_processor(text, kernel, python):
    """Unless one of 32 bits is asked for."""
    assert Python.parse(text, kernel) == python


@pytest.mark.parametrize(
    ("text", "kernel"), [("2.7", "x86_64"), ("3.13/arm64", "x86_64"), ("3.9/i386", "aarch64")]
)
def test_a_python_that_cannot_run_there(text, kernel):
    """The error says which can."""
    with pytest.raises(VmError, match=r"choose from 3\.9, 3\.11, 3\.13"):
        Python.parse(text, kernel)


@pytest.mark.parametrize("tests", [True, False])
def test_a_machine_runs_tests_or_a_script(tests):
    """With its arguments as they were given."""
    land = Userland(Archive(), "/usr/bin/python3", "/bin", "/packages")
    text = suite.init(land, "x86_64", ["tools/bench", "a b"], tests=tests)
    assert b"set -- tools/bench 'a b'" in text
    assert (b"-m pytest" in text) == tests


def test_results_are_counted_by_area():
    """The file of a test tells which part of the product it is of."""
    found = report(FAILED, status=1)
    assert not found.is_good
    assert [found.count(verdict, "limiter") for verdict in ("passed", "failed")] == [1, 1]
    assert found.count("skipped", "toolkit") == found.count("skipped") == 1
    assert found.running() == ("6.12.1-cloud", "3.11.7 of 64 bits")


def test_what_a_test_did_when_repeated_counts():
    """And it is said that it had to be repeated."""
    found = report(FAILED, AGAIN, shown="The tests that failed, once more:")
    assert found.verdict == "passed, some only when repeated"
    assert (found.count("passed"), found.count("failed")) == (2, 0)


def test_a_machine_that_did_not_finish_has_failed(capsys):
    """Half of the results are none, and the console's last lines are shown."""
    machine = Machine("6.12", "x86_64", Path("k"), Path("i"))
    found = suite.report(Run(machine, "Oops\n", f"vmtest: results\n{XML[:200]}", 3.0, 9.0), 9)
    assert found.verdict.startswith("DID NOT FINISH")
    assert (found.is_good, found.outcomes) == (False, ())
    assert "Oops" in capsys.readouterr().err


def test_a_page_is_updated_row_by_row(tmp_path):
    """What was not tested now keeps its figures."""
    path = tmp_path / "kernels.md"
    path.write_text(f"# Kernels\n\n{page.BEGIN}\n{page.END}\n\nThe end.\n")
    page.update(path, [report(FAILED, status=1), report(AGAIN, name="5.10")])
    assert "| 1 passed, **1 failed** |" in path.read_text()
    assert "| needs Linux 6.9 | 1 |  |" in path.read_text()
    page.update(path, [report(AGAIN)])
    text = path.read_text()
    assert "failed" not in text
    assert (
        "| 6.12.1-cloud | x86_64 | 3.11.7 of 64 bits | 1 passed |  | 0 passed, 1 skipped |" in text
    )
    assert text.startswith("# Kernels\n\n<!-- made")
    assert text.endswith(f"{page.END}\n\nThe end.\n")
    assert text == page.written(text, page.load(tmp_path / "kernels.json"))


def test_a_page_without_a_place_is_refused(tmp_path):
    """Nothing is written."""
    path = tmp_path / "page.md"
    path.write_text("# Kernels\n")
    with pytest.raises(VmError, match="has no lines"):
        page.update(path, [report(AGAIN)])
    assert os.listdir(tmp_path) == ["page.md"]


def test_the_page_of_the_documentation_is_what_was_measured():
    """Nobody has changed its tables by hand, or the way they are made without making them anew."""
    path = ROOT / "docs/kernels.md"
    assert path.read_text() == page.written(path.read_text(), page.load(path.with_suffix(".json")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["4.4"], "unknown kernel 4.4; choose from 5.10"),
        (["--modules", "/lib"], "--modules are those of --kernel"),
        (["--all", "6.12"], "--all says which kernels"),
        (["--all", "--area", "toolkit"], "--area chooses tests"),
        (["--matrix", "/nowhere/page.md"], "/nowhere/page.md does not exist"),
        (["--matrix", __file__, "-k", "x"], "--matrix is of whole areas"),
        (["--matrix", __file__, "--tests", "tests/unit"], "--matrix is of whole areas"),
        (["--tests", "tests/absent.py"], "tests/absent.py does not exist"),
        (["6.12", "--run", "tools/absent"], "--run needs a script of this checkout"),
        (["--area", "toolkit", "--run", "tools/bench", "cost"], "--run runs no tests"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, monkeypatch, capsys):
    """Before anything is downloaded."""
    monkeypatch.setattr(sys, "argv", ["vmtest", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools/vmtest"), run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_failed_for_good_is_told_last():
    """Of a test that was repeated, what became of it then; of one that passed then, nothing."""
    first = "FAILED tests/a.py::one - it\nFAILED tests/a.py::two - is\n"
    again = "The tests that failed, once more:\nERROR tests/a.py::two - not\n1 passed, 1 error\n"
    assert report(XML, AGAIN, status=1, shown=first + again).failures() == [
        "ERROR tests/a.py::two - not"
    ]
