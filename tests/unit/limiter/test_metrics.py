"""Metrics as text that Prometheus reads, and the endpoint that nobody can hold up."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus
from since import needs_command

from pybpfthrottle import endpoint, metrics
from pybpfthrottle.backends.protocol import Match, Record
from pybpfthrottle.cli.commands.bare import cli
from pybpfthrottle.endpoint import Address, Endpoint
from pybpfthrottle.errors import SettingsError, ThrottleError
from pybpfthrottle.inforce import InForce
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.metrics import FAMILIES, Collector, Subjects
from pybpfthrottle.model import Counters, Direction, Moved, Rate, Target, ThrottleSpec
from pybpfthrottle.quota import parse
from pybpfthrottle.supervisor import Periodic, Supervisor
from pybpfthrottle.traffic import ProcessTraffic, Scope, Usage

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = 'a"} 1\n# EOF\n\\x{\x1b[31m\udcff'
DOWN, UP = Direction.DOWNLOAD, Direction.UPLOAD


class Found(InForce):
    """A throttle in force that need not be opened to be counted."""

    def counters(self):
        """As InForce.counters."""
        if self.record.spec.name == "gone":
            raise ThrottleError("it has ended")
        return {DOWN: Counters(9, 9, 5000, 2, 1000), UP: Counters(1, 1, 1, 0, 0)}


def throttle(key: str, name: str = "", **fields) -> Found:
    """A throttle with a limit on downloads, and without one on uploads."""
    spec = ThrottleSpec(Target(names=(HOSTILE,)), {DOWN: Rate(2000), UP: None}, name=name, **fields)
    return Found((Record(key, spec, Identity(1, 0, 0), "ebpf", Match.MARKS, since_ns=10**9),))


def process(number: int, name: str, down: int, cgroup: str = "/c") -> ProcessTraffic:
    """A process that has received so much."""
    usage = {Scope.LOCAL: Usage(1, down, 1, 1), Scope.LOOPBACK: Usage(1, 9999, 1, 9999)}
    return ProcessTraffic(number, number, name, 0, cgroup, True, usage)


class Watched:
    """A watch that tells what it is told."""

    found: tuple[ProcessTraffic, ...] = ()

    def snapshot(self) -> tuple[ProcessTraffic, ...]:
        """As Watch.snapshot."""
        if not self.found:
            raise OSError("no look")
        return self.found


@pytest.fixture
def watch() -> Watched:
    """Two processes of one name, in a container, and a hostile one."""
    watch = Watched()
    where = "/c/lxc.payload.web/system.slice/a.service"
    watch.found = (
        process(1, "curl", 100, where),
        process(2, "curl", 50, where),
        process(3, HOSTILE, 7),
    )
    return watch


@pytest.fixture
def collector(watch) -> Collector:
    """Throttles with hostile names, traffic, and a quota: something of every family."""
    expires = throttle("kkk222", HOSTILE, expires_ns=10**18, paused={DOWN: Rate(3000)})
    quota = parse({"day": "1G", "month": "5G", "then": "warn"})
    decision = quota.decide(lambda span: 1 << 20, time.time())
    found = [throttle("bbb333", "web"), expires, throttle("ddd444", "gone")]
    return Collector(watch, lambda: {HOSTILE: decision}, lambda: found)


def values(families) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The samples of parsed text, by their names."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_what_a_throttle_limits_and_counts_is_told(collector) -> None:
    """By its id and name, a series for each direction; without a limit there is none."""
    told = values(openmetrics(collector.collect().text(openmetrics=True)))
    web = {"throttle": "bbb333", "name": "web"}
    down, up = {**web, "direction": "download"}, {**web, "direction": "upload"}

    def of(name: str) -> list[tuple[dict[str, str], float]]:
        return [one for one in told[f"pybpfthrottle_{name}"] if one[0].get("throttle") == "bbb333"]

    assert told["pybpfthrottle_throttles"] == [({}, 3)]
    assert of("throttle_limit_bytes_per_second") == [(down, 2000)]
    assert of("throttle_passed_bytes_total") == [(down, 4000), (up, 1)]
    assert of("throttle_dropped_bytes_total") == [(down, 1000), (up, 0)]
    assert of("throttle_passed_packets_total") == [(down, 7), (up, 1)]
    assert of("throttle_dropped_packets_total") == [(down, 2), (up, 0)]
    assert of("throttle_paused") == [(web, 0)]
    [(info, _)] = of("throttle_info")
    assert (info["match"], info["backends"], info["kept"]) == ("marks", "ebpf", "false")
    assert [
        labels["throttle"] for labels, paused in told["pybpfthrottle_throttle_paused"] if paused
    ] == ["kkk222"]


def test_every_family_is_told_in_both_formats(collector) -> None:
    """With its type, unit and help; the two agree in all values."""
    page = collector.collect()
    new = list(openmetrics(page.text(openmetrics=True)))
    old = list(prometheus(page.text()))
    assert {one.name for one in new} == {family.name for family in FAMILIES.values()}
    for told in new:
        family = FAMILIES[told.name.replace("pybpfthrottle_", "", 1)]
        assert (told.type, told.unit, told.documentation) == (family.type, family.unit, family.help)
    assert values(old) == values(new)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_keep_to_the_conventions(name) -> None:
    """Base units as suffixes, no suffix of a type; a sentence of help."""
    family = FAMILIES[name]
    assert re.fullmatch("pybpfthrottle_[a-z_]+", family.name)
    assert not re.search("_(total|info|count|sum|bucket|bits|kb|ms)$", family.name)
    assert family.name.endswith(f"_{family.unit}") or not family.unit
    assert ("bytes" in family.name) == ("bytes" in family.unit)
    assert family.help.endswith(".")


def test_promtool_finds_nothing_wrong(collector) -> None:
    """Prometheus' own checker, of the format and of the names."""
    promtool = needs_command("promtool")
    for page in (collector.collect(), Collector(throttles=list).collect()):
        done = subprocess.run(
            [promtool, "check", "metrics"], input=page.text(), capture_output=True, text=True
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_hostile_name_is_one_label(collector) -> None:
    """It neither ends the line nor the page, nor does it reach a terminal."""
    page = collector.collect()
    for text in (page.text(), page.text(openmetrics=True)):
        assert "\x1b" not in text
        assert text.count("\n# EOF") == (1 if text.endswith("# EOF\n") else 0)
    name = 'a"} 1\\n# EOF\\n\\x{\\x1b[31m\\udcff'
    told = values(openmetrics(page.text(openmetrics=True)))
    labels = [labels for labels, _ in told["pybpfthrottle_traffic_by_name_bytes_total"]]
    assert {"name": name, "direction": "upload"} in labels
    assert name in [labels["name"] for labels, _ in told["pybpfthrottle_throttle_info"]]


def test_names_that_look_the_same_have_one_series(watch) -> None:
    """Two would have Prometheus refuse the page."""
    long = "x" * 300
    watch.found = tuple(
        process(number, name, 10)
        for number, name in enumerate(("\x1b", "\\x1b", long + "1", long + "2"), 1)
    )
    told = values(openmetrics(Collector(watch, throttles=list).collect().text(openmetrics=True)))
    downloads = {
        labels["name"]: value
        for labels, value in told["pybpfthrottle_traffic_by_name_bytes_total"]
        if labels["direction"] == "download"
    }
    assert downloads == {"\\x1b": 20, "x" * 200: 20}


def traffic_of(collector: Collector, kind: str = "name") -> dict[str, float]:
    """What the metrics tell to have been received."""
    told = values(openmetrics(collector.collect().text(openmetrics=True)))
    return {
        labels[kind]: value
        for labels, value in told.get(f"pybpfthrottle_traffic_by_{kind}_bytes_total", [])
        if labels["direction"] == "download"
    }


def test_traffic_is_told_by_name_unit_container_and_user(collector, watch) -> None:
    """Without loopback; what has no unit, or no container, is told as well."""
    assert traffic_of(collector)["curl"] == 150
    assert traffic_of(collector, "unit") == {"a.service": 150, "none": 7}
    assert traffic_of(collector, "container") == {"lxc/web": 150, "none": 7}
    assert traffic_of(collector, "user") == {"root": 157}


def test_a_counter_never_shrinks(collector, watch) -> None:
    """Not if a process gets another name, nor if another one has what it was charged for."""
    assert traffic_of(collector)["curl"] == 150
    watch.found = (replace(watch.found[0], name="wget"), process(2, "curl", 10), watch.found[2])
    assert (traffic_of(collector)["curl"], "wget" in traffic_of(collector)) == (150, False)
    watch.found = (process(1, "wget", 130), process(2, "curl", 60), watch.found[2])
    assert traffic_of(collector)["wget"] == 30
    assert traffic_of(collector)["curl"] == 160


def test_there_are_only_so_many_series(monkeypatch) -> None:
    """What comes later is in the sum of others, until one of the first has been idle for long."""
    monkeypatch.setattr(metrics, "_MOST_SUBJECTS", 2)
    subjects = Subjects()
    subjects.add({"a": Moved(1), "b": Moved(2), "c": Moved(3), "d": Moved(4)}, 1000.0)
    assert subjects.sums() == {"a": (1, 0), "b": (2, 0), "other": (7, 0)}
    subjects.add({"a": Moved(1), "c": Moved(5)}, 1200.0)
    assert subjects.sums()["other"] == (12, 0)
    subjects.add({"a": Moved(1)}, 1320.0)
    subjects.add({"c": Moved(50)}, 1330.0)
    assert subjects.sums() == {"a": (3, 0), "other": (12, 0), "c": (50, 0)}
    subjects.add({"b": Moved(9)}, 1340.0)
    assert subjects.sums()["other"] == (21, 0)


def test_what_cannot_be_read_is_missing(watch) -> None:
    """And the page says so; so does the command, which ends with 1."""

    def refuse():
        raise PermissionError(1, "may not look")

    watch.found = ()
    page = Collector(watch, throttles=refuse).collect()
    told = values(openmetrics(page.text(openmetrics=True)))
    assert told["pybpfthrottle_collector_success"] == [
        ({"collector": "throttles"}, 0),
        ({"collector": "traffic"}, 0),
    ]
    assert "pybpfthrottle_throttles" not in told
    assert set(page.problems) == {"throttles", "traffic"}


def test_there_are_only_so_many_throttles(monkeypatch) -> None:
    """The number of all is told, and that some are missing."""
    monkeypatch.setattr(metrics, "_MOST_THROTTLES", 2)
    found = [throttle(f"bbb33{number}") for number in range(3)]
    page = Collector(throttles=lambda: found).collect()
    told = values(openmetrics(page.text(openmetrics=True)))
    assert len(told["pybpfthrottle_throttle_info"]) == 2
    assert told["pybpfthrottle_throttles"] == [({}, 3)]
    assert told["pybpfthrottle_collector_success"] == [({"collector": "throttles"}, 0)]


@pytest.fixture
def command(collector, monkeypatch):
    """Runs pybpfthrottle metrics."""
    monkeypatch.setattr("pybpfthrottle.cli.metrics.Collector", lambda: collector)
    return lambda *options: CliRunner().invoke(cli, ["metrics", *options])


def test_the_command_prints_what_prometheus_reads(command) -> None:
    """OpenMetrics if that is asked for."""
    done = command()
    assert done.exit_code == 0
    assert "pybpfthrottle_throttle_info" in values(prometheus(done.output))
    assert "pybpfthrottle_throttle_info" in values(openmetrics(command("--openmetrics").output))


def test_a_file_is_replaced_in_one_step(command, tmp_path, monkeypatch) -> None:
    """The collector sees the old one or the new one, whole; after a failure, the old one."""
    path = tmp_path / "pybpfthrottle.prom"
    path.write_text("old")
    old = path.open()
    assert command("--output", str(path)).exit_code == 0
    assert old.read() == "old"
    old.close()
    assert values(prometheus(path.read_text()))["pybpfthrottle_throttles"] == [({}, 3)]
    assert path.stat().st_mode & 0o777 == 0o644
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fchmod", full)
    done = command("-o", str(path))
    assert isinstance(done.exception, OSError)
    assert done.exception.filename == str(path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["pybpfthrottle.prom"]


def test_a_link_is_replaced_and_not_followed(command, tmp_path) -> None:
    """Whoever may write to the directory cannot have root write elsewhere."""
    (tmp_path / "elsewhere").write_text("mine")
    path = tmp_path / "x.prom"
    path.symlink_to("elsewhere")
    assert command("--output", str(path)).exit_code == 0
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert not path.is_symlink()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9853", ("127.0.0.1", 9853)),
        ("192.0.2.1:80", ("192.0.2.1", 80)),
        ("[::1]:9853", ("::1", 9853)),
    ],
)
def test_where_to_listen_is_read(text, address) -> None:
    """On loopback unless it is said otherwise."""
    assert Address.parse(text) == address


