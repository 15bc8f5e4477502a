"""Command line > environment > config files > default, as one frozen value that is passed down."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from importlib import import_module
from types import MappingProxyType
from typing import Any, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import SettingsError
from pybpfthrottle.model import Direction

ATTACH_METHODS = ("auto", "link", "legacy")
SHAPES = ("auto", "pace", "gate", "window", "police")
EGRESS_VERDICTS = ("auto", "congestion", "deny")
BACKENDS = ("auto", "ebpf", "nftables", "tc_htb", "ifb_tc", "tc_police")

# The predecessor's names are honoured too, after ours.
_PREFIXES = ("PYBPFTHROTTLE_", "CHADTHROTTLE_")
_USE_LEGACY = "USE_LEGACY_ATTACH"
_METHOD = "BPF_ATTACH_METHOD"

_SYSTEM_FILE = "/etc/pybpfthrottle/config.toml"
_ALLOWED = {
    "bpf.attach_method": "one of " + ", ".join(f'"{method}"' for method in ATTACH_METHODS),
    "bpf.upload.attach_method": "one of " + ", ".join(f'"{method}"' for method in ATTACH_METHODS),
    "bpf.download.attach_method": "one of " + ", ".join(f'"{m}"' for m in ATTACH_METHODS),
    "bpf.upload.shape": "one of " + ", ".join(f'"{shape}"' for shape in SHAPES),
    "bpf.download.shape": "one of " + ", ".join(f'"{shape}"' for shape in SHAPES),
    "backends.upload": "one of " + ", ".join(f'"{backend}"' for backend in BACKENDS),
    "backends.download": "one of " + ", ".join(f'"{backend}"' for backend in BACKENDS),
    "bpf.fallback_errnos": 'a list of error names, such as ["EINVAL", "EPERM"]',
}


class AttachPolicy(NamedTuple):
    """How programs are attached.

    ``method`` is one of ATTACH_METHODS. With auto an errno in ``fallback_errnos`` leads from link
    to legacy. ``exclusive`` allows an attachment that may replace another tool's program, only on
    kernels before 4.15. ``override_others`` allows an attachment below another tool's program that
    was attached with BPF_F_ALLOW_OVERRIDE, and then no longer runs there.
    """

    method: str = "auto"
    fallback_errnos: tuple[int, ...] = (errno.EINVAL,)
    exclusive: bool = False
    override_others: bool = False


class Setting(NamedTuple):
    """One setting, and where it came from."""

    name: str
    value: str
    source: str


class Settings(NamedTuple):
    """All settings, for each direction; ``origins`` is for people."""

    attach: Mapping[Direction, AttachPolicy]
    shape: Mapping[Direction, str]
    backends: Mapping[Direction, str]
    origins: tuple[Setting, ...]
    warnings: tuple[str, ...]


def load(
    *,
    method: Optional[str] = None,
    shape: Optional[str] = None,
    backends: Mapping[Direction, Optional[str]] = MappingProxyType({}),
    exclusive: bool = False,
    override_others: bool = False,
    environment: Optional[Mapping[str, str]] = None,
    files: Optional[Sequence[str]] = None,
) -> Settings:
    """Find all settings; ``method``, ``shape`` and ``backends`` are the command line's.

    Raises SettingsError.
    """
    environment = os.environ if environment is None else environment
    found = _from_files(config_files(environment) if files is None else files)
    warnings: list[str] = []
    above = _command_line(method) or _from_environment(environment, warnings)
    methods = {
        direction: above
        or found.get(f"bpf.{direction}.attach_method")
        or found.get("bpf.attach_method")
        or ("auto", "default")
        for direction in Direction
    }
    names, names_source = found.get("bpf.fallback_errnos", (["EINVAL"], "default"))
    errnos = tuple(getattr(errno, name) for name in names)
    origins = [
        Setting(f"bpf.{direction}.attach_method", chosen, source)
        for direction, (chosen, source) in methods.items()
    ]
    shapes = {
        direction: (shape, "--shape")
        if shape
        else found.get(f"bpf.{direction}.shape", ("auto", "default"))
        for direction in Direction
    }
    origins += [
        Setting(f"bpf.{direction}.shape", chosen, source)
        for direction, (chosen, source) in shapes.items()
    ]
    chosen_backends = {
        direction: (named, f"--{direction}-backend")
        if named
        else found.get(f"backends.{direction}", ("auto", "default"))
        for direction in Direction
        for named in [backends.get(direction)]
    }
    origins += [
        Setting(f"backends.{direction}", chosen, source)
        for direction, (chosen, source) in chosen_backends.items()
    ]
    origins.append(Setting("bpf.fallback_errnos", ", ".join(names), names_source))
    return Settings(
        {
            direction: AttachPolicy(chosen, errnos, exclusive, override_others)
            for direction, (chosen, _) in methods.items()
        },
        {direction: chosen for direction, (chosen, _) in shapes.items()},
        {direction: chosen for direction, (chosen, _) in chosen_backends.items()},
        tuple(origins),
        tuple(warnings),
    )


def config_files(environment: Mapping[str, str]) -> list[str]:
    """Return the files to read if they exist; later files override earlier ones, key by key."""
    files = [_SYSTEM_FILE]
    home = config_home(environment)
    if home:
        files.append(os.path.join(home, "config.toml"))
    return files


def config_home(environment: Mapping[str, str]) -> str:
    """Return the user's directory for this program's files; empty if there is none."""
    # Relative paths must be ignored: XDG Base Directory Specification.
    home = environment.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(home):
        home = os.path.join(environment.get("HOME", ""), ".config")
    return os.path.join(home, "pybpfthrottle") if os.path.isabs(home) else ""


def _command_line(method: Optional[str]) -> Optional[tuple[str, str]]:
    return (method, "--bpf-attach-method") if method else None


def _from_environment(
    environment: Mapping[str, str], warnings: list[str]
) -> Optional[tuple[str, str]]:
    for name in (prefix + _USE_LEGACY for prefix in _PREFIXES):
        value = environment.get(name, "")
        if value not in ("", "0", "1"):
            raise SettingsError(f"the environment variable {name} is {value!r}: set it to 1 or 0")
        if value == "1":
            warnings.append(f"{name} is deprecated: set {_PREFIXES[0]}{_METHOD}=legacy instead")
            return "legacy", name
    for name in (prefix + _METHOD for prefix in _PREFIXES):
        value = environment.get(name, "")
        if value and value not in ATTACH_METHODS:
            raise SettingsError(
                f"the environment variable {name} is {value!r}:"
                f" set it to one of {', '.join(ATTACH_METHODS)}"
            )
        if value:
            return value, name
    return None


def _from_files(files: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Return the value of each key, and the file that it came from."""
    found: dict[str, tuple[Any, str]] = {}
    for path in files:
        text = read_trusted(path)
        if text is not None:
            found.update({key: (value, path) for key, value in _parse(path, text).items()})
    return found


