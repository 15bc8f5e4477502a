"""pybpfthrottle install-service and drop-in: limits by systemd."""

from __future__ import annotations

from typing import Any

import click

from pybpfthrottle.cli import completing
from pybpfthrottle.cli.options import drop_in_options, words_of


@click.command(
    "install-service",
    epilog="""
\b
Examples:
  sudo pybpfthrottle install-service
  pybpfthrottle install-service --dry-run
  sudo pybpfthrottle install-service --uninstall
""",
)
@click.option("--uninstall", is_flag=True, help="Stop, disable and delete the service.")
@click.option("--dry-run", is_flag=True, help="Only show what would be written or deleted.")
def install_service(uninstall: bool, dry_run: bool) -> None:
    """Have systemd run pybpfthrottle daemon, now and after each boot.

    The service has only the capabilities that it needs, and sees no home directories.
    """
    from pybpfthrottle.cli import services

    if uninstall:
        services.uninstall_service(dry_run=dry_run)
    else:
        services.install_service(dry_run=dry_run)


@click.command(
    "drop-in",
    epilog="""
\b
Examples:
  sudo pybpfthrottle drop-in nginx.service --upload-limit 5M
  sudo pybpfthrottle drop-in backup@.service -u 500K --traffic internet
  pybpfthrottle drop-in nginx.service --upload-limit 5M --dry-run
  sudo pybpfthrottle drop-in nginx.service --remove
""",
)
@click.argument("unit", shell_complete=completing.units)
@drop_in_options
@click.option("--optional", is_flag=True, help="Start UNIT even where it cannot be limited.")
@click.option("--remove", is_flag=True, help="Limit UNIT no longer.")
@click.option("--dry-run", is_flag=True, help="Only show what would be written or deleted.")
def drop_in(unit: str, optional: bool, remove: bool, dry_run: bool, **limits: Any) -> None:
    """Limit the systemd service UNIT whenever it runs, from its first packet on.

    This writes a drop-in for UNIT, and a second service that keeps the limit while UNIT runs. Both
    survive restarts and reboots. If the limit cannot be put in force, UNIT does not start. A
    template, such as backup@.service, limits each of its instances.
    """
    from pybpfthrottle.cli import services
    from pybpfthrottle.linux import systemd

    unit = systemd.service_name(unit)
    options = words_of(limits)
    if remove:
        if options or optional:
            raise click.UsageError("--remove cannot be combined with a limit or --optional")
        services.remove(unit, dry_run=dry_run)
        return
    if not limits["upload_limit"] and not limits["download_limit"]:
        raise click.UsageError("no limit: give --download-limit, --upload-limit or both")
    services.add(unit, services.Limit(options, optional), dry_run=dry_run)
