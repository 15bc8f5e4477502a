"""tools/build_zipapp: one file that limits on a bare Python, wherever it is started."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = ("run", "-q", "--download-limit", "1M", "--upload-limit", "1M", "--")
# As in a rescue image: nothing of the caller's, no packages, nothing is written.
BARE = [*("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C", "PYTHONOPTIMIZE=2")]
# What a small Python is built without, and what a small system has no use for.
MISSING = (
    *("_ssl", "_hashlib", "_sqlite3", "_curses", "readline", "_bz2", "_lzma", "_uuid", "_dbm"),
    *("_tkinter", "_asyncio", "_multiprocessing", "_decimal", "_elementtree", "ctypes.util"),
)
WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
import runpy
sys.argv[:] = {arguments!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def build():
    """The program that builds it, as a module."""
    path = str(ROOT / "tools" / "build_zipapp")
    loader = importlib.machinery.SourceFileLoader("build_zipapp", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def files(build):
    """What is in it."""
    little = sys.byteorder == "little"
    return dict([*build.own_files(big_endian=not little), *build.packages()])


@pytest.fixture(scope="session")
def archive(build, files, tmp_path_factory):
    """The file."""
    path = tmp_path_factory.mktemp("zipapp") / "pybpfthrottle.pyz"
    path.write_bytes(build.archive(files, zipfile.ZIP_DEFLATED))
    path.chmod(0o755)
    return path


def test_it_is_small(archive):
    """It fits onto what is left of a floppy disk."""
    assert archive.stat().st_size <= 1_500_000


def test_the_same_files_give_the_same_bytes(build, files, archive):
    """Neither the time nor the order in which files were found matters."""
    again = dict(reversed(list(files.items())))
    assert build.archive(again, zipfile.ZIP_DEFLATED) == archive.read_bytes()


def test_all_of_the_package_but_the_full_screen_is_in_it(files):
    """Each module and object is there, without what only Textual could use."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pybpfthrottle").rglob("*.py")}
    objects = {
        f"pybpfthrottle/prebuilt/{path.name}"
        for path in (ROOT / "prebuilt").iterdir()
        if ".bpfeb." not in path.name
    }
    packages = ("click/", "elftools/", "rich/")
    own = {name for name in files if name.startswith("pybpfthrottle/")}
    assert own == {name for name in modules | objects if "/tui/" not in name}
    assert all(any(name.startswith(package) for name in files) for package in packages)


def test_the_objects_for_big_endian_machines_are_there_on_request(build):
    """Without them the manifest does not list them either, so that verify-setup misses none."""
    name = "pybpfthrottle/prebuilt/MANIFEST.json"
    for big_endian in (False, True):
        files = dict(build.own_files(big_endian=big_endian))
        there = {path.rpartition("/")[2] for path in files if path.endswith(".o")}
        assert there == set(json.loads(files[name])["objects"])
        assert any(".bpfeb." in path for path in there) == big_endian


def test_a_command_runs_on_a_bare_python_from_a_read_only_disk(archive, tmp_path):
    """Isolated, optimized, in the C locale, it runs without any package and without writing."""
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && cd "$0" && exec "$@"'
    in_place = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
    python = [*BARE, sys.executable, "-I", "-S", "-B", "pybpfthrottle.pyz"]
    done = subprocess.run(
        [*in_place, str(archive.parent), *python, *LIMIT, "sh", "-c", "exit 3"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


def test_a_limit_needs_neither_sys_nor_the_kernels_log(archive, tmp_path):
    """Without /sys and /dev/kmsg, and with cgroup v2 elsewhere, a command is limited as well."""
    script = (
        'mount -t cgroup2 none "$0"; umount -R -l /sys; mount --bind /dev/null /dev/kmsg; exec "$@"'
    )
    in_place = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
    command = [sys.executable, "-S", str(archive), *LIMIT, "sh", "-c", "ls /sys; exit 3"]
    done = subprocess.run([*in_place, str(tmp_path), *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_a_python_without_its_optional_modules_suffices(archive):
    """A limit and the checks need none of the modules that small Pythons lack."""
    arguments = [str(archive), *LIMIT, "sh", "-c", "exit 3"]
    code = WITHOUT.format(missing=MISSING, arguments=arguments)
    done = subprocess.run(
        [*BARE, sys.executable, "-I", "-S", "-B", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (3, "")


def test_a_python_without_zlib_is_told_what_to_do(archive):
    """It cannot read a compressed zip: one line says so, and says which one it can read."""
    code = WITHOUT.format(missing=("zlib",), arguments=[str(archive), "--version"])
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "this Python has no zlib: use a file that was made by tools/build_zipapp --stored\n"
    )


def test_without_compression_no_zlib_is_needed(build, files, tmp_path):
    """The larger file runs on a Python without zlib."""
    stored = tmp_path / "stored.pyz"
    stored.write_bytes(build.archive(files, zipfile.ZIP_STORED))
    code = WITHOUT.format(missing=("zlib",), arguments=[str(stored), *LIMIT, "true"])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_entry_point_can_be_read_by_old_pythons(build):
    """A Python that is too old says so, and fails at no syntax before."""
    ast.parse(build.MAIN, feature_version=(3, 0))
    assert "sys.version_info < (3, 9)" in build.MAIN


def test_a_limit_that_stays_goes_on_from_the_file(archive, scratch):
    """Started by a relative path, the process in the background still finds all it imports."""
    cgroup, label = scratch.cgroup(), scratch.name()
    arguments = ("--cgroup", cgroup.path, "-d", "1M", "--detach", "--label", label)
    run = [sys.executable, "-S", archive.name]
    done = subprocess.run([*run, *arguments], cwd=archive.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in (("show", label), ("remove", label)):
        done = subprocess.run([*run, *command], cwd=archive.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "1.0 MB/s" in done.stdout or command[0] == "remove"


def test_it_can_be_executed_and_tells_its_version(archive):
    """Executed as a program it is found by the interpreter of its first line."""
    version = runpy.run_path(str(ROOT / "pybpfthrottle" / "__init__.py"))["__version__"]
    directory = os.path.dirname(sys.executable)
    done = subprocess.run(
        [str(archive), "--version"],
        env={"PATH": f"{directory}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert version in done.stdout
