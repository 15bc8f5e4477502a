"""The tool on a kernel that adopts no open connections: ``python unadopted.py ARGUMENTS``.

The program that adopts them is changed to one that the kernel refuses, as those before Linux 5.15
refuse it as it is.
"""

from __future__ import annotations

from pybpfthrottle.__main__ import main
from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.programs import Role, Scope
from pybpfthrottle.bpf.abi import AttachType


def refuse() -> None:
    """Have this process's kernel refuse it from now on."""
    (adopter,) = programs.with_role(Role.ADOPT)
    for name in (*map(programs.object_for, Scope), programs.ENTRIES):
        adopting = programs.read(name).programs[adopter.name]
        adopting.expected_attach_type = AttachType.CGROUP_INET_INGRESS


if __name__ == "__main__":
    refuse()
    main()
