"""What systemd tells of its units, and the commands that it is given; see notify.py as well."""

from __future__ import annotations

import os
import re

from pybpfthrottle.errors import ServiceError
from pybpfthrottle.logger import Logger

log = Logger(__name__)

# systemd allows 255 characters in the name of a unit; others are named after these.
_MOST = 220
_PART = r"[A-Za-z0-9:_\\-][A-Za-z0-9:_.\\-]*"
_SERVICE = rf"(?=.{{1,{_MOST}}}\Z){_PART}(@[A-Za-z0-9:_.\\-]*)?\.service"
_OTHER_KINDS = (
    *("automount", "device", "mount", "path", "scope", "slice", "socket", "swap", "target"),
    "timer",
)
# An answer takes milliseconds. Who waits for a service has systemd's own time limit for it.
_PATIENCE_S = 10.0


def runs() -> bool:
    """Whether systemd manages this machine (man 3 sd_booted)."""
    return os.path.isdir("/run/systemd/system")


def service_name(name: str) -> str:
    """Return the full name of a service. Raises ServiceError for what can be none."""
    full = name if name.endswith(".service") else f"{name}.service"
    if name.rpartition(".")[2] in _OTHER_KINDS:
        raise ServiceError(f"{name!r} is no service: only services can be limited in this way")
    if not re.fullmatch(_SERVICE, full):
        raise ServiceError(
            f"{name!r} is not the name of a service: it has letters, digits and :-_.\\ only, one @"
            f" at most, and up to {_MOST} characters"
        )
    return full


def systemctl(*arguments: str, patience_s: float = _PATIENCE_S) -> str:
    """Return what systemctl prints. Raises ServiceError."""
    import subprocess  # which takes a moment, and most starts ask systemd nothing

    try:
        done = subprocess.run(
            ["systemctl", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience_s,
        )
    except subprocess.TimeoutExpired as error:
        raise ServiceError(
            f"systemctl {arguments[0]} has not ended for {patience_s:g} s"
        ) from error
    except FileNotFoundError:
        raise ServiceError("systemctl is missing: systemd is not installed here") from None
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        raise ServiceError(f"systemctl {' '.join(arguments)} has failed: {reason}")
    return done.stdout


def sockets_of(unit: str) -> list[str]:
    """Return the socket units that start a service; none if systemd does not run, or is silent.

    Those that start an instance for each connection are left out: they serve other instances too.
    """
    if not runs() or "@" in unit:
        return []
    try:
        shown = systemctl("show", "--property=TriggeredBy", "--value", "--", unit)
    except ServiceError as error:
        log.info("The sockets of %s are unknown: %s", unit, error)
        return []
    return [name for name in shown.split() if name.endswith(".socket")]
