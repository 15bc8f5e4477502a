"""What the processes of a benchmark share: where they find the code, and how they say ready."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BEFORE = os.environ.get("PYTHONPATH", "").split(os.pathsep)
_CODE = [str(ROOT), str(ROOT / "tools"), *filter(None, _BEFORE)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(_CODE)}
READY = "ready"


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module of ours."""
    return [sys.executable, "-m", module, *arguments]
