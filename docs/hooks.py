"""What mkdocs generates at each build: pages, or parts of them, that the program itself tells.

A comment such as ``<!-- generated: cli -->`` in a page is replaced by what one of these gives.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any, Callable, Iterator

import click

ROOT = Path(__file__).resolve().parent.parent
_PLACE = re.compile(r"^<!-- generated: (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what is generated; mkdocs calls this for each page."""
    return _PLACE.sub(lambda place: "\n".join(_GENERATED[place[1]]()), markdown)


def command_line() -> Iterator[str]:
    """Each command: what it does, its options, its examples."""
    from pybpfthrottle.cli.commands.bare import cli

    yield from _command(cli, click.Context(cli, info_name="pybpfthrottle"))


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    yield from ("", f"## {context.command_path}", "")
    yield from ("```text", _usage(command, context), "```", "", _text(command.help), "")
    yield from _options(command, context)
    if command.epilog:
        yield from ("```text", _plain(command.epilog), "```", "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from _command(below, click.Context(below, info_name=name, parent=context))


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    records = [record for each in command.get_params(context) if (record := _record(each, context))]
    if records:
        yield from ("| option | meaning |", "|---|---|", *records, "")


def _record(parameter: click.Parameter, context: click.Context) -> str:
    shown = parameter.get_help_record(context)
    if shown is None or isinstance(parameter, click.Argument) or "--help" in parameter.opts:
        return ""
    names, meaning = (" ".join(part.split()) for part in shown)
    return f"| `{names}` | {_escaped(meaning)} |"


def _text(text: Any) -> str:
    return _escaped(inspect.cleandoc(text or "").replace("\b\n", ""))


def _plain(text: str) -> str:
    return inspect.cleandoc(text.replace("\b\n", "")).strip()


def _escaped(text: str) -> str:
    """Markdown that shows this very text."""
    return re.sub(r"([<*_|])", r"\\\1", text)


def decision_tree() -> Iterator[str]:
    """The questions of verify-setup as a nested list."""
    from pybpfthrottle.diagnostics import decision

    yield from _node(decision.TREE, 0)


def _node(node: Any, depth: int) -> Iterator[str]:
    from pybpfthrottle.diagnostics import decision

    # The tree leans to one side: what the longer answer leads to stays at its level.
    while isinstance(node, decision.Question):
        shorter, longer = sorted((node.no, node.yes), key=_size)
        yield f"{'    ' * depth}- **{node.text}**"
        yield from _answer(node, shorter, depth + 1)
        if isinstance(longer, decision.Conclusion):
            yield from _answer(node, longer, depth + 1)
        node = longer


def _answer(question: Any, answer: Any, depth: int) -> Iterator[str]:
    from pybpfthrottle.diagnostics import decision

    word = "yes" if question.yes is answer else "no"
    if isinstance(answer, decision.Conclusion):
        yield f"{'    ' * depth}- {word}: [{answer.title}](#{answer.id})"
    else:
        yield f"{'    ' * depth}- {word}:"
        yield from _node(answer, depth + 1)


def _size(node: Any) -> int:
    from pybpfthrottle.diagnostics import decision

    return len(list(decision.conclusions(node)))


def conclusions() -> Iterator[str]:
    """All that verify-setup may conclude, with causes and remedies."""
    from pybpfthrottle.diagnostics import decision

    for found in dict.fromkeys(decision.conclusions(decision.TREE)):
        yield from ("", f"### {found.title} {{ #{found.id} }}", "")
        yield f"`{found.id}`, scenario {found.scenario}"
        yield ""
        for word, text in (
            ("Symptoms", found.symptoms),
            ("Cause", found.cause),
            ("Remedy", found.remedy),
        ):
            if text:
                yield f"- {word}: {_escaped(text)}"


def changelog() -> Iterator[str]:
    """The file beside README, without its heading."""
    yield (ROOT / "CHANGELOG.md").read_text().partition("\n")[2]


def face() -> Iterator[str]:
    """What ``import pybpfthrottle`` offers."""
    yield from _documented("pybpfthrottle")


def toolkit() -> Iterator[str]:
    """What the toolkit offers: its face, or its modules where it has none."""
    package = importlib.import_module("pybpfthrottle.bpf")
    if hasattr(package, "__all__"):
        yield from _documented("pybpfthrottle.bpf")
        return
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            yield from (f"::: pybpfthrottle.bpf.{module.name}", "")


def _documented(package: str) -> Iterator[str]:
    for name in importlib.import_module(package).__all__:
        yield from (f"::: {package}.{name}", "")


_GENERATED: dict[str, Callable[[], Iterator[str]]] = {
    "api": face,
    "changelog": changelog,
    "cli": command_line,
    "conclusions": conclusions,
    "decision-tree": decision_tree,
    "toolkit": toolkit,
}
