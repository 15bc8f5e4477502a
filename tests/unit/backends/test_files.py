"""Records in files: what others write, break, change and remove."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from contextlib import contextmanager

import pytest

from pybpfthrottle.backends import files
from pybpfthrottle.backends.protocol import Match, Record
from pybpfthrottle.errors import BackendError
from pybpfthrottle.linux import process, run_files
from pybpfthrottle.model import Direction, Rate, Target, ThrottleSpec

RECORD = Record(
    id="k3x9fd",
    spec=ThrottleSpec(Target(pids=(7,)), {Direction.DOWNLOAD: Rate(5000)}, name="backup"),
    owner=process.identity(),
    backend="tables",
    match=Match.CGROUP,
    cgroups=("/sys/fs/cgroup/a b\udcff",),
    cgroup_ids=(77,),
    since_ns=123,
    attached_by="a rule",
    handles={"table": "x"},
)


@pytest.fixture(autouse=True)
def directory(monkeypatch, tmp_path):
    """A directory of the test's own, which does not exist yet; nobody waits for a lock."""

    @contextmanager
    def free():
        yield True

    monkeypatch.setattr(files, "DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setattr(files, "locked", free)
    monkeypatch.setattr(files, "locked_if_free", free)
    return tmp_path / "run"


class Kept:
    """A throttle that notes which rates it was told of."""

    def __init__(self):
        self.limits = dict(RECORD.spec.limits)

    def adopt_rate(self, direction, rate):
        """Note it."""
        self.limits[direction] = rate


def test_a_record_is_read_as_it_was_written(directory):
    """All fields survive, and only its owner may read the directory."""
    files.write(RECORD)
    assert files.read("tables", "k3x9fd") == files.Entry(1, RECORD)
    assert list(files.records("tables")) == [RECORD]
    assert directory.stat().st_mode & 0o777 == 0o700


def test_each_backend_has_records_of_its_own():
    """Two backends may serve the two directions of one throttle."""
    other = dataclasses.replace(RECORD, backend="others", handles={})
    files.write(RECORD)
    files.write(other)
    files.delete("tables", "k3x9fd")
    assert list(files.records("tables")) == []
    assert list(files.records("others")) == [other]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", json.dumps({"version": 2}), json.dumps({"version": 1}), "\udcff"],
)
def test_a_broken_file_is_skipped(directory, text):
    """Neither half a file nor another version's keeps the others from being read."""
    files.write(RECORD)
    (directory / "b.tables.json").write_text(text, errors="surrogateescape")
    assert list(files.records("tables")) == [RECORD]


def test_a_file_that_others_can_write_is_skipped(directory):
    """Root removes what a record names, so nobody else may write one."""
    files.write(RECORD)
    (directory / "k3x9fd.tables.json").chmod(0o666)
    assert list(files.records("tables")) == []


def test_nobody_else_can_read_a_record(directory):
    """It tells what is limited."""
    files.write(RECORD)
    found = [one.stat().st_mode & 0o777 for one in (directory, directory / "k3x9fd.tables.json")]
    assert found == [0o700, 0o600]


def test_a_link_is_not_written_through(directory, tmp_path):
    """In the place of a draft it is an error; in that of a record it is replaced."""
    victim = tmp_path / "victim"
    victim.write_text("important")
    directory.mkdir()
    draft = directory / f"k3x9fd.tables.json.{os.getpid()}"
    draft.symlink_to(victim)
    with pytest.raises(BackendError, match="cannot record"):
        files.write(RECORD)
    assert victim.read_text() == "important"
    assert not draft.exists()
    (directory / "k3x9fd.tables.json").symlink_to(victim)
    files.write(RECORD)
    assert victim.read_text() == "important"
    assert list(files.records("tables")) == [RECORD]


def test_a_link_is_not_read(directory, tmp_path):
    """Wherever it leads."""
    files.write(RECORD)
    path = directory / "k3x9fd.tables.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert list(files.records("tables")) == []


def test_there_may_be_no_directory():
    """Without one there are no records."""
    assert list(files.records("tables")) == []
    files.delete("tables", "k3x9fd")


def test_the_directory_goes_with_its_last_file(directory):
    """Nothing is left behind."""
    files.write(RECORD)
    files.delete("tables", "k3x9fd")
    assert not directory.exists()


def test_the_draft_of_a_killed_process_is_removed(directory, monkeypatch):
    """One that lives may be about to rename its own; records stay."""
    monkeypatch.setattr(run_files, "DIRECTORY", str(directory))
    files.write(RECORD)
    done = subprocess.Popen(["true"])
    done.wait()
    dead = directory / f"b.tables.json.{done.pid}"
    own = directory / f"b.tables.json.{os.getpid()}"
    for draft in (dead, own):
        draft.touch()
    run_files.tidy_up()
    assert not dead.exists()
    assert own.exists()
    assert list(files.records("tables")) == [RECORD]


def test_a_directory_with_nothing_but_drafts_goes_too(directory, monkeypatch):
    """As after a kill between its creation and the first file."""
    monkeypatch.setattr(run_files, "DIRECTORY", str(directory))
    directory.mkdir(exist_ok=True)
    run_files.tidy_up()
    assert not directory.exists()
    run_files.tidy_up()


def test_where_nothing_can_be_written_the_reason_is_told(monkeypatch, tmp_path):
    """A read-only /run is an error that another backend may not have."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(files, "DIRECTORY", str(tmp_path / "file" / "run"))
    with pytest.raises(BackendError, match=r"cannot record the throttle in .*: Not a directory"):
        files.write(RECORD)


def test_the_owner_adopts_a_limit_that_others_have_set():
    """Somebody changes the kernel and the file; the owner learns of it by the file."""
    kept = Kept()
    own = files.OwnFile(kept)
    own.create(RECORD)
    files.set_limit(RECORD, Direction.DOWNLOAD, Rate(9000))
    own.chore.run()
    assert kept.limits == {Direction.DOWNLOAD: Rate(9000)}
    assert not own.removed_by_others


def test_an_owner_that_writes_first_adopts_it_too():
    """What the owner records meanwhile does not hide what others have set."""
    kept = Kept()
    own = files.OwnFile(kept)
    own.create(RECORD)
    files.set_limit(RECORD, Direction.DOWNLOAD, Rate(9000))
    own.update(handles={})
    assert kept.limits == {Direction.DOWNLOAD: Rate(9000)}


def test_the_owners_own_change_is_recorded():
    """Others see it, and the owner does not take it for a change by others."""
    own = files.OwnFile(Kept())
    own.create(RECORD)
    own.set_limit(Direction.DOWNLOAD, None)
    [record] = files.records("tables")
    assert record.spec.limits == {Direction.DOWNLOAD: None}


def test_a_deleted_file_ends_the_throttle():
    """Who removes a throttle deletes its file last; the owner writes it no more."""
    own = files.OwnFile(Kept())
    own.create(RECORD)
    files.delete("tables", "k3x9fd")
    own.chore.run()
    assert own.removed_by_others
    own.set_limit(Direction.DOWNLOAD, None)
    assert list(files.records("tables")) == []


def test_a_draft_is_no_record(directory):
    """A writer that was killed leaves a draft, which nobody reads."""
    files.write(RECORD)
    os.rename(directory / "k3x9fd.tables.json", directory / "k3x9fd.tables.json.99")
    assert list(files.records("tables")) == []
