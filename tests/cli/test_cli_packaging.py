"""The command from a zip, a wheel and an sdist; shell completion."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

LIMIT = ("run", "-q", "--download-limit", "1M", "--upload-limit", "1M")
OBJECTS = ("throttle.bpfel.o", "throttle.bpfeb.o", "throttle-direct.bpfel.o", "MANIFEST.json")
SHARED = (
    "man/man8/pybpfthrottle.8",
    "man/man8/pybpfthrottle-bpf-prog-show.8",
    "bash-completion/completions/pybpfthrottle",
    "fish/vendor_completions.d/pybpfthrottle.fish",
    "zsh/site-functions/_pybpfthrottle",
)


@pytest.fixture
def zipped(tool, copied_package, tmp_path):
    """The tool from a zip file."""
    archive = tmp_path / "tool.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(copied_package.rglob("*")):
            file.write(path, path.relative_to(copied_package))
    shutil.rmtree(copied_package)
    tool.path = str(archive)
    return tool


@pytest.fixture
def source_copy(repository, tmp_path):
    """A copy of the source tree, so that a build leaves nothing in it."""
    target = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        *("__pycache__", ".*", "*.egg-info", "build", "dist", "tests", "*.pyc")
    )
    shutil.copytree(repository, target, ignore=ignored)
    return target


def test_a_zip_is_what_is_imported(zipped):
    """The package comes from the zip file."""
    code = "import pybpfthrottle; print(pybpfthrottle.__file__)"
    shown = subprocess.run(
        [zipped.python, "-c", code],
        env=zipped.environment(),
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert shown.startswith(zipped.path + "/")


def test_backends_are_listed_from_a_zip(zipped):
    """--list-backends works from a zip file."""
    result = zipped.run("--list-backends")
    assert result.status == 0
    assert result.text.count("✅ available") >= 4


def test_run_works_from_a_zip(zipped):
    """The objects are read from the zip file: the command runs with both limits."""
    result = zipped.run(*LIMIT, "--", "sh", "-c", "exit 3")
    assert (result.status, result.err) == (3, "")


def test_the_wheel_has_the_objects(source_copy, tmp_path, tool):
    """The wheel has prebuilt/ inside of the package, and run works from it alone."""
    wheels = tmp_path / "wheels"
    isolation = ["--no-build-isolation"] if _builds_wheels() else []
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation]
    subprocess.run([*command, "-w", str(wheels), str(source_copy)], check=True, cwd=tmp_path)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in names:
            archive.extract(name, tmp_path / "installed")
    assert {f"pybpfthrottle/prebuilt/{name}" for name in OBJECTS} <= names
    assert "pybpfthrottle/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "ebpf_src/"))]
    (data,) = {name.partition("/")[0] for name in names if ".data/" in name}
    assert {f"{data}/data/share/{name}" for name in SHARED} <= names
    assert _is_accepted(wheel)
    _check_sbom(tmp_path / "installed")
    tool.path = str(tmp_path / "installed")
    assert tool.run(*LIMIT, "--", "sh", "-c", "exit 3").status == 3


def _is_accepted(path):
    """Whether a package index accepts it, without a warning."""
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return "PASSED" in done.stdout


def _check_sbom(installed):
    """The SBOM of an unpacked wheel has what is in there, and what it needs."""
    (path,) = installed.glob("*.dist-info/sboms/*.cdx.json")
    sbom = json.loads(path.read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.5")
    metadata = (path.parents[1] / "METADATA").read_text()
    needed = {name.lower() for name in re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.M)}
    components = {one["name"]: one for one in sbom["components"]}
    required = {name for name, one in components.items() if one["scope"] == "required"}
    assert {"click", "rich", "pyelftools"} == required & needed
    assert "textual" in components
    for name in OBJECTS[:3]:
        (found,) = components[f"pybpfthrottle/prebuilt/{name}"]["hashes"]
        content = (installed / "pybpfthrottle/prebuilt" / name).read_bytes()
        assert found == {"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}
    record = (path.parents[1] / "RECORD").read_text()
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest())
    assert f"sboms/{path.name},sha256={digest.rstrip(b'=').decode()}," in record
    refs = {one["bom-ref"] for one in sbom["components"]}
    assert {one["ref"] for one in sbom["dependencies"][1:]} == refs


def test_the_recipes_name_the_version_and_the_sdist(source_copy, tmp_path):
    """Each of them builds this version; the checksum is that of the sdist beside them."""
    from pybpfthrottle import __version__

    command = [sys.executable, "tools/build_recipes", "-o", str(tmp_path)]
    subprocess.run(command, cwd=source_copy, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    script = '. ./PKGBUILD; echo "$pkgver ${source[0]} ${sha256sums[0]}"; declare -F build package'
    shown = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    assert shown == f"{__version__} {sdist.name} {digest}\nbuild\npackage\n"
    spec = (tmp_path / "pybpfthrottle.spec").read_text()
    assert f"Version:        {__version__}\n" in spec
    assert "@VERSION@" not in spec


def test_it_can_be_cited(repository):
    """In the form that archives read; the version is in one place, and not in this one."""
    import yaml

    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert "version" not in citation


def _builds_wheels():
    """Whether this interpreter's setuptools makes wheels, by itself or with the package wheel."""
    if importlib.util.find_spec("setuptools") is None:
        return False
    if importlib.util.find_spec("wheel") is not None:
        return True
    from importlib.metadata import version

    return tuple(map(int, version("setuptools").split(".")[:2])) >= (70, 1)


def test_the_sdist_has_sources_tools_and_objects(source_copy, tmp_path):
    """The sdist has all that a build of the objects needs, and the objects."""
    if importlib.util.find_spec("setuptools") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "setuptools"], check=True)
    code = "import sys; from packing.backend import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=source_copy,
        env={**os.environ, "PYTHONPATH": "tools/packaging"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {"ebpf_src/throttle.h", "tools/build_prebuilt", "LICENSE", "README.md", "setup.cfg"}
    wanted |= {f"prebuilt/{name}" for name in OBJECTS} | {f"share/{name}" for name in SHARED}
    assert wanted <= names
    assert _is_accepted(archive)
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.fixture
def installed(tool, tmp_path):
    """Run a script with the name of the entry point, and environment variables."""
    script = tmp_path / "pybpfthrottle"
    script.write_text(f"#!{sys.executable}\nfrom pybpfthrottle.cli.app import main\nmain()\n")
    script.chmod(0o755)

    def run(**variables):
        return subprocess.run(
            [str(script)],
            env=tool.environment(**variables),
            cwd=os.sep,
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(installed, shell):
    """_PYBPFTHROTTLE_COMPLETE prints a script for each shell that click knows."""
    done = installed(_PYBPFTHROTTLE_COMPLETE=f"{shell}_source")
    assert done.returncode == 0
    assert "_pybpfthrottle_completion" in done.stdout


def test_completion_knows_the_subcommands_and_options(installed):
    """The words that complete "ru" and "--down" are run and the options for downloads."""
    for begun, wanted in (("ru", "run"), ("--down", "--download-limit")):
        done = installed(
            _PYBPFTHROTTLE_COMPLETE="bash_complete",
            COMP_WORDS=f"pybpfthrottle {begun}",
            COMP_CWORD="1",
        )
        assert f"plain,{wanted}" in done.stdout.splitlines()
