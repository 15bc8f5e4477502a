"""The parts of tools/rescue that need no machine: its console, and the page that it writes."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
from pathlib import Path

import pytest
from vm import VmError, rescue
from vm.console import Console
from vm.kernels import Kernel

ROOT = Path(__file__).resolve().parents[3]
# A shell with the prompt "> ", and an end of lines as a terminal has it.
SHELL = r"""
printf 'booted\r\n\033[6n> '
while read -r line; do
    printf '%s\r\n' "$line"
    [ "$line" = end ] && exit
    eval "$line"
    printf '> '
done
"""


@pytest.fixture
def shell():
    """A process that stands for a machine."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["sh", "-c", SHELL], **pipes) as process:
        yield process
        process.kill()


def tool():
    """tools/rescue as a module."""
    loader = importlib.machinery.SourceFileLoader("rescue_tool", str(ROOT / "tools/rescue"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("rescue_tool", loader))
    loader.exec_module(module)
    return module


def test_a_console_shows_what_a_command_prints(shell):
    """Without the echo, the prompt, and what is asked of a terminal."""
    console = Console(shell, "> ", 20)
    assert console.wait_for_prompt() == "booted\n"
    assert console.type("printf 'a\\303'; sleep 0.1; printf '\\244\\r\\n'") == "aä\n"
    console.type_last("end")
    assert console.text.startswith("booted\n> printf")
    assert console.text.endswith("> end\n")


def test_a_machine_that_stops_is_no_prompt(shell):
    """The error has what was seen last."""
    console = Console(shell, "> ", 20)
    console.wait_for_prompt()
    with pytest.raises(VmError, match="has stopped; it said last:\nbooted"):
        console.type("exit 1")


def test_a_machine_that_says_nothing_is_too_slow(shell):
    """It is not waited for without an end."""
    console = Console(shell, "$ ", 0.5)
    with pytest.raises(VmError, match="was too slow"):
        console.wait_for_prompt()


def test_the_session_goes_into_the_page(tmp_path):
    """With the size of the image, the time to the prompt, and the ratio."""
    (tmp_path / "vmlinuz").write_bytes(bytes(2_000_000))
    made = rescue.Image(Kernel("6.12", "x86_64", tmp_path / "vmlinuz"), bytes(3_000_000))
    session = rescue.Session("rescue:~# poweroff \n", 4.4, "0.97")
    module = tool()
    page = module.page(f"Before\n{module.BEGIN}\nold\n{module.END}\nAfter\n", session, made)
    assert "```text\nrescue:~# poweroff\n```\n" in page
    assert "The initramfs has 3 MB uncompressed, the kernel 2 MB. It took 4 s" in page
    assert (page.startswith("Before\n"), page.endswith("\nAfter\n"), "old" in page) == (
        *(True, True),
        False,
    )
    with pytest.raises(VmError, match="has no lines"):
        module.page("Before\n", session, made)


def test_the_page_has_a_session():
    """The guide shows what was done last, to the end."""
    text = (ROOT / "docs/guides/rescue.md").read_text()
    module = tool()
    session = text.partition(module.BEGIN)[2].partition(module.END)[0]
    for step in rescue.STEPS:
        assert step.command.partition(" {")[0] in session
    assert session.count(rescue.PROMPT) == len(rescue.STEPS) + 1