@pytest.mark.parametrize(
    "text", ["", "x", ":80", "::1:80", "70000", "-1", "1.2.3.4:", "80:", "8\uff10"]
)
def test_where_nobody_can_listen_is_refused(text) -> None:
    """With what is accepted."""
    with pytest.raises(SettingsError, match="9853"):
        Address.parse(text)


def test_an_address_in_use_is_told(collector) -> None:
    """And one that is not this machine's, or none at all."""
    with Endpoint(Address("127.0.0.1", 0), collector) as made:
        for address in (made.address, Address("192.0.2.77", 1), Address("example.invalid", 1)):
            with pytest.raises(SettingsError, match="cannot listen on"):
                Endpoint(address, collector)


@pytest.fixture
def served(collector):
    """An endpoint, and a supervisor that has other things to do as well."""
    with Endpoint(Address("127.0.0.1", 0), collector) as made, Supervisor() as supervisor:
        beside = Periodic(0.01, lambda: None)
        supervisor.add(made.chores)
        supervisor.add(lambda: [beside])
        yield made, supervisor


def connect(made: Endpoint) -> socket.socket:
    """A client that never waits for long."""
    client = socket.create_connection(made.address, timeout=10)
    client.settimeout(0.001)
    return client


def receive(client: socket.socket, supervisor: Supervisor) -> bytes:
    """What a client gets until the connection ends, while the loop goes on."""
    received, deadline = b"", time.monotonic() + 20
    while time.monotonic() < deadline:
        supervisor.step(time.monotonic() + 0.01)
        with suppress(socket.timeout):
            data = client.recv(1 << 16)
            if not data:
                return received
            received += data
    raise AssertionError(f"no end after {received[:100]!r}")


