"""Settings, symbols and functions of the running kernel, by what programs see of them."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from compiled import compiled
from run_once import run
from since import needs_configuration, since

from pybpfthrottle.bpf import links, loader
from pybpfthrottle.bpf.errors import ExternError, UnresolvedError
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.running import RunningKernel


@pytest.fixture(scope="module")
def spec():
    """The object that declares all of them."""
    needs_configuration()
    return elf.read_object(compiled("externs"))


def values(loaded):
    """All variables by name."""
    return {name: variable.get() for name, variable in loaded.variables.items()}


def address_of(name):
    """The address of a symbol."""
    with open("/proc/kallsyms") as file:
        return next(int(line.split()[0], 16) for line in file if line.split()[2] == name)


@pytest.fixture(scope="module")
def settings(spec):
    """What a program saw of the running kernel's settings."""
    with loader.load(spec, ["settings"]) as loaded:
        loaded.programs["settings"].test_run(bytes(64))
        return values(loaded)


def test_settings_are_those_the_kernel_was_built_with(settings):
    """Numbers, bools, tristates, characters and strings are read from the configuration."""
    config = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", needs_configuration(), re.MULTILINE))
    assert settings["answered"] == 1
    assert settings["hz"] == int(config["CONFIG_HZ"])
    assert settings["syscalls"] == 1
    assert settings["tristate"] == 1
    assert chr(settings["character"]) == config["CONFIG_BPF_JIT"]
    assert settings["hostname"] == config["CONFIG_DEFAULT_HOSTNAME"].strip('"').encode()[:7].ljust(
        8, b"\0"
    )


def test_a_weak_setting_that_is_missing_is_zero(settings):
    """A setting that the kernel does not have is 0 if it is weak."""
    assert settings["missing"] == 0


def test_the_version_is_the_kernels(settings):
    """LINUX_KERNEL_VERSION is what the kernel says it is."""
    with open("/proc/sys/kernel/osrelease") as file:
        major, minor, patch = re.match(r"(\d+)\.(\d+)\.(\d+)", file.read()).groups()
    # Debian's release is that of its modules' interface; the version is behind the name.
    debian = re.search(r"Debian (\d+)\.(\d+)\.(\d+)", os.uname().version)
    if debian:
        major, minor, patch = debian.groups()
    assert settings["version"] == int(major) << 16 | int(minor) << 8 | min(int(patch), 255)


def test_the_wrapper_of_system_calls_is_found_without_tracefs(settings):
    """LINUX_HAS_SYSCALL_WRAPPER tells whether the symbols have the machine's prefix."""
    with open("/proc/kallsyms") as file:
        text = file.read()
    assert settings["wrapper"] == bool(re.search(r" __\w+_sys_bpf$", text, re.MULTILINE))


def test_helpers_are_known_by_the_kernels_types():
    """LINUX_HAS_BPF_COOKIE tells whether the helper is among those of the kernel's types."""
    with open("/sys/kernel/btf/vmlinux", "rb") as file:
        wanted = b"\0BPF_FUNC_get_attach_cookie\0" in file.read()
    assert RunningKernel().setting("LINUX_HAS_BPF_COOKIE") == ("y" if wanted else "n")


def test_a_configuration_may_be_given(spec, tmp_path):
    """The settings of a given file are used in place of the kernel's."""
    path = tmp_path / "config"
    path.write_text(
        "CONFIG_HZ=0x7b\nCONFIG_BPF_SYSCALL=n\nCONFIG_CGROUP_BPF=m\nCONFIG_BPF_JIT=m\n"
        'CONFIG_DEFAULT_HOSTNAME="much too long"\n'
    )
    with loader.load(spec, ["settings"], kernel=RunningKernel(config_path=str(path))) as loaded:
        loaded.programs["settings"].test_run(bytes(64))
        found = values(loaded)
    assert (found["hz"], found["syscalls"], found["tristate"]) == (123, 0, 2)
    assert (chr(found["character"]), found["hostname"]) == ("m", b"much to\0")


def test_a_setting_that_is_missing_is_named():
    """A setting that the kernel lacks and that is not weak is refused by its name."""
    with pytest.raises(ExternError, match=r"CONFIG_STRONG_AND_MISSING.*__weak"):
        loader.load(elf.read_object(compiled("externs_missing")))


def test_symbols_have_their_addresses(spec):
    """The address of a symbol is the kernel's; weak ones that are missing are at 0."""
    with loader.load(spec, ["symbols"]) as loaded:
        run(loaded.programs["symbols"], bytes(16))
        found = values(loaded)
    assert found["answered"] == 1
    assert found["address"] == address_of("schedule")
    assert (found["no_address"], found["no_variable"]) == (0, 0)


@since("6.2")
def test_functions_of_the_kernel_are_called(spec):
    """Functions are called and found by name; weak ones that are missing are known to be."""
    with loader.load(spec, ["functions"]) as loaded:
        run(loaded.programs["functions"])
        found = values(loaded)
    assert (found["acquired"], found["no_function"]) == (1, 1)
    assert found["function"] == address_of("bpf_task_release")


def test_a_missing_function_is_named_when_it_is_reached(spec):
    """A program that calls a weak function that the kernel lacks is refused by its name."""
    with pytest.raises(UnresolvedError, match="not_a_function") as caught:
        loader.load(spec, ["reached"])
    assert caught.value.access == "not_a_function()"
    assert "not_a_function();" in caught.value.source


@pytest.mark.parametrize(
    ("program", "match"),
    [
        ("no_such_function", "no function 'strong_and_missing'"),
        ("no_such_symbol", "no symbol 'symbol_strong_and_missing'"),
        pytest.param(
            *("declared_otherwise", "'bpf_task_acquire' has another type"),
            marks=since("6.2"),
        ),
    ],
)
def test_what_the_kernel_lacks_is_named(spec, program, match):
    """What is not weak and not there, or there but different, is refused by its name."""
    with pytest.raises(ExternError, match=match):
        loader.load(spec, [program])


def test_a_program_is_loaded_for_its_target():
    """A program for a tracepoint of the kernel is attached to it, and runs when it is passed."""
    spec = elf.read_object(compiled("targets"))
    with loader.load(spec, ["enter"]) as loaded:
        with links.attach_raw_tracepoint(loaded.programs["enter"]):
            subprocess.run(["true"], check=True)
        assert loaded.variables["seen"].get() > 0


def test_a_function_that_is_missing_is_named():
    """A program for a function that the kernel lacks is refused by the function's name."""
    with pytest.raises(ExternError, match="not_in_any_kernel"):
        loader.load(elf.read_object(compiled("targets")), ["missing"])
