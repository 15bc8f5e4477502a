"""Which processes run the executable that is meant by a path: here, and in other trees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Iterator

import pytest
from lab import ENVIRONMENT, TOOL
from targets import eventually, followed, tool

from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux.executable import Executable

SLEEP = Path(os.path.realpath(str(shutil.which("sleep"))))
# An own tree as a container has it: what is there is what the host has, until it is changed.
CONTAINER = """
mount -t tmpfs tree "$0" && cd "$0" && mkdir upper work tree
mount -t overlay tree -o lowerdir=/,upperdir=upper,workdir=work tree
cd tree && mkdir -p before && pivot_root . before && exec chroot . "$@"
"""

Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command, and return its process once it executes what has the name of its file."""
    with ExitStack() as stack:

        def run(*command: str, runs: str = "", **options: str) -> int:
            process = subprocess.Popen(command, env={**os.environ, **options})
            stack.callback(process.wait)
            stack.callback(process.kill)
            name = os.path.basename(runs or command[0])
            eventually(lambda: os.path.basename(os.readlink(f"/proc/{process.pid}/exe")) == name)
            return process.pid

        yield run


@pytest.fixture
def contained(start: Start, tmp_path: Path) -> int:
    """A process that runs sleep in a tree of its own, below the path that sleep has here."""
    return start(
        *("unshare", "--mount", "sh", "-ec", CONTAINER, str(tmp_path), str(SLEEP), "600"),
        runs=SLEEP.name,
    )


def inside(pid: int, path: Path) -> Path:
    """Return where a process's file is found from here."""
    return Path(f"/proc/{pid}/root{path}")


@pytest.mark.parametrize("link", ["exe", f"root{SLEEP}"])
def test_a_link_of_proc_means_what_that_process_runs(
    start: Start, contained: int, link: str
) -> None:
    """And not what has the same path here; others in its tree that run it are meant too."""
    meant = Executable(f"/proc/{contained}/{link}")
    other = start("nsenter", "-m", "-t", str(contained), "-r", str(SLEEP), "600", runs=SLEEP.name)
    here = start(str(SLEEP), "600")
    assert [meant.runs_in(pid) for pid in (contained, other, here)] == [True, True, False]
    assert [Executable(str(SLEEP)).runs_in(pid) for pid in (contained, here)] == [False, True]


def test_a_link_of_proc_means_the_same_after_the_process(start: Start, tmp_path: Path) -> None:
    """Its number may be that of another process by then."""
    own = Path(shutil.copy(SLEEP, tmp_path / "own"))
    first, other = start(str(own), "0.5"), start(str(own), "600")
    meant = Executable(f"/proc/{first}/exe")
    os.waitpid(first, 0)
    assert meant.runs_in(other)
    assert not meant.runs_in(os.getpid())


@pytest.mark.parametrize("way", ["deleted", "replaced"])
def test_what_is_replaced_in_another_tree_is_not_meant_here(
    start: Start, contained: int, way: str
) -> None:
    """Though the kernel calls both by one path; there, the old one and the new one are meant."""
    there = inside(contained, SLEEP)
    meant = Executable(str(there))
    if way == "replaced":
        shutil.copy(there, there.with_name("new"))
        os.rename(there.with_name("new"), there)
    else:
        there.unlink()
    assert os.readlink(f"/proc/{contained}/exe") == f"{SLEEP} (deleted)"
    assert not Executable(str(SLEEP)).runs_in(contained)
    assert meant.runs_in(contained)
    if way == "replaced":
        command = ("nsenter", "-m", "-t", str(contained), "-r", str(SLEEP), "600")
        assert meant.runs_in(start(*command, runs=SLEEP.name))
    assert not meant.runs_in(start(str(SLEEP), "600"))


def test_an_update_is_meant_and_what_ran_before_it(start: Start, tmp_path: Path) -> None:
    """Whoever was started before; a process that runs it from a tree like this one as well."""
    own = Path(shutil.copy(SLEEP, tmp_path / "own"))
    before = start(str(own), "600")
    private = start("unshare", "--mount", str(own), "600", runs="own")
    new = shutil.copy(SLEEP, tmp_path / "new")
    os.rename(new, own)
    meant = Executable(str(own))
    after = start(str(own), "600")
    assert [meant.runs_in(pid) for pid in (before, private, after)] == [True, True, True]


