"""Where each setting comes from, and what is refused."""

from __future__ import annotations

import errno
import os

import pytest
from since import needs_machine

from pybpfthrottle import settings
from pybpfthrottle.errors import SettingsError
from pybpfthrottle.model import Direction
from pybpfthrottle.settings import AttachPolicy


@pytest.fixture
def config(tmp_path):
    """Write a config file that root may trust; its path."""

    def write(text: str, *, name: str = "config.toml", mode: int = 0o644) -> str:
        path = tmp_path / name
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    return write


def method(**given) -> dict[Direction, str]:
    """The method of each direction."""
    given.setdefault("environment", {})
    given.setdefault("files", [])
    return {d: policy.method for d, policy in settings.load(**given).attach.items()}


def both(name: str) -> dict[Direction, str]:
    """The same for both directions."""
    return dict.fromkeys(Direction, name)


def test_the_default_is_auto_and_einval():
    """Without any setting programs are attached by link, and after EINVAL by the legacy call."""
    found = settings.load(environment={}, files=[])
    assert dict(found.attach) == dict.fromkeys(Direction, AttachPolicy("auto", (errno.EINVAL,)))
    assert {setting.source for setting in found.origins} == {"default"}


def test_each_source_goes_before_the_next(config):
    """Command line, deprecated variable, variable, predecessor's variables, file."""
    files = [config('[bpf]\nattach_method = "link"\n')]
    variables = {}
    assert method(environment=variables, files=files) == both("link")
    variables["CHADTHROTTLE_BPF_ATTACH_METHOD"] = "legacy"
    assert method(environment=variables, files=files) == both("legacy")
    variables["PYBPFTHROTTLE_BPF_ATTACH_METHOD"] = "auto"
    assert method(environment=variables, files=files) == both("auto")
    variables["CHADTHROTTLE_USE_LEGACY_ATTACH"] = "1"
    assert method(environment=variables, files=files) == both("legacy")
    assert method(method="link", environment=variables, files=files) == both("link")


def test_the_deprecated_variable_warns():
    """It is honoured, with a warning that names what to set instead."""
    found = settings.load(environment={"PYBPFTHROTTLE_USE_LEGACY_ATTACH": "1"}, files=[])
    assert found.attach[Direction.UPLOAD].method == "legacy"
    assert "PYBPFTHROTTLE_BPF_ATTACH_METHOD=legacy" in found.warnings[0]
    off = settings.load(environment={"PYBPFTHROTTLE_USE_LEGACY_ATTACH": "0"}, files=[])
    assert off.warnings == ()


def test_a_direction_has_its_own_method(config):
    """A key for one direction goes before the key for both."""
    text = '[bpf]\nattach_method = "link"\n[bpf.upload]\nattach_method = "legacy"\n'
    assert method(files=[config(text)]) == {
        Direction.DOWNLOAD: "link",
        Direction.UPLOAD: "legacy",
    }


def test_files_are_merged_key_by_key(config):
    """The user's file goes over that of the system, in the keys that it has."""
    system = config('[bpf]\nattach_method = "link"\nfallback_errnos = ["EPERM"]\n', name="a")
    own = config('[bpf]\nattach_method = "legacy"\n', name="b")
    found = settings.load(environment={}, files=[system, own])
    assert found.attach[Direction.UPLOAD] == AttachPolicy("legacy", (errno.EPERM,))
    assert {s.name: s.source for s in found.origins} == {
        "bpf.download.attach_method": own,
        "bpf.upload.attach_method": own,
        "bpf.download.shape": "default",
        "bpf.upload.shape": "default",
        "backends.download": "default",
        "backends.upload": "default",
        "bpf.fallback_errnos": system,
    }


def test_a_file_names_a_backend_for_a_direction(config):
    """The command line's goes before it; what it does not name is chosen automatically."""
    file = config('[backends]\ndownload = "nftables"\n')
    found = settings.load(environment={}, files=[file])
    assert found.backends == {Direction.DOWNLOAD: "nftables", Direction.UPLOAD: "auto"}
    found = settings.load(environment={}, files=[file], backends={Direction.DOWNLOAD: "ebpf"})
    assert found.backends[Direction.DOWNLOAD] == "ebpf"


