"""The Kubernetes API: what pods there are, what changes, and what it answers otherwise."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading

import pytest
from fake_kubernetes import TOKEN, FakeKubernetes
from redis_server import fake, until

from pybpfthrottle.errors import SettingsError
from pybpfthrottle.pods.api import Cluster

UID = "8f5ae1f2-8e3a-4f39-9d1e-3a3a5b0f7a11"


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """The files of a service account, and the key of the API."""
    directory = tmp_path_factory.mktemp("account")
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-subj", "/CN=x"]
    command += ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", directory / "key.pem", "-out", directory / "ca.crt"]
    subprocess.run([*command, *files], check=True, capture_output=True)
    (directory / "token").write_text(TOKEN + "\n")
    return directory


@pytest.fixture
def api(account):
    """An API server of one node, by TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(account / "ca.crt", account / "key.pem")
    with FakeKubernetes("node-1", context) as server:
        yield server


@pytest.fixture
def cluster(api, account):
    """The way to it."""
    return Cluster(api.url, str(account))


def test_pods_are_listed(api, cluster):
    """With the annotations that are ours, and a version to wait from."""
    api.put(UID, "web-0", upload="5M")
    pods, version = cluster.pods("node-1")
    assert version == "101"
    assert pods[UID].name == "default/web-0"
    assert pods[UID].annotations == {"pybpfthrottle.io/upload": "5M"}


def test_changes_are_told(api, cluster):
    """What is new, what is changed and what is gone, until the server has had enough."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(cluster.changes("node-1", "100")))
    thread.start()
    until(lambda: api.waiting)
    api.put(UID, "web-0", upload="5M")
    api.put(UID, "web-0", upload="6M")
    api.tell("BOOKMARK", {})
    api.delete(UID)
    api.tell("ERROR", {"code": 410})
    thread.join()
    assert [(event.uid, event.gone) for event in found] == [(UID, False), (UID, False), (UID, True)]
    assert found[1].pod.annotations == {"pybpfthrottle.io/upload": "6M"}


@pytest.mark.parametrize(
    ("status", "complaint"),
    [(403, r"HTTP 403\): may the service account list"), (500, "the API answers HTTP 500")],
)
def test_a_refusal_is_an_error(api, cluster, status, complaint):
    """It says what to look at."""
    api.refuse = status
    with pytest.raises(OSError, match=complaint):
        cluster.pods("node-1")


def test_another_token_or_certificate_is_refused(api, account, tmp_path):
    """By the server, and by us."""
    (tmp_path / "token").write_text("other")
    shutil.copy(account / "ca.crt", tmp_path)
    with pytest.raises(OSError, match="HTTP 401"):
        Cluster(api.url, str(tmp_path)).pods("node-1")
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        Cluster(api.url.replace("localhost", "127.0.0.1"), str(account)).pods("node-1")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP: BadStatusLine"),
        (b"HTTP/1.0 200 OK\r\n\r\n[" * 2, "no JSON"),
        (b"HTTP/1.0 200 OK\r\n\r\n[]", "has no items"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"items": [1], "metadata": {}}', "has no metadata"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"items": []}', "has no metadata"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100_000, "no JSON"),
    ],
)
def test_another_answer_is_an_error(account, answer, complaint):
    """Whatever it is."""
    with fake(answer, hang_up=True) as port, pytest.raises(OSError, match=complaint):
        Cluster(f"http://127.0.0.1:{port}", str(account)).pods("node-1")


def test_the_cluster_around_a_pod():
    """By what the kubelet sets."""
    where = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert Cluster.around(where).url == "https://10.96.0.1:6443"
    assert Cluster.around({"KUBERNETES_SERVICE_HOST": "fd00::1"}).url == "https://[fd00::1]:443"
    with pytest.raises(SettingsError, match="elsewhere give --api URL"):
        Cluster.around({})
