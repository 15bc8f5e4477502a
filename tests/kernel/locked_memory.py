"""Without the right to lock more memory."""

from __future__ import annotations

import sys

# Of include/uapi/linux/capability.h and prctl.h; drops one for good.
PR_CAPBSET_DROP, CAP_SYS_RESOURCE = 24, 24
PROBE = (
    "from pybpfthrottle.bpf import maps; from pybpfthrottle.bpf.abi import MapType;"
    " from pybpfthrottle.bpf.obj.specs import MapSpec; import resource;"
    " resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0));"
    " maps.create(MapSpec('probe', MapType.ARRAY, 4, 4, 1))"
)


def without_sys_resource(*command: str) -> list[str]:
    """A command line that runs a command as root without CAP_SYS_RESOURCE."""
    drop = (
        "import ctypes, os, sys;"
        f" ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_SYS_RESOURCE}, 0, 0, 0);"
        " os.execvp(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", drop, *command]