def ask(served, request: bytes) -> tuple[int, dict[str, str], str]:
    """The status, the header and the body of an answer."""
    made, supervisor = served
    with closing(connect(made)) as client:
        client.sendall(request)
        head, _, body = receive(client, supervisor).decode().partition("\r\n\r\n")
    line, *fields = head.split("\r\n")
    return int(line.split()[1]), dict(one.split(": ", 1) for one in fields), body


ACCEPT = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;"
    "q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (f"Accept: {ACCEPT}\r\n", "application/openmetrics-text"),
        (f"aCCept:{ACCEPT.upper()}\r\n", "application/openmetrics-text"),
        ("Accept: text/plain;version=0.0.4\r\n", "text/plain; version=0.0.4"),
        ("Accept: application/openmetrics-text;q=0, text/plain\r\n", "text/plain; version=0.0.4"),
        ("Accept: */*\r\n", "text/plain; version=0.0.4"),
        ("", "text/plain; version=0.0.4"),
    ],
)
def test_the_client_gets_the_format_that_it_accepts(served, accept, kind) -> None:
    """OpenMetrics only if it asks for it."""
    request = f"GET /metrics?x=1 HTTP/1.1\r\nHost: evil.example\r\n{accept}\r\n"
    status, fields, body = ask(served, request.encode())
    assert status == 200
    assert fields["Content-Type"].startswith(kind)
    assert int(fields["Content-Length"]) == len(body.encode())
    read = openmetrics if "openmetrics" in kind else prometheus
    assert values(read(body))["pybpfthrottle_throttles"] == [({}, 3)]


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200, "ok\n"),
        (b"GET /healthz HTTP/1.1\n\n", 200, "ok\n"),
        (b"HEAD /healthz HTTP/1.1\r\n\r\n", 200, ""),
        (b"GET / HTTP/1.1\r\n\r\n", 404, "see /metrics and /healthz\n"),
        (b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n", 404, "see /metrics and /healthz\n"),
        (b"POST /metrics HTTP/1.1\r\n\r\n" + b"x" * 100_000, 405, "only GET and HEAD\n"),
        (b"GET /metrics\r\n\r\n", 400, "not an HTTP request\n"),
        (b"\xff\x00\x01\r\n\r\n", 400, "not an HTTP request\n"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "not an HTTP request\n"),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 10_000, 431, ""),
    ],
)
def test_other_requests_are_answered_or_refused(served, request_, status, body) -> None:
    """Whatever they are, the answer arrives."""
    found = ask(served, request_)
    assert (found[0], found[2]) == (status, body)
    assert ("Allow" in found[1]) == (status == 405)


