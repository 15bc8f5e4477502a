"""The unit and the container that a cgroup belongs to, from its path and the engines' files."""

from __future__ import annotations

import json
import os

import pytest

from pybpfthrottle.linux import containers
from pybpfthrottle.linux.cgroup import unit_of
from pybpfthrottle.linux.containers import Container

ID = "3f2a9c" + "0" * 58
POD = "pod8f5ae1f2-8e3a-4f39-9d1e-3a3a5b0f7a11"


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/nginx.service", "nginx.service"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/system.slice/docker.service/init", "docker.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope",
            "user@1000.service/app-x.scope",
        ),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice", "user@1000.service"),
        ("/machine.slice/systemd-nspawn@a.service/payload/system.slice/b.service", None),
        ("/system.slice/_cgroup.service", "cgroup.service"),
        ("/init.scope", "init.scope"),
        ("/user.slice", ""),
        ("/", ""),
        ("", ""),
        (f"/docker/{ID}", ""),
    ],
)
def test_a_unit_is_told_by_the_path(path, unit):
    """The outermost one, and that of a user's systemd behind it."""
    assert unit_of(path) == ("systemd-nspawn@a.service" if unit is None else unit)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"/docker/{ID}", ("docker", ID)),
        (f"/system.slice/docker-{ID}.scope", ("docker", ID)),
        (f"/machine.slice/libpod-{ID}.scope/container", ("podman", ID)),
        (f"/libpod_parent/libpod-{ID}", ("podman", ID)),
        (f"/machine.slice/libpod-conmon-{ID}.scope", None),
        (f"/kubepods.slice/kubepods-{POD}.slice/cri-containerd-{ID}.scope", ("containerd", ID)),
        (f"/kubepods/besteffort/{POD}/{ID}", ("containerd", ID)),
        (f"/system.slice/nerdctl-{ID}.scope", ("containerd", ID)),
        (f"/kubepods.slice/kubepods-{POD}.slice/crio-{ID}.scope", ("cri-o", ID)),
        (f"/kubepods.slice/kubepods-{POD}.slice/crio-conmon-{ID}.scope", None),
        ("/lxc.payload.web/system.slice/ssh.service", ("lxc", "web")),
        ("/lxc.monitor.web", None),
        ("/lxc/web", ("lxc", "web")),
        ("/machine.slice/systemd-nspawn@my\\x2dbox.service/payload", ("nspawn", "my-box")),
        ("/machine.slice/machine-my\\x2dbox.scope", ("nspawn", "my-box")),
        ("/machine.slice/machine-qemu\\x2d1\\x2dwin.scope", None),
        (f"/docker/{ID}/docker/{'1' * 64}", ("docker", ID)),
        (f"/elsewhere/{ID}", None),
        ("/docker/buildx", None),
        ("/system.slice/docker.service", None),
        ("", None),
    ],
)
def test_a_container_is_told_by_the_path(path, found):
    """The outermost one: only its engine's files can be read here."""
    assert containers.of_path("/sys/fs/cgroup" + path) == (Container(*found) if found else None)


@pytest.fixture
def files(monkeypatch):
    """What the engines' files have, by path."""
    made: dict[str, object] = {}
    monkeypatch.setattr(containers, "_json", made.get)
    monkeypatch.setattr(containers, "_names", {})
    return made


def test_docker_tells_a_name(files):
    """Of the whole machine's engine."""
    files[f"/var/lib/docker/containers/{ID}/config.v2.json"] = {"Name": "/web"}
    assert containers.name_of(Container("docker", ID)) == "web"


def test_podman_tells_a_name(files):
    """Among all the containers that it lists."""
    files["/var/lib/containers/storage/overlay-containers/containers.json"] = [
        {"id": "0" * 64, "names": ["other"]},
        {"id": ID, "names": ["db"]},
    ]
    assert containers.name_of(Container("podman", ID)) == "db"


def test_kubernetes_tells_a_name(files):
    """That of the pod as well, whichever engine runs it."""
    files[f"/run/containers/storage/overlay-containers/{ID}/userdata/config.json"] = {
        "annotations": {
            "io.kubernetes.pod.namespace": "shop",
            "io.kubernetes.pod.name": "cart-1",
            "io.kubernetes.container.name": "app",
        }
    }
    assert containers.name_of(Container("cri-o", ID)) == "shop/cart-1/app"


def test_without_a_name_there_is_a_short_id(files):
    """And a name that appears later is found."""
    assert containers.name_of(Container("docker", ID)) == "3f2a9c000000"
    files[f"/var/lib/docker/containers/{ID}/config.v2.json"] = {"Name": "/late"}
    assert containers.name_of(Container("docker", ID)) == "late"
    assert containers.name_of(Container("lxc", "web")) == "web"


@pytest.mark.parametrize(
    "told",
    [
        None,
        3,
        [],
        [None, 5, {"id": 5}, {"id": ID}, {"id": ID, "names": 3}, {"id": ID, "names": [None, 7]}],
        {"Name": ["a"], "annotations": 7},
        {"annotations": {"io.kubernetes.pod.name": 5}},
    ],
)
@pytest.mark.parametrize("engine", ["docker", "podman", "containerd", "cri-o"])
def test_strange_files_do_no_harm(monkeypatch, engine, told):
    """Some of them are users'."""
    monkeypatch.setattr(containers, "_json", lambda path: told)
    assert containers.name_of(Container(engine, ID), user=os.getuid()) == "3f2a9c000000"


def test_a_name_has_an_end(files):
    """However long it is in the file."""
    files[f"/var/lib/docker/containers/{ID}/config.v2.json"] = {"Name": "/" + "x" * 10_000}
    assert containers.name_of(Container("docker", ID)) == "x" * 128


def test_files_that_never_end_are_not_waited_for(tmp_path):
    """A FIFO, a directory, what is no JSON, and what is nested too deep are as none at all."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bad").write_bytes(b"\xff{")
    (tmp_path / "deep").write_text("[" * 1_000_000)
    (tmp_path / "good").write_text(json.dumps({"Name": "/web"}))
    for name in ("fifo", "bad", "deep", "missing", "."):
        assert containers._json(str(tmp_path / name)) is None
    assert containers._json("/dev/zero") is None
    assert containers._json(str(tmp_path / "good")) == {"Name": "/web"}
