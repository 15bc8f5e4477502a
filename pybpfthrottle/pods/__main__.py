"""Limit the pods of this node by their annotations; runs the daemon that does it.

It is what the DaemonSet runs: ``python -m pybpfthrottle.pods``.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from typing import Any, NoReturn, Optional, Sequence

from pybpfthrottle.errors import Error, SettingsError, ThrottleError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import process, run_files
from pybpfthrottle.pods import annotated
from pybpfthrottle.pods.annotated import Pod
from pybpfthrottle.pods.api import Cluster
from pybpfthrottle.rules import instance

log = logging.getLogger("pybpfthrottle.pods")

_DIRECTORY = "/run/pybpfthrottle-pods"
_FILE = "pods.toml"
_PATIENCE_S = 30.0
_STEP_S = 0.02
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Daemon:
    """The daemon, which reads the rules in a directory. ``with`` ends it."""

    def __init__(self, directory: str) -> None:
        command = [sys.executable, "-m", "pybpfthrottle", "daemon", directory]
        self._process = subprocess.Popen(command, cwd=process.PACKAGE_ROOT)

    def wait_until_ready(self) -> None:
        """Wait until it has read the rules. Raises ThrottleError."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._own() is None:
            if self._process.poll() is not None:
                raise ThrottleError("the daemon has ended; it has said why")
            if time.monotonic() > deadline:
                raise ThrottleError("the daemon does not begin")
            time.sleep(_STEP_S)

    def reload(self) -> None:
        """Have it read the rules again. Raises ThrottleError."""
        keeps = self._own()
        if keeps is None:
            raise ThrottleError("the daemon has ended; it has said why")
        keeps.reload()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def _own(self) -> Optional[instance.Instance]:
        """Return it as others see it, once it has put its rules in force."""
        found = instance.current()
        mine = found is not None and found.owner.pid == self._process.pid and found.looked
        return found if mine else None


class Node:
    """The rules of a node's pods, in a file."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, _FILE)
        self._text = ""
        self._said: frozenset[str] = frozenset()
        self._tops: list[str] = []

    def write(self, pods: dict[str, Pod], daemon: Optional[Daemon] = None) -> None:
        """Write the rules of all pods; a change is told to the daemon."""
        # The kubelet may have made its cgroups meanwhile.
        self._tops = annotated.tops(cgroups.mount().path)
        written = annotated.rules(pods.values(), self._tops)
        for mistake in written.mistakes:
            if mistake not in self._said:
                log.warning("%s", mistake)
        self._said = frozenset(written.mistakes)
        if written.text != self._text:
            run_files.write(self._path, written.text)
            self._text = written.text
            if daemon is not None:
                daemon.reload()


def follow(cluster: Cluster, name: str, node: Node, daemon: Daemon) -> NoReturn:
    """Keep the rules as the pods' annotations say, whatever becomes of the API."""
    pause_s = _SHORTEST_PAUSE_S
    while True:
        try:
            pods, version = cluster.pods(name)
            node.write(pods, daemon)
            pause_s = _SHORTEST_PAUSE_S
            for event in cluster.changes(name, version):
                if event.gone:
                    pods.pop(event.uid, None)
                else:
                    pods[event.uid] = event.pod
                node.write(pods, daemon)
        except OSError as error:
            log.warning("%s; the limits stay as they are", error.strerror or error)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run until SIGTERM; return the exit status."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, _end)
    try:
        if not given.node:
            raise SettingsError("the name of the node is missing: set NODE_NAME, or give --node")
        cluster = Cluster(given.api, given.account) if given.api else Cluster.around(os.environ)
        node = Node(given.directory)
        node.write({})
        with Daemon(given.directory) as daemon:
            daemon.wait_until_ready()
            follow(cluster, given.node, node, daemon)
    except Error as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        return 0


def _end(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pybpfthrottle.pods",
        description="Limit the pods of this node by their annotations, such as"
        " pybpfthrottle.io/upload: 5M. Runs in a DaemonSet.",
    )
    options: dict[str, Any] = {
        "--node": {"default": os.environ.get("NODE_NAME"), "help": "its name (NODE_NAME)"},
        "--directory": {"default": _DIRECTORY, "help": f"where to write rules ({_DIRECTORY})"},
        "--api": {"metavar": "URL", "help": "the API server (by default that of this pod)"},
        "--account": {
            "metavar": "DIRECTORY",
            "default": "/var/run/secrets/kubernetes.io/serviceaccount",
            "help": "where ca.crt and token of a service account are",
        },
    }
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
