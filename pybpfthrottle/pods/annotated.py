"""From the annotations of pods to a file of rules. Pure, but for a look at the cgroups of the node.

::

    metadata:
      annotations:
        pybpfthrottle.io/upload: 5M
        pybpfthrottle.io/download: 80mbit
        pybpfthrottle.io/traffic: internet

A pod's cgroup has its UID in its name, and is known before it exists: so is the limit.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

from pybpfthrottle.errors import LimitError
from pybpfthrottle.model import TRAFFIC_KINDS, Direction, Rate, printable

PREFIX = "pybpfthrottle.io/"
_TRAFFIC = PREFIX + "traffic"
# Of a pod that the kubelet reads from a file the API has another UID than the kubelet. Elsewhere
# anybody could give a pod this annotation, with the UID of somebody else's.
_STATIC, _STATIC_NAMESPACE = "kubernetes.io/config.hash", "kube-system"
_UID = re.compile(r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}")
# The qualities of service; pods of the best one are directly in the cgroup of all pods.
_QUALITIES = ("", "burstable", "besteffort")
_ALL_PODS = re.compile(r"(.+-)?kubepods(\.slice)?")
_DEEPEST = 3
# As long as a rule's name may be, with a UID behind it.
_LONGEST_NAME = 64 - 37

HEADING = "# Written by pybpfthrottle.pods from the annotations of this node's pods.\n"


class Pod(NamedTuple):
    """A pod that has annotations of ours."""

    name: str
    uid: str
    annotations: Mapping[str, str]


class Written(NamedTuple):
    """A file of rules, and what is wrong with annotations, a line each."""

    text: str
    mistakes: tuple[str, ...]


def pod(metadata: Any) -> Pod:
    """Return a pod from its metadata; one without our annotations has none."""
    fields = metadata if isinstance(metadata, dict) else {}
    all_of_them = fields.get("annotations")
    if not isinstance(all_of_them, dict):
        all_of_them = {}
    ours = {
        str(key): str(value) for key, value in all_of_them.items() if str(key).startswith(PREFIX)
    }
    uid = fields.get("uid", "")
    if fields.get("namespace") == _STATIC_NAMESPACE:
        uid = all_of_them.get(_STATIC, uid)
    return Pod(printable(f"{fields.get('namespace')}/{fields.get('name')}"), str(uid), ours)


def rules(pods: Iterable[Pod], tops: Sequence[str]) -> Written:
    """Return the rules of some pods, where ``tops`` are the cgroups that have the node's pods.

    A pod with a mistake in an annotation has no rule.
    """
    texts, mistakes = [], []
    # Two rules of one name would be a mistake of the whole file.
    by_uid = {one.uid: one for one in pods if one.annotations}
    for one in sorted(by_uid.values(), key=lambda each: each[:2]):
        try:
            texts.append(_rule(one, tops))
        except LimitError as error:
            mistakes.append(f"pod {one.name} is not limited: {error}")
    return Written("\n".join([HEADING, *texts]), tuple(mistakes))


def _rule(one: Pod, tops: Sequence[str]) -> str:
    if not _UID.fullmatch(one.uid):
        raise LimitError(f"its UID is {one.uid[:64]!r}")
    known = {PREFIX + str(direction): str(direction) for direction in Direction}
    lines = []
    for key, value in one.annotations.items():
        if key in known:
            lines.append(f'{known[key]} = "{_rate(key, value)}"')
        elif key == _TRAFFIC:
            if value not in TRAFFIC_KINDS:
                raise LimitError(f"{key} is {value!r}: choose from {', '.join(TRAFFIC_KINDS)}")
            lines.append(f'traffic = "{value}"')
        else:
            names = ", ".join([*known, _TRAFFIC])
            raise LimitError(f"{printable(key)} is no annotation of ours: choose from {names}")
    if not any(key in known for key in one.annotations):
        raise LimitError(f"add {' or '.join(known)}")
    name = f"{one.name[:_LONGEST_NAME]} {one.uid}"
    places = [place for top in tops for place in _places(top, one.uid)]
    head = ["[[rule]]", f"name = {_toml(name)}", f"match = {{ cgroup = {_toml(places)} }}"]
    # Else a pod could free itself by a process that is named as a server for logins is.
    return "\n".join([*head, *sorted(lines), "insist = true", ""])


def _rate(key: str, value: str) -> str:
    try:
        return Rate.parse(value).written()
    except LimitError as error:
        raise LimitError(f"{key}: {error}") from error


def _toml(value: object) -> str:
    """Return a text, or a list of texts, in TOML; nothing in it has to be escaped otherwise."""
    return json.dumps(value, ensure_ascii=False)


def _places(top: str, uid: str) -> Iterator[str]:
    """Yield where a pod's cgroup may be: the kubelet names it by itself, or as systemd does."""
    last = os.path.basename(top)
    stem = last.removesuffix(".slice")
    for quality in _QUALITIES:
        if stem == last:
            yield os.path.join(top, quality, f"pod{uid}")
        else:
            group = f"{stem}-{quality}" if quality else stem
            inside = f"{top}/{group}.slice" if quality else top
            yield f"{inside}/{group}-pod{uid.replace('-', '_')}.slice"


def tops(mount: str) -> list[str]:
    """Return the cgroups that have a node's pods, as paths below the mount of cgroup v2.

    Without any they are those of a kubelet as it is by default.
    """
    found = sorted(_search(mount, "", _DEEPEST))
    return found or ["/kubepods.slice", "/kubepods"]


def _search(mount: str, below: str, depth: int) -> Iterator[str]:
    try:
        names = [entry.name for entry in os.scandir(mount + below) if entry.is_dir()]
    except OSError:  # it has just been removed
        return
    for name in names:
        if _ALL_PODS.fullmatch(name):
            yield f"{below}/{name}"
        elif depth > 1:
            yield from _search(mount, f"{below}/{name}", depth - 1)
