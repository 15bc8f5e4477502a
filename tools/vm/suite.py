"""What is tested in a machine, and what became of it."""

from __future__ import annotations

import re
import shlex
from typing import Iterator, NamedTuple, Optional
from xml.etree import ElementTree

from vm import ROOT
from vm.archive import Archive
from vm.machine import BOARDS, Run, complain
from vm.userland import FIXTURES, Userland

_OF_LIMITER: tuple[str, ...] = (
    "attachments",
    "leftovers",
    "memlock",
    "own_cgroups",
    "programs",
    "qdiscs",
)
_OF_LIMITER += ("refusals", "shaping", "tc", "teardown", "throttle", "transfers")
_OF_CONDITIONS: tuple[str, ...] = (
    "conditions",
    "conditions_command",
    "conditions_delayed",
    "diversion",
    "network_plugin",
)
# The tests of each part of the product.
AREAS: dict[str, tuple[str, ...]] = {
    "limiter": (
        *(f"tests/kernel/limiter/test_{name}.py" for name in _OF_LIMITER),
        "tests/kernel/diagnostics/test_verify_setup.py",
    ),
    "--pid": (
        "tests/kernel/limiter/test_processes.py",
        "tests/kernel/limiter/test_process_transfers.py",
    ),
    "toolkit": ("tests/kernel/bpf",),
    "backends": ("tests/kernel/limiter/test_backends.py",),
    "conditions": tuple(f"tests/kernel/limiter/test_{name}.py" for name in _OF_CONDITIONS),
}
# In a few minutes.
DEFAULT_TESTS = (*AREAS["limiter"], AREAS["--pid"][0])
# An emulated machine carries about 100 MB/s, and its clock stutters: one-second windows of three
# transfers at once tell of the emulation. And 40 starts of an interpreter side by side take it
# nearly as long as the limit of one test, as 2000 sockets take it more than a second to tell of. Of
# the transfers of processes, those whose verdict is by a wide margin and does not take minutes. No
# way is short there. Of tc what other kernels lack; it looks for sockets again and again, which
# takes so long there that new ones have moved megabytes by then. What the gate lets pass tells of
# the emulation too: its keeper is a process that has to be quick.
EXPRESSION = " and ".join(
    [
        "not many_starts and not 2000_sockets and not two_thousand_sockets",
        "not short_way and (not test_transfers or 100K) and (not test_tc or policer)",
        "not (held_to_its_limit and ifb_tc) and not goes_through_the_gate",
        "(not test_process_transfers or one_of_two or a_child_transfers or moved_process)",
    ]
)
# For want of these a test may be skipped in the guest (see tests/since.py), and for nothing else
# but what is newer than its kernel, or not in that kernel's configuration.
MAY_LACK: tuple[str, ...] = (
    "clang-14",
    "llvm-strip-14",
    "llvm-objdump-14",
    "llvm-objcopy-14",
    "readelf",
)
MAY_LACK += ("nginx", "iperf3")
# nf_tables needs a crc32c on 5.10 and 6.1, which its dependencies do not tell.
MODULES: tuple[str, ...] = (
    "crc32c_generic",
    "veth",
    "tun",
    "ifb",
    "sch_fq",
    "sch_netem",
    "act_police",
)
MODULES += ("cls_matchall", "sch_ingress", "sch_htb", "cls_u32", "cls_bpf", "act_mirred")
MODULES += (
    "nf_defrag_ipv4",
    "nf_tables",
    "nft_socket",
    "nft_limit",
    "nft_objref",
    "nft_chain_nat",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "vsock",
)
# Nothing loads a module on demand here. These tell which cgroup a socket is of, and its peer.
MODULES += ("tcp_diag", "udp_diag", "raw_diag", "mptcp_diag", "unix_diag")

STARTED = "vmtest: started"
FINISHED = "vmtest: finished"
_REPEATED = "The tests that failed, once more:"
_RESULTS = "vmtest: results"
_INIT = """#!/bin/sh
/bin/busybox mkdir -p /busybox /proc /sys /dev /tmp /run /root
/bin/busybox --install -s /busybox
export {environment} HOME=/root LANG=C.UTF-8 COLUMNS=200
export TESTS_MAY_LACK="{may_lack}" TESTS_FIXTURES={fixtures}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
for module in $(cat /modules/order); do insmod /modules/$module; done
ip link set lo up
cd {root}
python={python}
set -- {arguments}
stty -F /dev/{output} -onlcr
exec </dev/null >/dev/{output} 2>&1
echo "{started} on Linux $(uname -r), $($python -c 'import platform, struct
print("Python", platform.python_version(), "of", struct.calcsize("P") * 8, "bits")')"
{work}
echo "{finished} $status" >/dev/{console}
poweroff -f
"""

