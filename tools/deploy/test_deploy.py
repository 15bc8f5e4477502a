"""What deploys pybpfthrottle: linted, rendered, and what was rendered is run.

Started by tools/deploycheck, which installs the linters.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROLE = HERE / "ansible/roles/pybpfthrottle"
TOOLS = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{TOOLS}:{os.environ['PATH']}",
    "ANSIBLE_LOCALHOST_WARNING": "false",
    "ANSIBLE_ROLES_PATH": str(HERE / "ansible/roles"),
    "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    "NO_COLOR": "1",
}
PATIENCE_S = 60.0
RULES = {
    "backups": {
        "rule": [
            {"name": 'all "backups" ☃', "match": {"name": ["PROGRAM", "x'\"\\"]}, "upload": "2M"},
            {"name": "other", "match": {"exe": "/none"}, "download": 8000, "each": True},
        ]
    },
    "night": {
        "rule": [
            {
                "name": "night",
                "match": {"unit": "none"},
                "upload": "1M",
                "schedule": [{"hours": "22:00-06:00", "zone": "Europe/Berlin"}],
            }
        ]
    },
}
CONFIG = {"backends": {"upload": "ebpf"}, "bpf": {"upload": {"attach_method": "auto"}}}


def run(*command: str | Path, where: Path = ROOT, status: int = 0) -> str:
    """Run a program, and return what it prints."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=where,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def until(condition: Any) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_yamllint_finds_nothing() -> None:
    """In all of it."""
    run("yamllint", "--strict", "-c", HERE / ".yamllint", HERE)


def test_ansible_lint_finds_nothing() -> None:
    """By its strictest profile."""
    said = run("ansible-lint", "--offline", "--profile", "production", where=HERE / "ansible")
    assert "Passed: 0 failure(s), 0 warning(s)" in said


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What kustomize makes of the DaemonSet."""
    path = tmp_path_factory.mktemp("kubernetes") / "all.yaml"
    path.write_text(run("kubectl", "kustomize", HERE / "kubernetes"))
    return path


def test_the_manifests_are_of_this_kubernetes_and_an_older_one(rendered: Path) -> None:
    """Every field is known there."""
    for version in ("1.37", "1.30"):
        said = run("kubernetes-validate", "--strict", "-k", version, rendered)
        assert said.count(" passed for resource ") == 5


def test_the_manifests_fit_the_program(rendered: Path) -> None:
    """Its options, what it may ask, and where it writes."""
    every = {one["kind"]: one for one in yaml.safe_load_all(rendered.read_text())}
    [rule] = every["ClusterRole"]["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
    pod = every["DaemonSet"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["image"].startswith("registry.example.org/pybpfthrottle:")
    _, _, module = container["command"]
    assert {one["name"] for one in container["env"]} == {"NODE_NAME"}
    options = container["args"][::2]
    help_ = run(sys.executable, "-m", module, "--help")
    assert all(option in help_ for option in options)
    assert container["args"][1] in [one["mountPath"] for one in container["volumeMounts"]]
    probe = container["livenessProbe"]["exec"]["command"]
    run(sys.executable, *probe[1:], status=1)  # nobody keeps rules here


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the role installs, instead of in the system's directories; and what it installs."""
    found = tmp_path_factory.mktemp("machine")
    # Building it leaves files in its tree.
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "site", "tests", "*.egg-info")
    shutil.copytree(ROOT, found / "source", ignore=unwanted)
    return found


@pytest.fixture(scope="module")
def program(machine: Path) -> Path:
    """A program whose name nobody else has, so a rule matches nothing else."""
    path = machine / f"s{os.urandom(5).hex()}"
    shutil.copy(shutil.which("sleep") or "", path)
    return path


