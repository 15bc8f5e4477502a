"""tools/fuzz without its guided search: a few inputs of each kind, and what it says of defects."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
from fuzzing import campaign, subjects

from pybpfthrottle import settings
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.inspection import Inspection
from pybpfthrottle.linux import process

ROOT = Path(__file__).resolve().parents[3]
each_subject = pytest.mark.parametrize("subject", ["elf", "btf", "rules", "proc"])


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What the subjects replace, as it was."""
    monkeypatch.setattr(settings, "read_trusted", settings.read_trusted)
    monkeypatch.setattr(process, "open", open, raising=False)
    from pybpfthrottle.linux import tables

    monkeypatch.setattr(tables, "contents", tables.contents)


@each_subject
def test_a_few_inputs_crash_nothing(subject):
    """Whoever wants more of them takes tools/fuzz."""
    figures = campaign.part(subject, 1, 0, 150)
    assert (figures.inputs, figures.crashes) == (150, [])


@each_subject
def test_an_input_is_known_by_its_number(subject):
    """It is the same again, wherever it is made; others differ."""
    assert campaign.source(subject, 1, 7) == campaign.source(subject, 1, 7)
    assert len({campaign.source(subject, seed, 7) for seed in range(20)}) > 5


def test_what_is_changed_is_sound():
    """A change of what is refused as it is would not be read far."""
    for data in (*subjects._small_objects(), *subjects._shipped_objects()):
        assert Inspection(data).spec.programs
    for data in (*subjects._small_types(), *subjects._shipped_types()):
        assert Btf(data).types


def test_a_defect_is_shown_with_the_number_of_its_input(monkeypatch, capsys):
    """Each kind once; all are counted, and the status is 1."""
    monkeypatch.setattr(process, "_has_ended", lambda _: 1 / 0)
    monkeypatch.setattr(campaign, "run", lambda *of: [campaign.part(*of[:4])])
    monkeypatch.setattr(sys, "argv", ["fuzz", "--inputs", "60", "--only", "proc", "--first", "5"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools/fuzz"), run_name="__main__")
    said = capsys.readouterr().out
    assert stopped.value.code == 1
    assert said.count("ZeroDivisionError('division by zero')") == 1
    assert "proc: 60 inputs, " in said and ", 0 crashes" not in said  # noqa: PT018


def test_processes_share_the_inputs():
    """Each input is tried once, whatever the number of processes."""
    nice = os.nice(0)
    figures = list(campaign.run("proc", 1, 0, campaign._AT_A_TIME + 10, 2))
    assert [one.inputs for one in figures] == [campaign._AT_A_TIME, 10]
    assert os.nice(0) == nice