def test_an_unknown_backend_in_a_file_is_refused(config):
    """With those that there are."""
    file = config('[backends]\ndownload = "ipfw"\n')
    with pytest.raises(SettingsError, match=r'line 2: backends\.download is .ipfw.; .*"nftables"'):
        settings.load(environment={}, files=[file])


def test_a_direction_has_its_own_shape(config):
    """By the file, or by the command line for both."""
    file = config('[bpf.upload]\nshape = "police"\n')
    found = settings.load(environment={}, files=[file])
    assert found.shape == {Direction.DOWNLOAD: "auto", Direction.UPLOAD: "police"}
    found = settings.load(environment={}, files=[file], shape="window")
    assert set(found.shape.values()) == {"window"}


def test_an_unknown_shape_is_refused_with_what_is_allowed(config):
    """File, line and the words that are known."""
    file = config('[bpf.upload]\nshape = "round"\n')
    with pytest.raises(SettingsError, match=r"line 2: .*'round'; it must be one of .*\"police\""):
        settings.load(environment={}, files=[file])


def test_the_users_file_is_found_by_xdg():
    """An absolute XDG_CONFIG_HOME, or .config in the home directory."""
    assert settings.config_files({"XDG_CONFIG_HOME": "/x", "HOME": "/h"})[1:] == [
        "/x/pybpfthrottle/config.toml"
    ]
    assert settings.config_files({"XDG_CONFIG_HOME": "x", "HOME": "/h"})[1:] == [
        "/h/.config/pybpfthrottle/config.toml"
    ]
    assert settings.config_files({}) == ["/etc/pybpfthrottle/config.toml"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[bpf\n", "is not valid TOML"),
        ('[bpf]\n\nattach_methd = "link"\n', "line 3: unknown key bpf.attach_methd (did you mean"),
        ('# x\n[bpf]\nattach_method = "modern"\n', 'line 3: bpf.attach_method is \'modern\''),
        ("bpf.upload.attach_method = 3\n", "bpf.upload.attach_method is 3; it must be one of"),
        ('[bpf]\nfallback_errnos = ["EINVAL", "EWHAT"]\n', "line 2: bpf.fallback_errnos"),
        ('[bpf]\nfallback_errnos = "EINVAL"\n', "a list of error names"),
        ('[tc]\nx = 1\n', "line 2: unknown key tc.x (known: "),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_names_file_and_line(config, text, said):
    """The error has the path, the line, and what is allowed."""
    path = config(text)
    with pytest.raises(SettingsError) as caught:
        settings.load(environment={}, files=[path])
    assert str(caught.value).startswith(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"PYBPFTHROTTLE_BPF_ATTACH_METHOD": "modern"},
        {"PYBPFTHROTTLE_USE_LEGACY_ATTACH": "yes"},
        {"CHADTHROTTLE_BPF_ATTACH_METHOD": "LINK"},
    ],
)
def test_nonsense_in_the_environment_is_refused(variables):
    """The error names the variable, its value and what it may be."""
    name, value = next(iter(variables.items()))
    with pytest.raises(SettingsError, match=f"{name} is '{value}'"):
        settings.load(environment=variables, files=[])


def test_a_file_that_others_can_write_is_refused(config):
    """Whoever can write it would decide what root does."""
    with pytest.raises(SettingsError, match="is writable by other users"):
        settings.load(environment={}, files=[config("", mode=0o666)])


def test_as_root_a_file_of_another_user_is_refused(config):
    """Root reads only what is root's own."""
    needs_machine("root, to give a file away", found=os.geteuid() == 0)
    path = config("")
    os.chown(path, 65534, 65534)
    with pytest.raises(SettingsError, match="belongs to another user"):
        settings.load(environment={}, files=[path])


def test_a_directory_in_place_of_the_file_is_refused(tmp_path):
    """What cannot be read is named."""
    with pytest.raises(SettingsError, match="cannot read"):
        settings.load(environment={}, files=[str(tmp_path)])
