"""Where links are pinned: in a file system in which others may have been before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from since import needs_machine

from pybpfthrottle.backends.ebpf import pins


@pytest.fixture
def top(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The root of a bpf file system in which anybody can make directories and links."""
    found = tmp_path / "bpf"
    found.mkdir()
    found.chmod(0o1777)
    monkeypatch.setattr(pins, "_mounted_at", lambda: str(found))
    return found


class Pinned:
    """A link; pinned, it is a file."""

    def pin(self, path: str) -> None:
        """Make it."""
        Path(path).touch()


def test_nobody_else_can_look_into_the_directory(top: Path) -> None:
    """Nor open what is pinned there."""
    path = pins.pin("k3x9fd", [Pinned()])
    assert [one.stat().st_mode & 0o777 for one in (Path(path), Path(path).parent)] == [0o700] * 2
    assert pins.of("k3x9fd") == [path]
    pins.unpin(path)
    assert list(top.iterdir()) == []


def test_a_kill_while_it_pins_leaves_nothing(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was pinned by then, whatever is known of its throttle, nor the directory."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt  # which nothing here undoes

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            pins.pin("k3x9fd", [Pinned()])
    assert pins.of("k3x9fd") == []
    assert list(top.rglob("0"))
    pins.tidy_up({"k3x9fd"})
    assert list(top.iterdir()) == []


def test_one_pin_that_cannot_be_removed_keeps_no_other(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is told, and the next start removes the rest."""
    path = pins.pin("k3x9fd", [Pinned(), Pinned(), Pinned()])
    unlink = os.unlink

    def fail(name: str) -> None:
        raise OSError(12, "Cannot allocate memory", name)

    with monkeypatch.context() as refusing:
        steps = iter([unlink, fail, unlink])
        refusing.setattr(os, "unlink", lambda name: next(steps)(name))
        with pytest.raises(OSError, match="not empty"):
            pins.unpin(path)
    assert len(os.listdir(path)) == 1
    pins.tidy_up(())
    assert list(top.iterdir()) == []


def test_a_link_in_place_of_the_directory_is_not_followed(top: Path, tmp_path: Path) -> None:
    """Root would remove files anywhere, or pin something there."""
    victim = tmp_path / "etc" / "important"
    victim.mkdir(parents=True)
    (victim / "file").touch()
    (top / "pybpfthrottle").symlink_to(victim.parent)
    pins.tidy_up(())
    assert (victim / "file").exists()
    with pytest.raises(PermissionError, match="belongs to another user"):
        pins.pin("k3x9fd", [Pinned()])
    assert [one.name for one in victim.parent.iterdir()] == ["important"]


@pytest.mark.parametrize("how", ["owned by another user", "writable by others"])
def test_a_directory_that_others_can_change_is_not_used(top: Path, how: str) -> None:
    """They could put a link for root to follow into it, or take our pins out."""
    needs_machine("root, to give a directory away", found=os.geteuid() == 0)
    place = top / "pybpfthrottle"
    (place / "b2b2b2-1").mkdir(parents=True)
    (place / "b2b2b2-1" / "0").touch()
    if how == "writable by others":
        place.chmod(0o777)
    else:
        os.chown(place, 1000, 1000)
    pins.tidy_up(())
    assert (place / "b2b2b2-1" / "0").exists()
    with pytest.raises(PermissionError, match="belongs to another user"):
        pins.pin("k3x9fd", [Pinned()])
