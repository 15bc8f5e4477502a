"""pybpfthrottle cgroup: the programs that are attached to cgroups."""

from __future__ import annotations

from typing import Optional

import click

from pybpfthrottle.cli import completing


@click.group(
    epilog="""
\b
Examples:
  sudo pybpfthrottle cgroup show /sys/fs/cgroup/system.slice
  sudo pybpfthrottle cgroup tree
""",
)
def cgroup() -> None:
    """Show which BPF programs are attached to cgroups, whoever attached them."""


@cgroup.command(
    "show",
    epilog="""
\b
Examples:
  sudo pybpfthrottle cgroup show /sys/fs/cgroup/system.slice
  sudo pybpfthrottle cgroup show /sys/fs/cgroup/system.slice --effective
""",
)
@click.argument("path", shell_complete=completing.cgroups)
@click.option("--effective", is_flag=True, help="Also show programs inherited from its ancestors.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cgroup_show(path: str, effective: bool, as_json: bool) -> None:
    """Show what is attached to the cgroup PATH, at each cgroup hook."""
    from pybpfthrottle.cli import attachments

    attachments.show(path, effective=effective, as_json=as_json)


@cgroup.command(
    "tree",
    epilog="""
\b
Examples:
  sudo pybpfthrottle cgroup tree
  sudo pybpfthrottle cgroup tree /sys/fs/cgroup/user.slice --json
""",
)
@click.argument("path", required=False, shell_complete=completing.cgroups)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cgroup_tree(path: Optional[str], as_json: bool) -> None:
    """Show what is attached at and below PATH, or to all visible cgroups."""
    from pybpfthrottle.cli import attachments

    attachments.tree(path, as_json=as_json)