def test_head_has_the_length_of_the_page(served) -> None:
    """And not the page."""
    request = b"GET /metrics HTTP/1.1\r\n\r\n"
    _, told, body = ask(served, request)
    status, fields, nothing = ask(served, request.replace(b"GET", b"HEAD"))
    assert (status, fields, nothing) == (200, told, "")
    assert len(body) > 1000


def test_who_is_slow_holds_nobody_up(served) -> None:
    """Not even as many as are served at all; and they are cut off in the end."""
    made, supervisor = served
    slow = []
    for _ in range(40):
        slow.append(connect(made))
        slow[-1].sendall(b"GET /metr")
        supervisor.step(time.monotonic() + 0.01)
    status, *_ = ask(served, b"GET /healthz HTTP/1.1\r\n\r\n")
    assert status == 200
    assert len(made._connections) <= endpoint._MOST_CONNECTIONS
    for one in made._connections.values():
        assert one.deadline_s <= time.monotonic() + endpoint._PATIENCE_S
        one.deadline_s = time.monotonic()
    for client in slow:
        with closing(client), suppress(ConnectionResetError):
            assert receive(client, supervisor) == b""
    assert made._connections == {}
    assert made.due_s == float("inf")


def test_who_does_not_read_the_answer_is_cut_off(served, monkeypatch) -> None:
    """However long it is; the loop goes on meanwhile."""
    made, supervisor = served
    monkeypatch.setattr(endpoint, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(made, "_body", lambda openmetrics: b"x" * (64 << 20))
    with closing(connect(made)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        deadline = time.monotonic() + 20
        longest_s = 0.0
        while made._connections or longest_s == 0:
            begin_s = time.monotonic()
            assert begin_s < deadline
            supervisor.step(begin_s + 0.01)
            longest_s = max(longest_s, time.monotonic() - begin_s)
        assert longest_s < 5


def test_the_page_is_not_made_more_often_than_it_can_be(served, monkeypatch) -> None:
    """Who asks again and again gets the same one; later there is a new one."""
    made, _ = served
    request = b"GET /metrics HTTP/1.1\r\n\r\n"
    pages = [ask(served, request)[2]]
    made._collector._throttles = list
    pages.append(ask(served, request)[2])
    made._page_due_s = time.monotonic()
    pages.append(ask(served, request)[2])
    counts = [values(prometheus(page))["pybpfthrottle_throttles"][0][1] for page in pages]
    assert counts == [3, 3, 0]


def test_a_failure_is_an_answer_too(served, caplog) -> None:
    """And a traceback in the log, not the end of the loop."""
    made, _ = served
    made._collector._quotas = lambda: 1 / 0
    assert ask(served, b"GET /metrics HTTP/1.1\r\n\r\n")[0] == 500
    assert "ZeroDivisionError" in caplog.text
    assert ask(served, b"GET /healthz HTTP/1.1\r\n\r\n")[0] == 200


def test_without_descriptors_it_waits_for_some(served, monkeypatch) -> None:
    """Instead of running in circles; afterwards it answers again."""
    made, supervisor = served

    class Exhausted:
        def __init__(self, listener):
            self.listener = listener

        def accept(self):
            raise OSError(24, "Too many open files")

        def __getattr__(self, name):
            return getattr(self.listener, name)

    listener = made._listener
    made._listener = Exhausted(listener)
    with closing(connect(made)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        while made.due_s == float("inf"):
            supervisor.step(time.monotonic() + 0.01)
        made._epoll.poll(0.05)
        assert made._epoll.poll(0) == []
        made._listener = listener
        made._accepts_again_s = time.monotonic()
        assert receive(client, supervisor).endswith(b"ok\n")


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    """Each metric of its expressions is one of ours; each panel has a source and a unit."""
    dashboard = json.loads((ROOT / "docs/guides/grafana-dashboard.json").read_text())
    known = {
        family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for family in FAMILIES.values()
    }
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    expressions += [
        one["definition"] for one in dashboard["templating"]["list"] if "definition" in one
    ]
    used = {name for text in expressions for name in re.findall(r"pybpfthrottle_\w+", text)}
    assert used <= known
    assert len(used) > 8
    assert (
        len(panels) == len({panel["id"] for panel in panels}) == len({p["title"] for p in panels})
    )
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_the_dashboard_s_expressions_are_promql(tmp_path) -> None:
    """With Grafana's variables filled in, Prometheus reads them all."""
    promtool = needs_command("promtool")
    text = (ROOT / "docs/guides/grafana-dashboard.json").read_text()
    for variable, value in (("$__rate_interval", "5m"), ("$instance", ".*"), ("$throttle", ".*")):
        text = text.replace(variable, value)
    targets = [one for panel in json.loads(text)["panels"] for one in panel["targets"]]
    rules = [{"record": f"r{number}", "expr": one["expr"]} for number, one in enumerate(targets)]
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"groups": [{"name": "g", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(targets)} rules found" in done.stdout
