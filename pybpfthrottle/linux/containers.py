"""The containers that cgroups belong to, by the names that container engines give to cgroups.

Names are read from the engines' own files. Those of rootless engines are the users': whatever is in
them, reading neither waits nor fails, and takes a few megabytes at most.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import stat
from contextlib import suppress
from functools import lru_cache
from typing import Any, Iterator, Optional

from pybpfthrottle.bpf.obj.plain import NamedTuple

_ID = r"(?P<id>[0-9a-f]{64})"
# A component of the path by engine; the monitors beside the containers (conmon) match none.
_COMPONENTS = (
    ("docker", re.compile(rf"docker-{_ID}\.scope")),
    ("podman", re.compile(rf"libpod-{_ID}(\.scope)?")),
    ("containerd", re.compile(rf"(cri-containerd|nerdctl)-{_ID}\.scope")),
    ("cri-o", re.compile(rf"crio-{_ID}(\.scope)?")),
    ("lxc", re.compile(r"lxc\.payload[.-](?P<id>.+)")),
    ("nspawn", re.compile(r"systemd-nspawn@(?P<id>.+)\.service")),
    # What systemd-machined registers; virtual machines are not containers.
    ("nspawn", re.compile(r"machine-(?!qemu\\x2d|lxc\\x2d)(?P<id>.+)\.scope")),
)
# Where the component itself tells no engine, the one above it does.
_BELOW = {"docker": "docker", "lxc": "lxc"}
_POD = re.compile(r"(kubepods\S*-)?pod[0-9a-f_-]{32,36}(\.slice)?")
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
_SHORT_ID = 12
_LONGEST_NAME = 128
_LARGEST_FILE = 4 << 20


class Container(NamedTuple):
    """A container: its engine, and its id or, for LXC and nspawn, its name."""

    engine: str
    id: str

    @property
    def short_id(self) -> str:
        """The id as engines show it."""
        return self.id[:_SHORT_ID] if re.fullmatch(_ID, self.id) else self.id


@lru_cache(maxsize=1024)
def of_path(path: str) -> Optional[Container]:
    """Return the container that a cgroup belongs to, from its path: the outermost one."""
    above = ""
    for part in path.split("/"):
        for engine, pattern in _COMPONENTS:
            found = pattern.fullmatch(part)
            if found:
                return Container(engine, _unescaped(found["id"]))
        if above == "lxc" and part:
            return Container("lxc", part)
        if re.fullmatch(_ID, part) and (above in _BELOW or _POD.fullmatch(above)):
            return Container(_BELOW.get(above, "containerd"), part)
        above = part
    return None


def _unescaped(name: str) -> str:
    """Return what systemd has escaped in a unit's name."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), name)


_names: dict[Container, str] = {}
_labels: dict[Container, dict[str, str]] = {}


def name_of(container: Container, user: Optional[int] = None) -> str:
    """Return the name of a container, from its engine's files; else its short id.

    ``user`` is the one whose engine it may be.
    """
    if container.id == container.short_id:
        return container.id
    if container not in _names:
        found = next(filter(None, _read(container, user)), "")[:_LONGEST_NAME]
        if not found:
            return container.short_id
        if len(_names) >= 1024:
            _names.clear()
        _names[container] = found
    return _names[container]


def labels_of(container: Container, user: Optional[int] = None) -> dict[str, str]:
    """Return the labels of a container of Docker, or the OCI annotations of another engine's."""
    if container not in _labels:
        found = next((one for one in _read_labels(container, user) if isinstance(one, dict)), None)
        if found is None:
            return {}
        if len(_labels) >= 1024:
            _labels.clear()
        _labels[container] = {
            name: value for name, value in found.items() if isinstance(value, str)
        }
    return _labels[container]


def _read_labels(container: Container, user: Optional[int]) -> Iterator[Any]:
    number = container.id
    for top in _docker_homes(user) if container.engine == "docker" else ():
        told = _json(f"{top}/containers/{number}/config.v2.json")
        told = told.get("Config") if isinstance(told, dict) else None
        yield told.get("Labels") if isinstance(told, dict) else None
    for path in _oci_configurations(number):
        told = _json(path)
        yield told.get("annotations") if isinstance(told, dict) else None


def _docker_homes(user: Optional[int]) -> list[str]:
    homes = [_home(user)] if user else []
    return ["/var/lib/docker", *(f"{home}/.local/share/docker" for home in homes)]


def _oci_configurations(number: str) -> tuple[str, ...]:
    return (
        f"/run/containerd/io.containerd.runtime.v2.task/k8s.io/{number}/config.json",
        f"/run/containers/storage/overlay-containers/{number}/userdata/config.json",
    )


def _read(container: Container, user: Optional[int]) -> Iterator[str]:
    """Yield what the files that there are say."""
    engine, number = container
    homes = [_home(user)] if user else []
    if engine == "docker":
        for top in _docker_homes(user):
            told = _json(f"{top}/containers/{number}/config.v2.json")
            yield _text(told, "Name").lstrip("/")
    elif engine == "podman":
        for top in ("/var/lib", *(f"{home}/.local/share" for home in homes)):
            listed = _json(f"{top}/containers/storage/overlay-containers/containers.json")
            for one in listed if isinstance(listed, list) else ():
                if _text(one, "id") == number and isinstance(one.get("names"), list):
                    yield from (name for name in one["names"] if isinstance(name, str))
    else:
        for path in _oci_configurations(number):
            told = _json(path)
            yield _in_pod(told.get("annotations") if isinstance(told, dict) else None)


def _in_pod(annotations: Any) -> str:
    """Return the name of a Kubernetes container: its namespace, pod and own name."""
    for keys in (
        ("cri.sandbox-namespace", "cri.sandbox-name", "cri.container-name"),  # containerd
        ("pod.namespace", "pod.name", "container.name"),  # CRI-O
    ):
        found = [_text(annotations, f"io.kubernetes.{key}") for key in keys]
        if any(found):
            return "/".join(filter(None, found))
    return ""


def _home(user: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(user).pw_dir
    return "/nonexistent"


def _text(where: Any, key: str) -> str:
    found = where.get(key) if isinstance(where, dict) else None
    return found if isinstance(found, str) else ""


def _json(path: str) -> Any:
    """Return what a file has, or None."""
    with suppress(OSError, ValueError, RecursionError):
        # Opening a FIFO would wait.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return json.loads(file.read(_LARGEST_FILE))
    return None
