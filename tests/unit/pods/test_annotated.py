"""From the annotations of pods to rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybpfthrottle.pods.annotated import Pod, pod, rules, tops
from pybpfthrottle.rules import reading
from pybpfthrottle.settings import parse_toml

UID = "8f5ae1f2-8e3a-4f39-9d1e-3a3a5b0f7a11"
SYSTEMD = "kubepods{0}-pod8f5ae1f2_8e3a_4f39_9d1e_3a3a5b0f7a11.slice"


def annotated(uid=UID, **annotations):
    """A pod with annotations of ours."""
    return Pod("default/web-0", uid, {f"pybpfthrottle.io/{k}": v for k, v in annotations.items()})


def read(tmp_path, *pods, tops=("/kubepods.slice",)):
    """What the daemon reads in the file."""
    path = tmp_path / "pods.toml"
    written = rules(pods, tops)
    path.write_text(written.text)
    path.chmod(0o600)
    return reading.read([str(path)]).rules, written.mistakes


def test_a_pod_becomes_a_rule(tmp_path):
    """With its name, its limits, and its cgroup in each quality of service."""
    [rule], mistakes = read(tmp_path, annotated(upload="5M", download="8mbit", traffic="internet"))
    assert mistakes == ()
    assert rule.name == f"default/web-0 {UID}"
    assert {str(way): rate.bytes_per_s for way, rate in rule.limits.items()} == {
        "upload": 5 << 20,
        "download": 1_000_000,
    }
    assert rule.kind == "internet"
    assert rule.insist  # a process in it that is named sshd does not free it
    assert rule.criteria.cgroup == (
        f"/kubepods.slice/{SYSTEMD.format('')}",
        f"/kubepods.slice/kubepods-burstable.slice/{SYSTEMD.format('-burstable')}",
        f"/kubepods.slice/kubepods-besteffort.slice/{SYSTEMD.format('-besteffort')}",
    )


@pytest.mark.parametrize(
    ("top", "place"),
    [
        ("/kubepods", f"/kubepods/burstable/pod{UID}"),
        ("/kubepods", f"/kubepods/pod{UID}"),
        ("/a/kubepods", f"/a/kubepods/besteffort/pod{UID}"),
        # As kind names them.
        (
            "/kubelet.slice/kubelet-kubepods.slice",
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-"
            + SYSTEMD.format("-burstable"),
        ),
    ],
)
def test_the_cgroup_is_named_as_the_kubelet_names_it(tmp_path, top, place):
    """By itself, as systemd does, and in a node that is a container."""
    [rule], _ = read(tmp_path, annotated(upload="1M"), tops=[top])
    assert place in rule.criteria.cgroup


def test_the_tops_are_searched_for(tmp_path):
    """As far down as they may be; not in them."""
    assert tops(str(tmp_path)) == ["/kubepods.slice", "/kubepods"]
    for path in (
        "kubepods/burstable",
        "a.slice/a-kubepods.slice/a-kubepods-burstable.slice",
        "x/y",
    ):
        (tmp_path / path).mkdir(parents=True)
    assert tops(str(tmp_path)) == ["/a.slice/a-kubepods.slice", "/kubepods"]


@pytest.mark.parametrize(("namespace", "static"), [("kube-system", True), ("default", False)])
def test_a_static_pod_has_the_uid_that_the_kubelet_knows(namespace, static):
    """It is in an annotation, which counts only where not everybody can make pods."""
    known = "0123456789abcdef0123456789abcdef"
    annotations = {"kubernetes.io/config.hash": known}
    metadata = {"uid": UID, "namespace": namespace, "annotations": annotations}
    assert pod(metadata).uid == (known if static else UID)


def test_two_pods_of_one_uid_are_one_rule(tmp_path):
    """A file with two of a name would not be read at all."""
    found, mistakes = read(tmp_path, annotated(upload="1M"), annotated(upload="2M"))
    assert len(found) == 1
    assert mistakes == ()


@pytest.mark.parametrize(
    ("annotations", "complaint"),
    [
        ({"upload": "5mbps"}, "pybpfthrottle.io/upload: '5mbps' may mean bits or bytes"),
        ({"upload": "0"}, "pybpfthrottle.io/upload: 0 is out of range"),
        ({"upload": '1M"\n[[rule]]'}, "is not a limit"),
        ({"traffic": "internet"}, "add pybpfthrottle.io/download or pybpfthrottle.io/upload"),
        ({"upload": "1M", "traffic": "lan"}, "choose from all, internet, local"),
        ({"uplaod": "1M"}, "pybpfthrottle.io/uplaod is no annotation of ours"),
        ({"upload": "1M", "uid": "../../x"}, "its UID is '../../x'"),
    ],
)
def test_a_mistake_costs_that_pod_its_limit_alone(tmp_path, annotations, complaint):
    """It is told in one line, with the pod's name."""
    good = annotated("0" * 32, upload="1M")
    found, [mistake] = read(tmp_path, annotated(**annotations), good)
    assert [rule.name for rule in found] == ["default/web-0 " + "0" * 32]
    assert mistake.startswith("pod default/web-0 is not limited: ")
    assert complaint in mistake
    assert "\n" not in mistake


def test_pods_without_our_annotations_have_no_rule(tmp_path):
    """Nor is anything wrong with them."""
    assert read(tmp_path, pod({"name": "a", "annotations": {"x": "y"}}), pod({})) == ((), ())


METADATA = st.recursive(
    st.one_of(st.none(), st.booleans(), st.text(max_size=8)),
    lambda inner: st.dictionaries(
        st.sampled_from(["annotations", "uid", "name", "namespace", "pybpfthrottle.io/upload"]),
        inner,
    ),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(METADATA, max_size=3))
def test_any_metadata_is_a_file_that_can_be_read(found):
    """Whatever the types and texts in it are."""
    written = rules([pod(one) for one in found], ["/kubepods"])
    parse_toml("x", written.text)


def test_a_name_of_any_length_and_text_can_be_read(tmp_path):
    """It ends with the UID, so it is unique."""
    long = pod(
        {
            "namespace": 'n"\\',
            "name": "\u0001\n☃" * 40,
            "uid": UID,
            "annotations": {"pybpfthrottle.io/upload": "1M"},
        }
    )
    [rule], mistakes = read(tmp_path, long)
    assert mistakes == ()
    assert rule.name.endswith(f" {UID}")