def read_trusted(path: str) -> Optional[str]:
    """Return a file's text, None if there is none; root reads only files of its own.

    Raises SettingsError.
    """
    # Ignore a file in a directory that may not be searched, such as another user's HOME.
    if not os.path.lexists(path):
        return None
    try:
        # Opening a pipe would wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, encoding="utf-8-sig") as file:
            _refuse_untrusted(path, os.fstat(fd))
            return file.read()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"cannot read {path}: {error}") from error


def _refuse_untrusted(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SettingsError(f"{path} is not a regular file")
    if os.geteuid() == 0 and status.st_uid != 0:
        raise SettingsError(
            f"{path} belongs to another user (uid {status.st_uid}), and root will not use it:"
            f" chown root {path}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SettingsError(f"{path} is writable by other users: chmod go-w {path}")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Say that a file has a key that is not known, which are, and which may have been meant."""
    import difflib

    known = list(known)
    meant = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {meant[0]}? " if meant else ""
    return f"unknown key {key} ({hint}known: {', '.join(known)})"


def _parse(path: str, text: str) -> dict[str, Any]:
    """Return a file's dotted keys. Raises SettingsError with file, line and what is allowed."""
    flat = dict(_flatten(parse_toml(path, text), ""))
    for key, value in flat.items():
        where = f"{path}, line {_line_of(text, key)}"
        if key not in _ALLOWED:
            raise SettingsError(f"{where}: {unknown_key(key, _ALLOWED)}")
        if not _is_allowed(key, value):
            raise SettingsError(f"{where}: {key} is {value!r}; it must be {_ALLOWED[key]}")
    return flat


def parse_toml(path: str, text: str) -> dict[str, Any]:
    """Return the tables of a text in TOML. Raises SettingsError, which names the file."""
    toml = _toml(path)
    try:
        return dict(toml.loads(text))
    except toml.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error


def _toml(path: str) -> Any:
    # In the standard library since Python 3.11; tomli is the same for older versions.
    for name in ("tomllib", "tomli"):
        with suppress(ImportError):
            return import_module(name)
    raise SettingsError(
        f"cannot read {path}: this Python needs the package tomli"
        " (pip install 'pybpfthrottle[config]')"
    )


def _flatten(tree: Mapping[str, Any], prefix: str) -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _is_allowed(key: str, value: Any) -> bool:
    if key == "bpf.fallback_errnos":
        return isinstance(value, list) and all(
            isinstance(name, str) and name.startswith("E") and hasattr(errno, name)
            for name in value
        )
    if key.startswith("backends."):
        return value in BACKENDS
    return isinstance(value, str) and value in (SHAPES if key.endswith("shape") else ATTACH_METHODS)


def _line_of(text: str, key: str) -> int:
    """Return the line that sets a dotted key: the parser does not say."""
    table, _, name = key.rpartition(".")
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        if header:
            current = re.sub(r"[\s\"']", "", header[1])
        written = re.match(r"\s*([\w.\-\"' ]+?)\s*=", line)
        if written:
            dotted = re.sub(r"[\s\"']", "", written[1])
            if f"{current}.{dotted}".strip(".") == f"{table}.{name}".strip("."):
                return number
    return 1
