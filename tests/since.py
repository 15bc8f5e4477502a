"""The only ways to skip a test: a skip says what is lacking, and fails where it is not lacking.

conftest.py makes a failure of every other skip. TESTS_MAY_LACK allows for a poorer machine, such as
those of tools/vmtest: commands and options of the kernel's configuration, separated by blanks.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Optional

import pytest


class Lack(pytest.skip.Exception):
    """The machine lacks something, which was looked at."""


def since(release: str) -> pytest.MarkDecorator:
    """Skip on a kernel before this release, such as "5.16"."""
    return pytest.mark.since(release)


def needs_release(release: str, what: str = "") -> None:
    """Skip, in a test or a fixture, on a kernel before this release."""
    __tracebackhide__ = True
    if running() < parse(release):
        raise Lack(f"needs Linux {release}" + (f": {what}" if what else ""))


def until(release: str, what: str) -> None:
    """Skip on this release and later ones, which do not do that any more."""
    __tracebackhide__ = True
    if running() >= parse(release):
        raise Lack(f"needs Linux before {release}: {what}")


def needs_option(*options: str, works: bool) -> None:
    """Skip where something does not work because an option like CONFIG_MPTCP is not set.

    Fails where the kernel's configuration has all of them: then it has to work.
    """
    __tracebackhide__ = True
    if works:
        return
    unset = [name for name in options if _set(name) is not True or name in _may_lack()]
    if not unset:
        pytest.fail(f"this kernel has {' and '.join(options)}, and it does not work")
    raise Lack(f"needs a kernel with {' and '.join(unset)}")


def needs_command(name: str) -> str:
    """Return the path of a program that tools/test installs; skip where TESTS_MAY_LACK has it."""
    __tracebackhide__ = True
    beside = os.path.dirname(sys.executable)
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), beside]))
    if found:
        return found
    if name not in _may_lack():
        pytest.fail(f"{name} is not installed; tools/test installs it, TESTS_MAY_LACK allows that")
    raise Lack(f"needs {name}")


def needs_machine(what: str, *, found: bool) -> None:
    """Skip where this machine, whatever its kernel, is not of the kind that a test is about."""
    __tracebackhide__ = True
    if not found:
        raise Lack(f"needs {what}")


@cache
def is_emulated() -> bool:
    """Return whether this machine's processor is emulated, which makes it twenty times slower."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


def needs_configuration() -> str:
    """Return the running kernel's configuration; skip where no file tells it."""
    __tracebackhide__ = True
    found = _configuration()
    needs_machine("a kernel whose configuration can be read", found=found is not None)
    return found or ""


def running() -> tuple[int, ...]:
    """Return the release of the running kernel, as (6, 12)."""
    return parse(os.uname().release)


def parse(release: str) -> tuple[int, ...]:
    """Return the first two numbers of a release."""
    found = re.match(r"(\d+)\.(\d+)", release)
    assert found, release
    return int(found[1]), int(found[2])


def _may_lack() -> list[str]:
    return os.environ.get("TESTS_MAY_LACK", "").split()


def _set(option: str) -> Optional[bool]:
    """Whether the kernel or one of its modules has an option; None where it does not tell."""
    text = _configuration()
    return None if text is None else bool(re.search(rf"^{option}=[ym]$", text, re.M))


@cache
def _configuration() -> Optional[str]:
    release = os.uname().release
    for kept in (Path(f"/boot/config-{release}"), Path(f"/lib/modules/{release}/config")):
        if kept.exists():
            return kept.read_text()
    try:
        with gzip.open("/proc/config.gz", "rt") as file:
            return file.read()
    except FileNotFoundError:
        return None
