"""The options and the output of benchmarks that come to one small table."""

from __future__ import annotations

import argparse
import json
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--rounds", type=int, default=9, help="rounds; the best or the median counts"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(table: dict[str, dict[str, Any]], *, as_json: bool) -> int:
    """Print a row for each name, or all as JSON; the exit status."""
    if as_json:
        print(json.dumps(table, indent=2))
        return 0
    width = max(map(len, table))
    for name, row in table.items():
        print(f"{name:<{width}}  " + "  ".join(f"{key} {value:>6}" for key, value in row.items()))
    return 0
