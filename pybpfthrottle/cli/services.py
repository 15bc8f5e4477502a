"""install-service and drop-in: files that have systemd start this program."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle import unitfiles
from pybpfthrottle.cli.say import echo, echo_lines
from pybpfthrottle.errors import ServiceError
from pybpfthrottle.linux import process, systemd
from pybpfthrottle.unitfiles import DAEMON, DROP_IN, Program

UNITS = Path("/etc/systemd/system")
_PACKAGED = (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
# Longer than systemd's own patience with a service.
_START_S = 120.0


class Limit(NamedTuple):
    """What limits a service: options of the bare command, as they were given."""

    options: Sequence[str]
    optional: bool


def install_service(*, dry_run: bool) -> None:
    """Write, enable and start the service of the daemon. Raises ServiceError or OSError."""
    files = {UNITS / DAEMON: unitfiles.daemon(_program())}
    packaged = [one / DAEMON for one in _PACKAGED if (one / DAEMON).exists()]
    if packaged:
        files = {}  # what a package has brought is kept up to date by that
        echo(f"A package has brought {packaged[0]}.")
    if dry_run:
        _show(files)
        return
    with _written(files):
        systemd.systemctl("restart", DAEMON, patience_s=_START_S)
        systemd.systemctl("enable", DAEMON)
    echo(f"{DAEMON} runs, now and after each boot, by the rules in /etc/pybpfthrottle/rules.d.")


def uninstall_service(*, dry_run: bool) -> None:
    """Stop and disable the service of the daemon, and delete what was written for it.

    Raises ServiceError or OSError.
    """
    path = UNITS / DAEMON
    if not any((directory / DAEMON).exists() for directory in (UNITS, *_PACKAGED)):
        raise ServiceError(f"there is no {path}: the service is not installed")
    _refuse_foreign([path])
    if not dry_run:
        systemd.systemctl("disable", "--now", DAEMON, patience_s=_START_S)
        echo(f"Stopped {DAEMON}: it does not start at boot any more.")
    _delete([path], dry_run=dry_run)


def add(unit: str, limit: Limit, *, dry_run: bool) -> None:
    """Limit a service whenever it runs. Raises ServiceError or OSError."""
    if not dry_run or systemd.runs():
        unit = _known(unit)
    keeper, drop_in = _paths(unit)
    files = {
        keeper: unitfiles.limit(_program(), unit, limit.options),
        drop_in: unitfiles.drop_in(unit, _systemctl(), optional=limit.optional),
    }
    if dry_run:
        _show(files)
        return
    with _written(files):
        running = _running(unit)
        for one in running:
            systemd.systemctl("restart", unitfiles.limit_service(one), patience_s=_START_S)
    when = "now, and whenever it runs" if running else "whenever it runs"
    echo(f"{unit} is limited {when}. pybpfthrottle drop-in {unit} --remove ends that.")
    for line in _about_sockets(unit):
        echo(line)


def remove(unit: str, *, dry_run: bool) -> None:
    """Limit a service no longer. Raises ServiceError or OSError."""
    with suppress(ServiceError):  # it may have been uninstalled
        unit = _known(unit)
    keeper, drop_in = _paths(unit)
    if not drop_in.exists() and not keeper.exists():
        raise ServiceError(f"there is no {drop_in}: {unit} is not limited by a drop-in")
    _refuse_foreign([drop_in, keeper])
    if not dry_run:
        for one in _running(unitfiles.limit_service(unit)):
            systemd.systemctl("stop", one, patience_s=_START_S)
    _delete([drop_in, keeper], dry_run=dry_run)


def _program() -> Program:
    """Return how this program was started, for systemd to do the same."""
    script = os.path.abspath(sys.argv[0])
    places = [process.PACKAGE_ROOT, sys.base_prefix, os.path.realpath(sys.executable), script]
    in_home = any(path.startswith(("/home/", "/root/")) for path in places)
    if os.path.basename(script) == "pybpfthrottle" and os.access(script, os.X_OK):
        return Program([script], in_home=in_home)
    # A checkout, or a single file.
    words = [sys.executable, "-m", "pybpfthrottle"]
    return Program(words, {"PYTHONPATH": process.PACKAGE_ROOT}, in_home)


def _refuse_others_program(program: Program) -> None:
    """Raise ServiceError if somebody else than root may change what root is to run."""
    package = os.path.join(process.PACKAGE_ROOT, "pybpfthrottle")
    for path in (program.words[0], process.PACKAGE_ROOT, package):
        with suppress(FileNotFoundError, NotADirectoryError):  # in a single file is no package
            found = os.stat(path)
            if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
                raise ServiceError(
                    f"others than root may change {path}, and would be root by this service:"
                    " install pybpfthrottle for all users first, as README says"
                )


def _systemctl() -> str:
    return shutil.which("systemctl") or "/usr/bin/systemctl"


def _paths(unit: str) -> tuple[Path, Path]:
    """Return where the service that keeps a unit's limit is, and the unit's drop-in."""
    return UNITS / unitfiles.limit_service(unit), UNITS / f"{unit}.d" / DROP_IN


def _is_template(unit: str) -> bool:
    return "@." in unit


def _running(unit: str) -> list[str]:
    """Return a unit if it runs; of a template, its instances that run. Raises ServiceError."""
    pattern = unit.replace("@.", "@*.") if _is_template(unit) else unit
    states = "--state=active,activating,reloading"
    shown = systemd.systemctl(
        *("list-units", "--plain", "--no-legend", "--full", states, "--", pattern)
    )
    return [line.split()[0] for line in shown.splitlines() if line.strip()]


def _known(unit: str) -> str:
    """Return the name by which systemd has a service: cgroups have no aliases.

    Raises ServiceError if it has none.
    """
    asked = unit.replace("@.", "@x.") if _is_template(unit) else unit
    shown = systemd.systemctl("show", "--property=Id", "--property=LoadState", "--", asked)
    found = dict(line.partition("=")[::2] for line in shown.splitlines())
    state = found.get("LoadState", "unknown")
    if state not in ("loaded", "stub", "merged"):
        raise ServiceError(f"systemd has no service {unit} (its state: {state})")
    return unit if _is_template(unit) else systemd.service_name(found.get("Id", unit))


def _about_sockets(unit: str) -> Iterable[str]:
    """Yield what is to be known of the sockets that start a service, a line each."""
    for name in [] if _is_template(unit) else systemd.sockets_of(unit):
        yield f"{name} starts it: what comes in by its sockets is limited too, while {unit} runs."


@contextmanager
def _written(files: Mapping[Path, str]) -> Iterator[None]:
    """Write files, and have systemd read them; put back what was there if the context fails.

    Raises ServiceError or OSError.
    """
    _refuse_others_program(_program())
    if not systemd.runs():
        raise ServiceError("systemd does not run here; --dry-run shows what would be written")
    _refuse_foreign(files)
    before = {path: path.read_text() if path.exists() else None for path in files}
    try:
        for path, text in files.items():
            _put(path, text)
        systemd.systemctl("daemon-reload")
        yield
    except BaseException:
        for path, old in before.items():
            _put(path, old)
        with suppress(ServiceError):
            systemd.systemctl("daemon-reload")
        raise
    for path in files:
        echo(f"Wrote {path}.")


def _put(path: Path, text: Optional[str]) -> None:
    """Have a file with this text, or none; never a part of it."""
    if text is None:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # others' drop-ins are in there
            if path.parent != UNITS:
                path.parent.rmdir()
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.chmod(0o644)
    new.replace(path)


def _delete(paths: Sequence[Path], *, dry_run: bool) -> None:
    """Delete those of the files that are there; tell which."""
    for path in paths:
        if path.exists():
            echo(f"{'Would delete' if dry_run else 'Deleted'} {path}.")
        if not dry_run:
            _put(path, None)
    if not dry_run:
        systemd.systemctl("daemon-reload")


def _refuse_foreign(paths: Iterable[Path]) -> None:
    """Raise ServiceError for a file that this program has not written."""
    for path in paths:
        if path.exists() and not path.read_text(errors="replace").startswith(unitfiles.HEADING):
            raise ServiceError(f"{path} was not written by pybpfthrottle: move it away first")


def _show(files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        echo(f"# {path}")
        echo_lines(text)
