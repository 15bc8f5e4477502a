"""The unit files of systemd that this program writes, as text.

The daemon has a service of its own. A limited service has a second one that keeps its limit, and a
drop-in that starts this before anything else, when the service's cgroup is there already.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Iterable, Mapping, NamedTuple, Sequence

HEADING = "# Written by pybpfthrottle"
DAEMON = "pybpfthrottle.service"
DROP_IN = "50-pybpfthrottle.conf"

_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_SHELL = "/bin/sh"

# docs/guides/service.md says what each is for.
_CAPABILITIES = (
    *("CAP_BPF", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_SYS_NICE"),
    *("CAP_SYS_PTRACE", "CAP_SYS_RESOURCE"),
)
_HARDENING = (
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "# Records of nftables' and tc's limits, and pins of BPF.",
    "RuntimeDirectory=pybpfthrottle",
    "RuntimeDirectoryMode=0700",
    "RuntimeDirectoryPreserve=yes",
    "ReadWritePaths=-/sys/fs/bpf",
    "# In a new cgroup it tries whether another program would be switched off.",
    "ProtectControlGroups=no",
    "# UDP that comes in over its limit waits, and comes back by a device of ours.",
    "DevicePolicy=closed",
    "DeviceAllow=/dev/net/tun rw",
    "PrivateTmp=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "KeyringMode=private",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "# It looks for sockets in all network namespaces.",
    "RestrictNamespaces=net",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service bpf perf_event_open setns unshare pidfd_getfd",
    "SystemCallErrorNumber=EPERM",
    "UMask=0077",
)


class Program(NamedTuple):
    """How this program is started: its words, variables that it needs, and whether from a home."""

    words: Sequence[str]
    environment: Mapping[str, str] = MappingProxyType({})
    in_home: bool = False


def quoted(word: str, *, variables: bool = True) -> str:
    """Return a word as a unit file has it, so that systemd reads this very word.

    ``variables`` says whether $ would otherwise begin one, as in commands.
    """
    text = word.replace("%", "%%")
    if variables:
        text = text.replace("$", "$$")
    if _PLAIN.fullmatch(word):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


def command(words: Iterable[str]) -> str:
    """Return a command as ``ExecStart=`` has it."""
    return " ".join(map(quoted, words))


def limit_service(unit: str) -> str:
    """Return the name of the service that keeps the limit of another one."""
    return f"pybpfthrottle-limit-{unit}"


def daemon(program: Program) -> str:
    """Return the unit of the daemon."""
    return _text(
        (
            "[Unit]",
            "Description=Bandwidth limits by rules",
            "Documentation=man:pybpfthrottle(8)",
            "After=network.target",
            "",
            "[Service]",
            *_started(program, ["daemon"]),
            "ExecReload=/bin/kill -HUP $MAINPID",
            "StateDirectory=pybpfthrottle",
            "# Rules may name programs in homes.",
            *_hardening(program, home="read-only"),
            "",
            "[Install]",
            "WantedBy=multi-user.target",
        )
    )


def limit(program: Program, unit: str, options: Sequence[str]) -> str:
    """Return the unit that keeps a service's limit; ``unit`` may be a template."""
    instance = _instance(unit)
    return _text(
        (
            "[Unit]",
            f"Description=Bandwidth limit of {instance}",
            "Documentation=man:pybpfthrottle-drop-in(8)",
            "# Also for services of the early boot; and it ends after what it limits.",
            "DefaultDependencies=no",
            "Conflicts=shutdown.target",
            f"Before=shutdown.target {instance}",
            "",
            "[Service]",
            *_started(
                program, ["--stack"], after=[f"--unit={_word(instance)}", *map(quoted, options)]
            ),
            *_hardening(program),
        )
    )


def drop_in(unit: str, systemctl: str, *, optional: bool) -> str:
    """Return the drop-in that limits a service whenever it runs.

    Without ``optional`` the service does not start if its limit is not in force.
    """
    keeper = _word(_instance(limit_service(unit)))
    failed = "exit 0" if optional else "exit 255"
    return _text(
        (
            "[Service]",
            "# Comes before all other commands of the service, in its new cgroup. 255 is failure;",
            "# any other status would mean that the service is not needed.",
            f"ExecCondition=+{_SHELL} -c '{systemctl} restart \"$$0\" || {failed}' {keeper}",
            f"ExecStopPost=-+{quoted(systemctl)} --no-block stop {keeper}",
        )
    )


def _instance(unit: str) -> str:
    """Return a unit's name; of a template, that of whichever instance the file is read for."""
    before, at, suffix = unit.rpartition("@")
    return f"{before}@%i{suffix}" if at and suffix == ".service" else unit


def _word(name: str) -> str:
    """Return the name of a unit as a word of a command, which may have a specifier."""
    return name.replace("\\", "\\\\")


def _text(lines: Iterable[str]) -> str:
    return "\n".join([f"{HEADING}; changes are lost when it writes this again.", *lines, ""])


def _started(program: Program, words: Sequence[str], *, after: Sequence[str] = ()) -> list[str]:
    """Return how it is started; ``after`` is quoted already."""
    return [
        "Type=notify",
        *(
            f"Environment={quoted(f'{name}={value}', variables=False)}"
            for name, value in program.environment.items()
        ),
        " ".join([f"ExecStart={command([*program.words, *words])}", *after]),
        "Restart=on-failure",
        "RestartSec=100ms",
    ]


def _hardening(program: Program, *, home: str = "yes") -> list[str]:
    """Return what it may not do; ``home`` says whether it may see homes."""
    return [
        f"CapabilityBoundingSet={' '.join(_CAPABILITIES)}",
        f"ProtectHome={'read-only' if program.in_home else home}",
        *_HARDENING,
    ]
