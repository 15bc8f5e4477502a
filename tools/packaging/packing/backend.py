"""The build backend: setuptools, with the files for /usr/share made anew before each build."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The commands are asked for their help.
_OF_THE_COMMANDS = ["click >= 8.1"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what a build needs besides setuptools."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_OF_THE_COMMANDS]


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """Return what a build needs besides setuptools."""
    return [*build_meta.get_requires_for_build_sdist(config_settings), *_OF_THE_COMMANDS]


def build_wheel(directory: str, config_settings: Any = None, metadata: Any = None) -> str:
    """Build a wheel with manual pages and completion."""
    _write_share()
    name: str = build_meta.build_wheel(directory, config_settings, metadata)
    _add_sbom(Path(directory, name))
    return name


def build_sdist(directory: str, config_settings: Any = None) -> str:
    """Build an sdist with manual pages and completion."""
    _write_share()
    name: str = build_meta.build_sdist(directory, config_settings)
    return name


def _add_sbom(wheel: Path) -> None:
    """Put the SBOM where PEP 770 says, and into the wheel's record of its files."""
    from packing import sbom

    text = sbom.text().encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
    old = wheel.rename(wheel.with_suffix(".old"))
    with zipfile.ZipFile(old) as before, zipfile.ZipFile(wheel, "w") as after:
        for info in before.infolist():
            content = before.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                place = info.filename.replace("RECORD", f"sboms/{sbom.NAME}")
                content = f"{place},sha256={digest},{len(text)}\n".encode() + content
                after.writestr(place, text, zipfile.ZIP_DEFLATED)
            after.writestr(info, content, zipfile.ZIP_DEFLATED)
    old.unlink()


def _write_share() -> None:
    import sys

    sys.path.insert(0, "")  # a backend is called in the directory of the sources
    from packing import share

    share.write(Path("share"))
