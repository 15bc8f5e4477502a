"""The settings as the command line shows and uses them."""

from __future__ import annotations

import json
import os

import pytest

LIMIT = ["run", "--upload-limit", "1M"]


@pytest.fixture
def config(tmp_path):
    """Write the user's config file; the environment in which it is found."""

    def write(text):
        path = tmp_path / "xdg" / "pybpfthrottle" / "config.toml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o644)
        return {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}

    return write


def test_config_show_tells_each_value_and_its_source(tool, config):
    """Each setting is shown with where it came from, and which files are read."""
    environment = config('[bpf.upload]\nattach_method = "legacy"\n')
    path = environment["XDG_CONFIG_HOME"] + "/pybpfthrottle/config.toml"
    found = json.loads(tool.run("config", "show", "--json", environment=environment).text)
    assert found["settings"]["bpf.upload.attach_method"] == {"value": "legacy", "source": path}
    assert found["settings"]["bpf.download.attach_method"]["source"] == "default"
    assert found["files"][-1] == path
    text = tool.run("config", "show", environment=environment).text
    assert f"bpf.upload.attach_method   = legacy  ({path})" in text.splitlines()
    assert f"{path}: read" in text.splitlines()


def test_under_sudo_it_says_what_sudo_has_dropped(tool):
    """Variables of the user who called sudo do not count: config show says so."""
    text = tool.run("config", "show", environment={"SUDO_USER": "somebody"}).text
    assert "sudo drops most of the environment: somebody's variables are ignored" in text


def test_the_file_decides_how_a_limit_is_attached(tool, config):
    """A method for one direction holds for that direction alone."""
    environment = config('[bpf.upload]\nattach_method = "legacy"\n')
    result = tool.run(*LIMIT, "--download-limit", "1M", "-v", "--", "true", environment=environment)
    assert result.status == 0
    assert "Successfully attached using legacy method!" in result.err
    assert "Successfully attached using modern method" in result.err


def test_the_command_line_goes_before_the_environment(tool):
    """--bpf-attach-method is what counts, if it is given."""
    environment = {"PYBPFTHROTTLE_BPF_ATTACH_METHOD": "legacy"}
    by_variable = tool.run(*LIMIT, "-v", "--", "true", environment=environment)
    assert "using legacy method!" in by_variable.err
    option = ["--bpf-attach-method", "link"]
    by_option = tool.run(*LIMIT, *option, "-v", "--", "true", environment=environment)
    assert "using modern method" in by_option.err


def test_the_deprecated_variable_warns(tool):
    """It is honoured, with one line that names its successor."""
    environment = {"PYBPFTHROTTLE_USE_LEGACY_ATTACH": "1"}
    result = tool.run(*LIMIT, "-q", "--", "true", environment=environment)
    assert result.status == 0
    assert result.complaint.startswith("pybpfthrottle: warning: PYBPFTHROTTLE_USE_LEGACY_ATTACH")


@pytest.mark.parametrize("arguments", [[*LIMIT, "--", "true"], ["config", "show"]])
def test_nonsense_is_a_usage_error(tool, config, arguments):
    """A mistake in the file or in the environment ends with 2 before anything is done."""
    environment = config('[bpf]\nattach_method = "modern"\n')
    result = tool.run(*arguments, environment=environment)
    assert result.status == 2
    assert "config.toml, line 2: bpf.attach_method is 'modern'" in result.err
    nonsense = {"PYBPFTHROTTLE_BPF_ATTACH_METHOD": "modern"}
    result = tool.run(*arguments, environment=nonsense)
    assert result.status == 2
    assert "PYBPFTHROTTLE_BPF_ATTACH_METHOD is 'modern'" in result.err


def test_a_config_file_that_is_none_is_refused(tool, tmp_path):
    """Opening a pipe would wait for ever; a link that leads to itself is told."""
    directory = tmp_path / "pybpfthrottle"
    directory.mkdir()
    path = directory / "config.toml"
    variables = {"XDG_CONFIG_HOME": str(tmp_path)}
    os.mkfifo(path)
    complaint = tool.run("config", "show", environment=variables)
    assert "is not a regular file" in complaint.err
    path.unlink()
    path.symlink_to(path)
    complaint = tool.run("config", "show", environment=variables)
    assert "Too many levels of symbolic links" in complaint.err
