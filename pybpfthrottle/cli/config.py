"""pybpfthrottle config show: each setting and where it came from."""

from __future__ import annotations

import json
import os

import click

from pybpfthrottle import settings
from pybpfthrottle.cli.say import echo, echo_json, say
from pybpfthrottle.errors import SettingsError


def show(*, as_json: bool) -> None:
    """Print the settings that a limit would use now."""
    files = settings.config_files(os.environ)
    try:
        found = settings.load(files=files)
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    for warning in found.warnings:
        say(f"warning: {warning}")
    if as_json:
        settings_by_name = {
            setting.name: {"value": setting.value, "source": setting.source}
            for setting in found.origins
        }
        echo_json(json.dumps({"settings": settings_by_name, "files": files}, indent=2))
        return
    width = max(len(setting.name) for setting in found.origins)
    for setting in found.origins:
        echo(f"{setting.name:<{width}} = {setting.value}  ({setting.source})")
    for path in files:
        echo(f"{path}: {'read' if os.path.exists(path) else 'not found'}")
    user = os.environ.get("SUDO_USER")
    if user:
        echo(
            f"sudo drops most of the environment: {user}'s variables are ignored, and the config"
            f" files are those of {os.environ.get('USER', 'root')}."
            " Use sudo NAME=VALUE pybpfthrottle ..., or the command line."
        )