def test_a_deleted_executable_is_meant_by_its_link(start: Start, tmp_path: Path) -> None:
    """And not the other one that has come to its path."""
    own = Path(shutil.copy(SLEEP, tmp_path / "own"))
    process = start(str(own), "600")
    own.unlink()
    meant = Executable(f"/proc/{process}/exe")
    shutil.copy(str(shutil.which("tail")), own)
    other = start(str(own), "-f", "/dev/null")
    assert [meant.runs_in(pid) for pid in (process, other)] == [True, False]


def test_a_name_that_says_deleted_is_another_file(start: Start, tmp_path: Path) -> None:
    """The kernel adds this word to a path, and files may have it in their names."""
    own = Path(shutil.copy(SLEEP, tmp_path / "own"))
    other = start(shutil.copy(SLEEP, tmp_path / "own (deleted)"), "600")
    assert not Executable(str(own)).runs_in(other)
    assert Executable(str(tmp_path / "own (deleted)")).runs_in(other)


def test_another_path_of_the_same_file_is_meant(start: Start, tmp_path: Path) -> None:
    """By a bind mount, as flatpak makes them, and by a symbolic link."""
    own = Path(shutil.copy(SLEEP, tmp_path / "own"))
    (tmp_path / "link").symlink_to("own")
    app = tmp_path / "app"
    app.mkdir()
    script = f"mount --bind {tmp_path} {app} && exec {app}/own 600"
    bound = start("unshare", "--mount", "sh", "-ec", script, runs="own")
    assert Executable(str(tmp_path / "link")).runs_in(bound)
    assert Executable(f"/proc/{bound}/exe").runs_in(start(str(own), "600"))


def test_an_appimage_is_what_it_mounts(start: Start, tmp_path: Path) -> None:
    """Each start mounts it elsewhere; what it starts outside is not it."""
    image = Path(shutil.copy(SLEEP, tmp_path / "Own.AppImage"))
    with image.open("r+b") as file:
        file.seek(8)
        file.write(b"AI\x02")
    other = Path(shutil.copy(image, tmp_path / "Other.AppImage"))
    running = []
    for own, name in ((image, "a"), (image, "b"), (other, "c")):
        mounted = tmp_path / name
        mounted.mkdir()
        variables = {"APPIMAGE": str(own), "APPDIR": str(mounted)}
        app = str(shutil.copy(SLEEP, mounted / "app"))
        running.append(start(app, "600", **variables))
        running.append(start(str(SLEEP), "600", **variables))
    meant = Executable(str(image))
    assert [meant.runs_in(pid) for pid in running] == [True, False, True, False, False, False]


def test_what_cannot_be_meant_is_refused(contained: int, tmp_path: Path) -> None:
    """Nothing there, no file, and a script; a script of another tree is read there."""
    inside(contained, SLEEP).with_name("script").write_text("#!/bin/sh\n")
    script = inside(contained, SLEEP).with_name("script")
    for path, word in ((script, "script"), (tmp_path, "regular file"), (tmp_path / "x", "No such")):
        with pytest.raises(ProcessError, match=word):
            Executable(str(path))


def test_the_tool_limits_what_is_meant(start: Start, contained: int) -> None:
    """--exe with a link of /proc limits that program alone, and the record has what was given."""
    here = start(str(SLEEP), "600")
    given = f"/proc/{contained}/exe"
    with tool("--exe", given) as (running, event):
        assert contained in followed(running.pid)
        assert here not in followed(running.pid)
        listed = subprocess.run(
            [*TOOL, "list", "--json"], env=ENVIRONMENT, stdout=subprocess.PIPE, check=True
        )
        targets = [one["target"] for one in json.loads(listed.stdout)["throttles"]]
        assert [given] in [target.get("executables") for target in targets]
        assert given in event["target"]
