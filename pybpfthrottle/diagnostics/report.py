"""An examination as plain text, as JSON, and as a file to attach to a bug report."""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
from typing import Any, Iterator

from pybpfthrottle import __version__
from pybpfthrottle.diagnostics import decision
from pybpfthrottle.diagnostics.check import Check, Outcome, Result
from pybpfthrottle.diagnostics.decision import Conclusion, Step
from pybpfthrottle.diagnostics.examine import Examination
from pybpfthrottle.model import printable

SCHEMA = 1
MARKS = {
    Outcome.PASS: "✓",
    Outcome.WARN: "⚠",
    Outcome.FAIL: "✗ FAIL",
    Outcome.SKIP: "-",
}
_FIRST_USER = 1000
_NOBODY = 65534


def write(path: str, examination: Examination) -> None:
    """Write the report to a file; ``-`` is standard output. Raises OSError."""
    text = for_bug_report(examination)
    if path == "-":
        print(text, end="")
        return
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def lines(examination: Examination, *, evidence: bool) -> Iterator[str]:
    """Yield plain text for people: each section, the path through the tree, the conclusion.

    Checks that did not pass come with evidence and remedy; with ``evidence`` those that passed
    come with their evidence too.
    """
    for section, results in examination.sections().items():
        yield section
        for check, result in results:
            yield f"  {headline(check, result)}"
            yield from (f"      {line}" for line in details(check, result, evidence=evidence))
    yield "Decision"
    yield from (f"  {told} {other}".rstrip() for told, other in steps(examination.path))
    yield ""
    yield from conclusion_lines(examination)


def headline(check: Check, result: Result) -> str:
    """Return a check's mark, title and finding."""
    return printable(f"{MARKS[result.outcome]} {check.title}: {result.text}")


def details(check: Check, result: Result, *, evidence: bool) -> Iterator[str]:
    """Yield the lines below a headline."""
    trouble = result.outcome in (Outcome.WARN, Outcome.FAIL)
    if evidence or trouble:
        yield from map(printable, result.evidence)
    if trouble and check.remedy:
        yield f"→ {check.remedy}"


def steps(path: list[Step]) -> Iterator[tuple[str, str]]:
    """Yield each question with its answer, and where the other answer would have led."""
    for number, (question, answer) in enumerate(path):
        branch = "╰" if number == len(path) - 1 else "├"
        others = decision.conclusions(question.no if answer else question.yes)
        named = ", ".join(conclusion.id for conclusion in others)
        told = f"{branch} {question.text} {'yes' if answer else 'no'}"
        yield told, f"({'no' if answer else 'yes'}: {named})"


def conclusion_lines(examination: Examination) -> Iterator[str]:
    """Yield the conclusion with its symptoms, cause and remedy."""
    conclusion = examination.conclusion
    yield f"{'✓' if conclusion.works else '✗'} {conclusion.title} ({_name(conclusion)})"
    for label, text in (
        ("Symptoms", conclusion.symptoms),
        ("Cause", conclusion.cause),
        ("Remedy", conclusion.remedy),
    ):
        if text:
            yield f"  {label}: {text}"
    for reason in examination.reasons():
        yield f"  Found: {printable(reason.text)}"


def _name(conclusion: Conclusion) -> str:
    return f"{conclusion.scenario}: {conclusion.id}"


def to_json(examination: Examination) -> dict[str, Any]:
    """Return the examination for programs.

    Within one ``schema`` number, fields and values may be added, but not changed or removed.
    """
    conclusion = examination.conclusion
    fields = ("id", "scenario", "title", "symptoms", "cause", "remedy")
    return {
        "schema": SCHEMA,
        "version": __version__,
        "works": conclusion.works,
        "conclusion": {
            **{field: getattr(conclusion, field) for field in fields},
            "reasons": [result.text for result in examination.reasons()],
        },
        "path": [
            {"question": step.question.text, "answer": step.answer} for step in examination.path
        ],
        "checks": [
            {
                **{
                    field: getattr(check, field)
                    for field in ("id", "section", "title", "meaning", "remedy")
                },
                "outcome": result.outcome.value,
                "text": result.text,
                "cause": result.cause,
                "evidence": list(result.evidence),
            }
            for check, result in examination.results
        ],
    }


def for_bug_report(examination: Examination) -> str:
    """Return everything except user names, the host name and addresses."""
    text = "\n".join(lines(examination, evidence=True))
    return redact(f"pybpfthrottle {__version__} verify-setup\n\n{text}\n")


def redact(text: str) -> str:
    """Remove whatever identifies the machine or its users."""
    for name in sorted(_user_names(), key=len, reverse=True):
        text = _without(text, name, "<user>")
    host = os.uname().nodename
    for name in (host, host.partition(".")[0]):
        text = _without(text, name, "<host>")
    text = re.sub(r"\b(?:[0-9a-f]{2}[:-]){5,}[0-9a-f]{2}\b", "<address>", text, flags=re.I)
    text = re.sub(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.]*\d)", _without_address, text)
    return re.sub(r"[0-9a-fA-F]*:[0-9a-fA-F:]*:[0-9a-fA-F]*", _without_address, text)


def _without(text: str, name: str, placeholder: str) -> str:
    """Replace a name, even as part of another one: user-alice.slice."""
    if not name:
        return text
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", placeholder, text)


def _without_address(found: re.Match[str]) -> str:
    """Replace the longest prefix that is an address: a port may follow it."""
    candidate, rest = found[0], ""
    while candidate:
        try:
            ipaddress.ip_address(candidate)
        except ValueError:
            candidate, colon, last = candidate.rpartition(":")
            rest = colon + last + rest
        else:
            return "<address>" + rest
    return found[0]


def _user_names() -> set[str]:
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")}
    names |= {entry.pw_name for entry in pwd.getpwall() if _FIRST_USER <= entry.pw_uid < _NOBODY}
    return names - {"", "root"}