_TEST = f"""pytest="$python -m pytest -q -o cache_dir=/tmp/pytest --color=no"
$pytest --durations=20 --junitxml=/results.xml "$@"
status=$?
for again in 1 2; do
    [ $status = 1 ] || break
    # As tools/test does, and once more: whatever else runs here can disturb any of them, and a
    # defect fails each time.
    echo "{_REPEATED}"
    $pytest --last-failed --junitxml=/repeated$again.xml "$@"
    status=$?
done
for file in /results.xml /repeated*.xml; do
    echo "{_RESULTS}"
    cat $file
done"""
_RUN = """$python "$@"
status=$?"""


class Outcome(NamedTuple):
    """What became of one test, in which area, and why it was skipped."""

    test: str
    area: Optional[str]
    verdict: str
    reason: str


class Report(NamedTuple):
    """What became of all tests on one machine."""

    run: Run
    verdict: str
    outcomes: tuple[Outcome, ...]

    def count(self, verdict: str, area: Optional[str] = None) -> int:
        """Return how many tests passed, failed or were skipped, of all areas or of one."""
        return sum(one.verdict == verdict and area in (None, one.area) for one in self.outcomes)

    @property
    def is_good(self) -> bool:
        """Whether no test has failed for good."""
        return self.verdict.startswith("passed")

    def failures(self) -> list[str]:
        """Return what pytest says at its end of each test that failed, repeated ones by that."""
        last = self.run.output.split(_RESULTS)[0].split(_REPEATED)[-1]
        return re.findall(r"^(?:FAILED|ERROR) .*$", last, re.M)

    def running(self) -> tuple[str, str]:
        """Return the kernel's release and the Python, as the machine itself says."""
        found = re.search(rf"{STARTED} on Linux (.*), Python (.*)", self.run.output)
        return (found[1], found[2].strip()) if found else ("?", "?")


def init(userland: Userland, arch: str, arguments: list[str], *, tests: bool) -> bytes:
    """Return the part of the initramfs that says what runs: tests, or a script of ours."""
    board, archive = BOARDS[arch], Archive()
    text = _INIT.format(
        environment=userland.environment,
        root=shlex.quote(str(ROOT)),
        python=shlex.quote(userland.python),
        arguments=shlex.join(arguments),
        may_lack=" ".join(MAY_LACK),
        fixtures=FIXTURES,
        console=board.console,
        output=board.output,
        started=STARTED,
        finished=FINISHED,
        work=_TEST if tests else _RUN,
    )
    archive.add("/init", text.encode())
    return archive.finish()


def report(run: Run, timeout_s: float) -> Report:
    """Return what became of the tests; show what the machine said."""
    shown, *results = run.output.split(_RESULTS)
    print(f"\n=== {run.machine.name}", shown, sep="\n", flush=True)
    status = re.search(rf"{FINISHED} (\d+)", run.console)
    if status:
        verdict = "passed" if status[1] == "0" else f"failed with exit status {status[1]}"
        if status[1] == "0" and _REPEATED in shown:
            verdict = "passed, some only when repeated"
    else:
        what = "boot" if run.boot_s is None else "finish"
        verdict = (
            f"DID NOT {what.upper()}; ended after {run.total_s:.0f} s (--timeout {timeout_s:g})"
        )
        complain(run, verdict)
    # What a test did when it was repeated counts.
    last = {one.test: one for xml in results for one in outcomes(xml)}
    return Report(run, verdict, tuple(last.values()))


def outcomes(xml: str) -> Iterator[Outcome]:
    """Read what pytest writes for --junitxml; nothing, where a machine did not get as far."""
    try:
        cases = list(ElementTree.fromstring(xml.strip()).iter("testcase"))  # noqa: S314 (our own)
    except ElementTree.ParseError:
        return
    for case in cases:
        module = case.get("classname", "")
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        verdict = "failed" if failed else "passed" if skipped is None else "skipped"
        reason = "" if skipped is None else skipped.get("message", "")
        yield Outcome(f"{module}::{case.get('name')}", _area(module), verdict, reason)


def _area(module: str) -> Optional[str]:
    path = module.replace(".", "/")
    for area, tests in AREAS.items():
        if any(f"{path}/".startswith(f"{test.partition('.')[0]}/") for test in tests):
            return area
    return None
