"""What bpftool loads, and what it tells, to compare ours with."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from compiled import compiled


def load_by_bpftool(name: str, bpffs: Path, *flags: str) -> None:
    """Pin all programs of a fixture below bpffs/programs, and its maps below bpffs/maps."""
    with tempfile.NamedTemporaryFile(prefix=name, suffix=".o") as file:
        file.write(compiled(name, *flags))
        file.flush()
        done = subprocess.run(
            [
                "bpftool",
                "prog",
                "loadall",
                file.name,
                f"{bpffs}/programs",
                "pinmaps",
                f"{bpffs}/maps",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, done.stdout.decode()


def bpftool(*arguments: str) -> Any:
    """What bpftool prints as JSON."""
    done = subprocess.run(["bpftool", "-j", *arguments], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)
