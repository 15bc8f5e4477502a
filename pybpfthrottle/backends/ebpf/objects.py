"""The shipped objects, from a wheel, an editable install, a bare checkout or a zip."""

from __future__ import annotations

import os
import sys
from typing import Any

from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.errors import ObjectFileError


def read(name: str) -> ObjectSpec:
    """Read the object with this name for the byte order of this machine, such as "throttle"."""
    target = "bpfel" if sys.byteorder == "little" else "bpfeb"
    return elf.read_object(data(f"{name}.{target}.o"), name=name)


def data(file_name: str) -> bytes:
    """The bytes of a file of prebuilt/. Raises ObjectFileError if it is not there."""
    # The import system's own loader reads from directories and from zip files.
    loader: Any = __spec__.loader
    package = os.path.abspath(__file__)
    for _ in ("objects.py", "ebpf", "backends"):
        package = os.path.dirname(package)
    # In a wheel prebuilt/ is inside of the package, in a checkout beside it.
    for directory in (package, os.path.dirname(package)):
        try:
            found: bytes = loader.get_data(os.path.join(directory, "prebuilt", file_name))
        except OSError:
            continue
        return found
    raise ObjectFileError(f"prebuilt/{file_name} is missing: this installation is incomplete")