def play(machine: Path, rules: Any, status: int = 0, **more: Any) -> str:
    """Run the role on this machine, without its service."""
    (machine / "units").mkdir(exist_ok=True)
    given = {
        "ansible_become": False,
        "ansible_connection": "local",
        "pybpfthrottle_package": f"{machine / 'source'}[config]",
        "pybpfthrottle_environment": str(machine / "environment"),
        "pybpfthrottle_directory": str(machine / "pybpfthrottle"),
        "pybpfthrottle_units": str(machine / "units"),
        "pybpfthrottle_service": False,
        "pybpfthrottle_rules": rules,
        **more,
    }
    command = ["ansible-playbook", "-i", "localhost,", "-e", json.dumps(given)]
    skip = ["--skip-tags", "pybpfthrottle_packages"]
    return run(*command, *skip, HERE / "ansible/site.yml", status=status)


@pytest.fixture(scope="module")
def rules(program: Path) -> Any:
    """The rules, with the program's name."""
    return json.loads(json.dumps(RULES).replace("PROGRAM", program.name))


@pytest.fixture(scope="module")
def installed(machine: Path, rules: Any) -> Path:
    """A machine that the role was run on."""
    (machine / "pybpfthrottle/rules.d").mkdir(parents=True)
    (machine / "pybpfthrottle/rules.d/old.toml").write_text("# of before\n")
    said = play(machine, rules, pybpfthrottle_config=CONFIG)
    assert "failed=0" in said
    return machine


def read(path: Path) -> Any:
    """Read TOML."""
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads(path.read_text())


def test_the_role_writes_what_it_was_given(installed: Path, rules: Any) -> None:
    """Every value of every rule; what was there before is removed."""
    directory = installed / "pybpfthrottle/rules.d"
    assert {path.stem: read(path) for path in directory.iterdir()} == rules
    assert read(installed / "pybpfthrottle/config.toml")["bpf"] == {
        "upload": {"attach_method": "auto"}
    }
    assert (directory / "backups.toml").stat().st_mode & 0o777 == 0o600


def test_a_second_run_changes_nothing(installed: Path, rules: Any) -> None:
    """The role is idempotent; an installation from a checkout alone is always new."""
    said = play(installed, rules, pybpfthrottle_config=CONFIG)
    changed = re.findall(r"TASK \[pybpfthrottle : (.*)\] \*+\nchanged", said)
    assert set(changed) <= {"Install pybpfthrottle"}


def test_rules_with_a_mistake_are_not_installed(installed: Path, rules: Any) -> None:
    """The machine keeps those that it has, and the mistake is told."""
    before = {
        path.name: path.read_text() for path in (installed / "pybpfthrottle/rules.d").iterdir()
    }
    wrong = {"backups": {"rule": [{**rules["backups"]["rule"][0], "upload": "fast"}]}}
    said = play(installed, wrong, status=2)
    assert "'fast' is not a limit" in said
    assert {
        path.name: path.read_text() for path in (installed / "pybpfthrottle/rules.d").iterdir()
    } == before


@pytest.fixture
def daemon(installed: Path) -> Iterator[subprocess.Popen[str]]:
    """What the unit of the service starts."""
    unit = (installed / "units/pybpfthrottle.service").read_text()
    [command] = re.findall("^ExecStart=(.*)$", unit, re.M)
    where = {**os.environ, "XDG_CONFIG_HOME": str(installed)}
    with subprocess.Popen(command.split(), env=where, stderr=subprocess.PIPE, text=True) as running:
        yield running
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE_S) == 0


def test_what_was_installed_limits(installed: Path, program: Path, daemon: Any) -> None:
    """A process that a rule matches has its limit."""
    tool = installed / "environment/bin/pybpfthrottle"

    def limits() -> list[Any]:
        assert daemon.poll() is None, daemon.stderr.read()
        listed = json.loads(run(tool, "list", "--json"))["throttles"]
        return [one["limits"]["upload"] for one in listed if one["name"] == 'all "backups" ☃']

    with subprocess.Popen([program, "100"]) as process:
        try:
            until(lambda: limits() == [2 << 20])
        finally:
            process.kill()


def test_systemd_accepts_the_unit(installed: Path) -> None:
    """Every setting in it is known."""
    unit = installed / "units/pybpfthrottle.service"
    said = run("systemd-analyze", "verify", "--man=no", unit)
    assert "pybpfthrottle.service" not in said
    assert "CapabilityBoundingSet=CAP_BPF" in unit.read_text()
