"""pybpfthrottle show, set, remove, pause, resume and switch: throttles that are in force."""

from __future__ import annotations

from typing import Any, Optional

import click

from pybpfthrottle.cli import completing
from pybpfthrottle.cli.values import ProcessId
from pybpfthrottle.errors import LimitError
from pybpfthrottle.model import Direction, Rate


def _which_options(function: Any) -> Any:
    """Add the options that choose throttles."""
    for option in (
        click.option(
            "--unit",
            metavar="NAME",
            shell_complete=completing.units,
            help="Choose the throttles of a systemd unit.",
        ),
        click.option(
            "--cgroup",
            metavar="PATH",
            shell_complete=completing.cgroups,
            help="Choose the throttles of a cgroup.",
        ),
        click.option(
            "--pid",
            type=ProcessId(),
            help="Choose the throttles that limit this process, or that it keeps in force.",
        ),
        click.argument("name", metavar="[ID]", required=False, shell_complete=completing.throttles),
    ):
        function = option(function)
    return function


def _which(given: dict[str, Any], all_of_them: Optional[bool] = None) -> Any:
    from pybpfthrottle.cli.throttles import Which

    which = Which(**given)
    mistake = which.mistake(all_of_them)
    if mistake:
        raise click.UsageError(mistake)
    return which


@click.command(
    "show",
    epilog="""
\b
Examples:
  sudo pybpfthrottle show web
  sudo pybpfthrottle show --pid 1234
  sudo pybpfthrottle show --unit backup --json
""",
)
@_which_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_throttle(as_json: bool, **which: Any) -> None:
    """Show a throttle: what it limits, how, and what it has counted.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    throttles.show(_which(which), as_json=as_json)


def _parse_change(ctx: click.Context, param: click.Parameter, text: Optional[str]) -> Any:
    """Return a limit, None for ``none``, or ... if nothing is given."""
    if text is None:
        return ...
    if text.lower() in ("none", "off"):
        return None
    try:
        return Rate.parse(text)
    except LimitError as error:
        raise click.BadParameter(f"{error}; or none to lift the limit") from error


@click.command(
    "set",
    epilog="""
\b
Examples:
  pybpfthrottle set k3x9fd --download-limit 2M
  pybpfthrottle set --pid 1234 --upload-limit none
  pybpfthrottle set backup --bpf-attach-method legacy
""",
)
@_which_options
@click.option(
    *("-d", "--download-limit"),
    metavar="RATE|none",
    callback=_parse_change,
    help="Change the download limit, or lift it.",
)
@click.option(
    *("-u", "--upload-limit"),
    metavar="RATE|none",
    callback=_parse_change,
    help="Change the upload limit, or lift it.",
)
@click.option(
    "--bpf-attach-method", type=click.Choice(["link", "legacy"]), help="Attach it by this method."
)
def set_throttle(
    download_limit: Any, upload_limit: Any, bpf_attach_method: Optional[str], **which: Any
) -> None:
    """Change a throttle while it is in force, whoever made it.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    given = {Direction.DOWNLOAD: download_limit, Direction.UPLOAD: upload_limit}
    limits = {direction: rate for direction, rate in given.items() if rate is not ...}
    if not limits and bpf_attach_method is None:
        raise click.UsageError(
            "nothing to change: give --download-limit, --upload-limit or --bpf-attach-method"
        )
    throttles.change(_which(which), limits, bpf_attach_method)


@click.command(
    "remove",
    epilog="""
\b
Examples:
  sudo pybpfthrottle remove web
  sudo pybpfthrottle remove --unit backup
  sudo pybpfthrottle remove --all
""",
)
@_which_options
@click.option("--all", "all_of_them", is_flag=True, help="Remove all throttles.")
def remove_throttle(all_of_them: bool, **which: Any) -> None:
    """Remove a throttle, whoever made it. The pybpfthrottle that keeps it ends.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    throttles.remove(_which(which, all_of_them), all_of_them=all_of_them)


@click.command(
    "pause",
    epilog="""
\b
Examples:
  sudo pybpfthrottle pause web
  sudo pybpfthrottle pause --pid 1234
""",
)
@_which_options
def pause(**which: Any) -> None:
    """Lift a throttle for now: all packets pass until pybpfthrottle resume.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    throttles.pause(_which(which))


@click.command(
    "resume",
    epilog="""
\b
Examples:
  sudo pybpfthrottle resume web
  sudo pybpfthrottle resume --unit backup
""",
)
@_which_options
def resume(**which: Any) -> None:
    """Put back the limits that pybpfthrottle pause has lifted.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    throttles.resume(_which(which))


@click.command(
    epilog="""
\b
Example:
  sudo pybpfthrottle switch 4711 legacy
""",
)
@click.argument("pid", type=ProcessId())
@click.argument("method", type=click.Choice(["link", "legacy"]))
def switch(pid: int, method: str) -> None:
    """Switch the running instance PID to METHOD.

    The limit stays in force; for a moment, packets are charged twice. This does the same as
    pybpfthrottle set --pid PID --bpf-attach-method METHOD.
    """
    from pybpfthrottle.cli import throttles

    throttles.switch(pid, method)
