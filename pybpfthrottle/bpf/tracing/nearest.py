"""Names that a wrong one may have been meant for."""

from __future__ import annotations

import difflib
from typing import Iterable

# Comparing with each of a binary's 100,000 names would take seconds.
_COMPARED = 3000


def hint(wrong: str, names: Iterable[str]) -> str:
    """Return "; did you mean a, b?" with up to three names, or nothing."""
    begin = wrong[:2].lower()
    alike = {name for name in names if name[:2].lower() == begin or wrong in name}
    # Of many, those of about the same length.
    nearby = sorted(alike, key=lambda name: (abs(len(name) - len(wrong)), name))[:_COMPARED]
    found = difflib.get_close_matches(wrong, nearby, n=3)
    return f"; did you mean {', '.join(found)}?" if found else ""
