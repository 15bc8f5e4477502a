"""verify-setup and inspect as their users see them."""

from __future__ import annotations

import json
import re

import pytest
from since import since


def test_a_terminal_shows_sections_marks_and_a_panel(tool, scratch):
    """Colours, and the conclusion in a box."""
    process, terminal = tool.start_on_terminal("verify-setup", "--cgroup", scratch.cgroup().path)
    assert tool.finish(process).status == 0
    text = terminal.text
    assert "\x1b[1mTrials\x1b[0m" in text
    assert "\x1b[32m  ✓ a minimal program: " in text
    assert "╭" in text
    assert "This machine can limit" in text


@since("5.7")
def test_no_color_is_plain_text(tool, scratch):
    """A terminal with NO_COLOR gets no escape sequences."""
    process, terminal = tool.start_on_terminal(
        "verify-setup", "--cgroup", scratch.cgroup().path, environment={"NO_COLOR": "1"}
    )
    assert tool.finish(process).status == 0
    assert "\x1b" not in terminal.text
    assert "✓ This machine can limit (W: works)" in terminal.text


def test_a_pipe_gets_plain_text(tool, scratch):
    """Nothing but text, and all sections."""
    result = tool.run("verify-setup", "--cgroup", scratch.cgroup().path)
    assert (result.status, result.err) == (0, "")
    assert "\x1b" not in result.text
    for section in ("Python", "Kernel", "Privileges", "Cgroups", "Trials", "Kernel log"):
        assert f"\n{section}\n" in "\n" + result.text


def test_verbose_has_the_evidence_of_what_passed(tool):
    """And without it has not."""
    shown = [tool.run("verify-setup", *options).text for options in ([], ["-v"])]
    assert ["BPF_MAP_CREATE of nothing" in text for text in shown] == [False, True]


def test_what_does_not_work_has_evidence_and_remedy(tool, anybody):
    """Without privileges the exit status is 1, and there is something to do."""
    result = tool.run("verify-setup", prefix=anybody)
    assert result.status == 1
    assert "✗ FAIL capabilities: CAP_BPF and CAP_NET_ADMIN missing" in result.text
    assert "      CapEff: 0000000000000000" in result.text
    assert "✗ This process lacks capabilities (P: not-privileged)" in result.text
    assert "  Remedy: run it as root (sudo)" in result.text
    assert "- a minimal program: rights.commands did not pass" in result.text


def test_without_privileges_the_rest_is_examined(tool, anybody):
    """What needs none passes."""
    found = json.loads(tool.run("verify-setup", "--json", prefix=anybody).text)
    outcomes = {check["id"]: check["outcome"] for check in found["checks"]}
    assert outcomes["cgroup.v2"] == outcomes["objects"] == outcomes["kernel.bpf"] == "pass"
    assert outcomes["trial.load"] == "skip"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pid", "1", "--unit", "x"], "give one of --pid, --cgroup and --unit"),
        (["--pid", "0"], "0 is not in the range"),
        (["--report", "/nowhere/at/all"], "No such file or directory"),
    ],
)
def test_wrong_usage_has_status_2(tool, options, message):
    """And one line that says what is wrong."""
    result = tool.run("verify-setup", *options)
    assert message in result.usage_error
    assert result.status == 2


@since("5.7")
def test_the_root_cgroup_is_tried_on_request(tool):
    """By the environment variable as by the option."""
    variables = {"PYBPFTHROTTLE_TEST_ROOT_CGROUP": "1"}
    for result in (
        tool.run("verify-setup", "--root-cgroup"),
        tool.run("verify-setup", environment=variables),
    ):
        assert '✓ attach to the root cgroup: 🧪 TEST MODE: Using root cgroup "' in result.text


def test_inspect_shows_an_object(tool, anybody):
    """Programs, attach types and maps, without privileges."""
    path = f"{tool.path}/prebuilt/throttle.bpfel.o"
    result = tool.run("inspect", path, prefix=anybody)
    assert result.status == 0
    assert re.search(
        r"pybpft_ingress +cgroup_skb/ingress +cgroup_skb +cgroup_inet_ingress", result.text
    )
    assert re.search(r"CGROUP_STATS +percpu_array", result.text)
    found = json.loads(tool.run("inspect", "--json", path, prefix=anybody).text)
    assert [program["name"] for program in found["programs"]] == [
        "pybpft_adopt",
        "pybpft_belongs",
        "pybpft_ingress",
        "pybpft_egress",
        "pybpft_egresscn",
        "pybpft_sockops",
        "pybpft_sockopsp",
    ]
    assert found["faults"] == []


def test_inspect_names_what_is_no_object(tool, tmp_path):
    """One line, status 1; a file that is not there is wrong usage."""
    other = tmp_path / "other"
    other.write_text("text")
    result = tool.run("inspect", str(other))
    assert result.status == 1
    assert result.err == f"pybpfthrottle: error: {other}: not an ELF file\n"
    assert tool.run("inspect", str(tmp_path / "none")).status == 2


def test_inspect_warns_of_sections_without_a_direction(tool, tmp_path, repository):
    """The old section name, which says nothing of the attach type."""
    data = (repository / "prebuilt" / "throttle.bpfel.o").read_bytes()
    name = b"cgroup_skb/ingress\0"
    old = tmp_path / "old.o"
    old.write_bytes(data.replace(name, b"cgroup/skb".ljust(len(name), b"\0")))
    text = tool.run("inspect", str(old)).text
    assert "warning: pybpft_ingress: the section 'cgroup/skb' names no direction" in text
