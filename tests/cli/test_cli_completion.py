"""The command line is completed by real shells."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pybpfthrottle.cli import completion


@pytest.fixture
def shell(tool, tmp_path):
    """Run a script in a shell that finds the command, with completion installed for it."""
    command = tmp_path / "bin/pybpfthrottle"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom pybpfthrottle.cli.app import main\nmain()\n")
    command.chmod(0o755)

    def run(*words, script, **variables):
        environment = tool.environment(
            PATH=f"{command.parent}:{os.environ['PATH']}", HOME=str(tmp_path), **variables
        )
        done = subprocess.run(
            [*words, script], env=environment, cwd=tmp_path, capture_output=True, timeout=60
        )
        return done.stdout.decode() + done.stderr.decode()

    return run


def test_fish_completes(shell):
    """Commands with what they do, options, choices, and processes by name."""
    pid = str(os.getpid())
    shown = shell(
        "fish",
        "-c",
        script="source (pybpfthrottle completion fish | psub)\n"
        'complete -C "pybpfthrottle verify-"\n'
        'complete -C "pybpfthrottle --traf"\n'
        'complete -C "pybpfthrottle switch 1 "\n'
        f'complete -C "pybpfthrottle --pid {pid[:-1]}"\n',
    )
    lines = shown.splitlines()
    assert {"--traffic", "legacy", "link"} <= {line.partition("\t")[0] for line in lines}
    assert [line for line in lines if line.startswith("verify-setup\tCheck whether limits work")]
    assert [line for line in lines if line.partition("\t")[0] == pid]


def test_bash_completes(shell):
    """The function that the script registers gives what fits."""
    shown = shell(
        *("bash", "--norc", "-c"),
        script="source <(pybpfthrottle completion bash)\n"
        "complete -p pybpfthrottle\n"
        "COMP_WORDS=(pybpfthrottle run --user roo) COMP_CWORD=3\n"
        '_pybpfthrottle_completion pybpfthrottle; echo "<${COMPREPLY[*]}>"\n',
    )
    assert "<root>" in shown.splitlines()


ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1=ready; fpath=($PWD \\$fpath); autoload -Uz compinit; compinit -u -D"
zpty -w shell "zstyle ':completion:*' list-prompt ''"
for typed in 'remo' '--user roo'; do
    zpty -n -w shell "pybpfthrottle $typed"$'\\t'
    zpty -r shell shown "*pybpfthrottle (remove|*root)*"
    print -r -- $shown
    zpty -n -w shell $'\\x15'
done
"""


def test_zsh_completes_from_the_first_time_on(shell, tmp_path):
    """From a file in its $fpath, which it reads when that is first needed."""
    done = shell("zsh", "-f", "-c", script="pybpfthrottle completion zsh > _pybpfthrottle\n" + ZSH)
    assert "pybpfthrottle remove" in done
    assert "--user root" in done


@pytest.mark.parametrize("name", completion.FILES)
def test_installed_for_all_users(monkeypatch, capsys, tmp_path, name):
    """Root's is for everybody; it is told where it is."""
    from pybpfthrottle.cli.commands.bare import cli

    monkeypatch.setattr(completion, "_OF_ALL_USERS", tmp_path)
    completion.install(name, cli)
    path = tmp_path / completion.FILES[name]
    assert path.read_text() == completion.script(name, cli)
    assert str(path) in capsys.readouterr().out


def test_installed_for_one_user(monkeypatch, capsys, tmp_path):
    """Where the shell looks below the home; zsh has no such place: it is said what to do."""
    import click

    from pybpfthrottle.cli.commands.bare import cli

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    completion.install("fish", cli)
    assert (tmp_path / completion.FILES["fish"]).exists()
    with pytest.raises(click.UsageError, match=r"~/\.zshrc"):
        completion.install("zsh", cli)
