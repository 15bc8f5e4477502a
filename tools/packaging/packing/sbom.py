"""The software bill of materials, in CycloneDX 1.5: what the package has, and what it needs."""

from __future__ import annotations

import configparser
import hashlib
import json
import re
import uuid
from pathlib import Path
from typing import Any, Iterator

from pybpfthrottle import __version__

ROOT = Path(__file__).resolve().parents[3]
NAME = "pybpfthrottle.cdx.json"
_PURL = f"pkg:pypi/pybpfthrottle@{__version__}"
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;\s*(.*))?")
# Extras of users; the others are for developers.
_EXTRAS = ("config", "fleet", "plot", "tui")


def text() -> str:
    """Return it as JSON, the same for the same sources."""
    return json.dumps(document(), indent=2) + "\n"


def document() -> dict[str, Any]:
    """Return it."""
    components = [*_objects(), *_requirements()]
    needed = [one["bom-ref"] for one in components if one.get("scope") == "required"]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, _PURL)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": _PURL,
                "name": "pybpfthrottle",
                "version": __version__,
                "purl": _PURL,
                "licenses": [{"license": {"id": "MIT"}}],
            }
        },
        "components": components,
        "dependencies": [
            {"ref": _PURL, "dependsOn": needed},
            *({"ref": one["bom-ref"]} for one in components),
        ],
    }


def _objects() -> Iterator[dict[str, Any]]:
    """Yield the BPF objects, which are compiled beforehand."""
    for path in sorted((ROOT / "prebuilt").glob("*.o")):
        yield {
            "type": "file",
            "bom-ref": f"prebuilt/{path.name}",
            "name": f"pybpfthrottle/prebuilt/{path.name}",
            "scope": "required",
            "licenses": [{"expression": "MIT OR GPL-2.0-only"}],
            "hashes": [
                {"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}
            ],
        }


def _requirements() -> Iterator[dict[str, Any]]:
    """Yield the Python packages that are needed, and those of extras, each once."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    wanted = [("required", line) for line in _lines(settings["options"]["install_requires"])]
    extras = settings["options.extras_require"]
    for extra in _EXTRAS:
        wanted += [("optional", line) for line in _lines(extras.get(extra, ""))]
    found: dict[str, dict[str, Any]] = {}
    for scope, line in wanted:
        name, versions, _ = _REQUIREMENT.match(line).groups()  # type: ignore[union-attr]
        purl = f"pkg:pypi/{name.lower()}"
        found.setdefault(
            purl,
            {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "purl": purl,
                "scope": scope,
                "properties": [{"name": "pybpfthrottle:versions", "value": versions.strip()}],
            },
        )
    yield from found.values()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
