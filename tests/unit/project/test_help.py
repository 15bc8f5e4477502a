"""The help of each command, and what is made from it: manual pages, and completion of values."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import click
import pytest
from packing import manpages

from pybpfthrottle.cli import completing
from pybpfthrottle.cli.commands.bare import cli
from pybpfthrottle.linux import cgroup, process
from pybpfthrottle.linux.cgroup import Cgroup


def contexts(command, context):
    """A command and all below it."""
    yield context
    for name in command.list_commands(context) if isinstance(command, click.Group) else []:
        below = command.get_command(context, name)
        yield from contexts(below, click.Context(below, info_name=name, parent=context))


COMMANDS = list(contexts(cli, click.Context(cli, info_name="pybpfthrottle")))
BY_PATH = {context.command_path: context for context in COMMANDS}


def examples(context):
    """The command lines that the help of a command shows."""
    block = re.search(r"Examples?:\n(.*?)(?:\n\n|\Z)", context.command.epilog or "", re.S)
    return [] if block is None else [line.strip() for line in block[1].splitlines()]


@pytest.mark.parametrize("context", COMMANDS, ids=list(BY_PATH))
def test_each_help_has_examples_that_can_be_typed(context):
    """They call this command, or one below it, with options that it has."""
    shown = examples(context)
    assert [line for line in shown if context.command_path in line] != []
    for line in shown:
        for called in re.findall(r"pybpfthrottle(?: [^|)]*)?(?=[|)]|$)", line):
            words = shlex.split(called)
            path = words.pop(0)
            while words and f"{path} {words[0]}" in BY_PATH:
                path += f" {words.pop(0)}"
            if "--" in words:
                words = words[: words.index("--")]
            options = {word for word in words if word.startswith("-") and word != "-"}
            known = {name for each in BY_PATH[path].command.params for name in each.opts}
            assert options - known == set(), line


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    """The manual pages as files."""
    directory = tmp_path_factory.mktemp("man")
    for page in manpages.pages(cli):
        (directory / page.file).write_text(page.source)
    return directory


def test_there_is_a_page_for_each_command(manual):
    """Also for those of groups."""
    wanted = {path.replace(" ", "-") + ".8" for path in BY_PATH}
    assert {page.name for page in manual.iterdir()} == wanted


@pytest.mark.parametrize(
    "checker", [("mandoc", "-T", "lint", "-W", "warning"), ("groff", "-man", "-Tutf8", "-ww", "-z")]
)
def test_the_pages_are_well_formed(manual, checker):
    """Neither of the programs that show manual pages has to warn."""
    done = subprocess.run(
        [*checker, *sorted(map(str, manual.iterdir()))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("", 0)


def test_a_page_shows_what_the_help_shows(manual):
    """Its options, and its examples, word by word."""
    shown = subprocess.run(
        ["mandoc", "-T", "ascii", str(manual / "pybpfthrottle-run.8")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    text = " ".join(re.sub(r".\x08", "", shown).split())
    for line in examples(BY_PATH["pybpfthrottle run"]):
        assert line in text
    for option in ("-d, --download-limit RATE", "--user NAME[:GROUP]", "--json-file FILENAME"):
        assert option in text
    assert "Run COMMAND with its bandwidth limited, and exit with its exit status." in text


def test_roff_is_escaped():
    """A line of help that looks like roff is shown as it is."""
    command = click.Command("x", help="Does.\n\n.so /etc/passwd \\n(.g 'a' -b", epilog="'quoted")
    (page,) = manpages.pages(command)
    done = subprocess.run(
        ["mandoc", "-T", "ascii"], input=page.source, stdout=subprocess.PIPE, text=True, check=True
    )
    assert ".so /etc/passwd \\n(.g 'a' -b" in done.stdout
    assert "'quoted" in done.stdout


OF_THIS_MACHINE = {
    "--pid": str(os.getpid()),
    "--name": process.name_of(os.getpid()),
    "--user": "root",
    "--unit": "web.service",
    "--interface": "lo",
}


@pytest.mark.parametrize("option", OF_THIS_MACHINE)
def test_an_option_that_names_something_completes_it(option, monkeypatch):
    """In each command that has it, but bpf's, whose names are those of programs and maps."""
    monkeypatch.setattr(
        cgroup, "walk", lambda: [Cgroup("/x.slice"), Cgroup("/x.slice/web.service")]
    )
    wanted, found = OF_THIS_MACHINE[option], {}
    for path, context in BY_PATH.items():
        for parameter in context.command.params:
            if option in parameter.opts and not path.startswith("pybpfthrottle bpf"):
                items = parameter.shell_complete(context, wanted[:-1])
                found[path] = wanted in [item.value for item in items]
    assert found
    assert [path for path, completed in found.items() if not completed] == []


def test_only_names_that_are_harmless_are_completed():
    """Others choose them, and a shell inserts them as they are."""
    names = [
        "x1.service",
        "x-\u00e4",
        "x y",
        "x;reboot",
        "x$(id)",
        "x\nplain,rm",
        "x'",
        "x\x1b[2J",
        "-x",
    ]
    complete = completing._completer(lambda: iter([(name, "a\nb") for name in names]))
    items = complete(BY_PATH["pybpfthrottle"], cli.params[0], "")
    assert [(item.value, item.help) for item in items] == [
        ("x-\u00e4", "a\\nb"),
        ("x1.service", "a\\nb"),
    ]


def test_completing_never_fails():
    """What cannot be read is not completed: there is no place to say why."""

    def refused():
        raise PermissionError(1, "not permitted")
        yield

    assert completing._completer(refused)(BY_PATH["pybpfthrottle"], cli.params[0], "") == []
