"""The page of the documentation that says what was tested where; the data of it lie beside it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Optional

from vm import VmError
from vm.suite import AREAS, Report

BEGIN = "<!-- made by tools/vmtest --matrix, from kernels.json: -->"
END = "<!-- up to here -->"
Row = dict[str, Any]
Counts = dict[str, Any]


def row(report: Report) -> Row:
    """Return what the page says of a machine."""
    release, python = report.running()
    of_areas = {area: _counts(report, area) for area in AREAS}
    return {
        "machine": report.run.machine.name,
        "release": release,
        "arch": report.run.machine.arch,
        "python": python,
        "areas": {area: counts for area, counts in of_areas.items() if any(counts.values())},
        "boot_s": report.run.boot_s and round(report.run.boot_s, 1),
        "total_s": round(report.run.total_s),
    }


def _counts(report: Report, area: str) -> Counts:
    lacks = sorted(
        one.reason for one in report.outcomes if (one.area, one.verdict) == (area, "skipped")
    )
    return {
        "passed": report.count("passed", area),
        "failed": report.count("failed", area),
        "skipped": {reason: lacks.count(reason) for reason in lacks},
    }


def update(page: Path, reports: Iterable[Report]) -> None:
    """Write new rows, in place of older ones of the same machines, and the page.

    An area that was not tested now keeps its figures, but only of the same kernel and Python.
    """
    data = page.with_suffix(".json")
    rows: dict[str, Row] = {one["machine"]: one for one in load(data)}
    for report in reports:
        if not report.outcomes:  # It did not get to its end.
            continue
        new = row(report)
        old = rows.get(new["machine"])
        if old and all(old[key] == new[key] for key in ("release", "arch", "python")):
            new["areas"] = {**old["areas"], **new["areas"]}
        rows[new["machine"]] = new
    text = written(page.read_text(), list(rows.values()))
    data.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    page.write_text(text)


def load(data: Path) -> list[Row]:
    """Return the rows that a page is made of."""
    rows: list[Row] = json.loads(data.read_text()) if data.exists() else []
    return rows


def written(text: str, rows: list[Row]) -> str:
    """Return a page with the tables of these rows."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise VmError(f"the page has no lines {BEGIN} and {END}")
    return "\n".join([f"{before}{BEGIN}", "", *_tables(rows), "", f"{END}{after}"])


def _tables(rows: list[Row]) -> Iterable[str]:
    yield f"| kernel | processor | Python | {' | '.join(map(_title, AREAS))} | boots in |"
    yield f"|---|---|---|{'---|' * len(AREAS)}---:|"
    for one in rows:
        figures = " | ".join(_figures(one["areas"].get(area)) for area in AREAS)
        boot = f"{one['boot_s']:.0f} s" if one["boot_s"] else ""
        yield f"| {one['release']} | {one['arch']} | {one['python']} | {figures} | {boot} |"
    yield ""
    lacks = {one["machine"]: _lacks(one) for one in rows}
    reasons = sorted(set().union(*lacks.values()))
    if reasons:
        yield f"| tests that are skipped | {' | '.join(lacks)} |"
        yield f"|---|{'---:|' * len(lacks)}"
    for reason in reasons:
        counts = (str(counted[reason] or "") for counted in lacks.values())
        yield f"| {_plain(reason)} | {' | '.join(counts)} |"


def _lacks(row: Row) -> Counter[str]:
    """Return how many tests a machine has skipped, by what they need."""
    total: Counter[str] = Counter()
    for counts in row["areas"].values():
        total.update(counts["skipped"])
    return total


def _title(area: str) -> str:
    return f"`{area}`" if area.startswith("-") else area


def _figures(counts: Optional[Counts]) -> str:
    if counts is None:
        return ""
    failed = f", **{counts['failed']} failed**" if counts["failed"] else ""
    skipped = sum(counts["skipped"].values())
    return f"{counts['passed']} passed{failed}" + (f", {skipped} skipped" if skipped else "")


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
