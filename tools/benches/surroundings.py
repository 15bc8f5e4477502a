"""What the processes of a benchmark share: the code, compiled, and how they say ready."""

from __future__ import annotations

import compileall
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parents[2]
_BEFORE = os.environ.get("PYTHONPATH", "").split(os.pathsep)
_CODE = [str(ROOT), str(ROOT / "tools"), *filter(None, _BEFORE)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(_CODE)}
READY = "ready"


@contextmanager
def compiled() -> Iterator[None]:
    """Have modules compiled ahead, as in an installed package: our helpers start twice as fast."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        sys.pycache_prefix = directory
        for environment in (os.environ, ENVIRONMENT):
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            environment["PYTHONPYCACHEPREFIX"] = directory
        compileall.compile_dir(ROOT / "pybpfthrottle", quiet=1)
        yield


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module of ours."""
    return [sys.executable, "-m", module, *arguments]
