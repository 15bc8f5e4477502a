"""Run a command in a mount namespace of its own: ``python own_mounts.py -- COMMAND``.

What unshare(1) does fails where / is no mount point, as below chroot.
"""

from __future__ import annotations

import ctypes
import os
import sys

CLONE_NEWNS, MS_PRIVATE = 0x00020000, 1 << 18

if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            path = line.split()[4].decode("unicode_escape").encode("latin-1")
            # One that another is mounted over cannot be reached, and cannot be changed either.
            libc.mount(None, path, None, MS_PRIVATE, None)
    os.execvp(sys.argv[2], sys.argv[2:])
