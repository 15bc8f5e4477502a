"""pybpfthrottle completion: the scripts by which shells complete the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from pybpfthrottle.cli.say import echo, echo_lines

# Where each shell looks, below a directory such as /usr/share. Packages put them there too.
FILES = {
    "bash": "bash-completion/completions/pybpfthrottle",
    "fish": "fish/vendor_completions.d/pybpfthrottle.fish",
    "zsh": "zsh/site-functions/_pybpfthrottle",
}
# In a directory of zsh's $fpath the file is the body of a function, which zsh calls for the first
# completion. That has to complete, and to register what completes from then on; click's own end
# does only one of both, and which one depends on its version.
_END_FOR_ZSH = """
}

compdef _pybpfthrottle_completion pybpfthrottle
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _pybpfthrottle_completion "$@"
fi
"""
_OF_ALL_USERS = Path("/usr/local/share")


def script(shell: str, cli: click.Command) -> str:
    """Return the script for a shell. It asks the program, so it need not change with it."""
    kind: Any = get_completion_class(shell)
    completion = kind(cli, {}, "pybpfthrottle", "_PYBPFTHROTTLE_COMPLETE")
    # Not its source(): that of bash would run bash to ask for its version.
    text: str = completion.source_template % completion.source_vars()
    return text.rpartition("\n}\n")[0] + _END_FOR_ZSH if shell == "zsh" else text


def show(shell: str, cli: click.Command) -> None:
    """Print the script for a shell."""
    echo_lines(script(shell, cli).rstrip("\n"))


def install(shell: str, cli: click.Command) -> None:
    """Write the script to where the shell looks for it, for all users if this is root.

    Raises OSError.
    """
    path = _directory(shell) / FILES[shell]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script(shell, cli))
    echo(f"Wrote {path}. A new {shell} completes pybpfthrottle.")


def _directory(shell: str) -> Path:
    if os.geteuid() == 0:
        return _OF_ALL_USERS
    if shell == "zsh":
        raise click.UsageError(
            "zsh looks nowhere for completions of one user; use sudo, or put this into ~/.zshrc:"
            ' eval "$(pybpfthrottle completion zsh)"'
        )
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
