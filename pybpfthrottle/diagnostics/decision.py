"""The decision tree: from the checks' results to one conclusion with its cause and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, Mapping, NamedTuple, Union

from pybpfthrottle.diagnostics.check import Outcome, Result

Results = Mapping[str, Result]


@dataclass(frozen=True)
class Conclusion:
    """A leaf of the tree.

    ``scenario`` is a letter for the kind of trouble: A the user's cgroup, B the kernel's
    configuration, C a fault of the kernel, D the loader, E the program, P privileges, O other
    programs; W works. ``because`` names the checks that tell more.
    """

    id: str
    scenario: str
    title: str
    symptoms: str
    cause: str
    remedy: str
    because: tuple[str, ...] = ()
    works: bool = False


@dataclass(frozen=True)
class Question:
    """A fork of the tree."""

    text: str
    ask: Callable[[Results], bool]
    yes: Node
    no: Node


Node = Union[Question, Conclusion]


class Step(NamedTuple):
    """A question on the path, and its answer."""

    question: Question
    answer: bool


def walk(results: Results, node: Node) -> tuple[list[Step], Conclusion]:
    """Return the path from a node to its conclusion."""
    path = []
    while isinstance(node, Question):
        answer = node.ask(results)
        path.append(Step(node, answer))
        node = node.yes if answer else node.no
    return path, node


def conclusions(node: Node) -> Iterator[Conclusion]:
    """Yield all possible conclusions of a tree."""
    if isinstance(node, Conclusion):
        yield node
    else:
        yield from conclusions(node.yes)
        yield from conclusions(node.no)


def _ok(check_id: str) -> Callable[[Results], bool]:
    """Return a test that a check did not fail; a skipped check counts as not failed."""
    return lambda results: results[check_id].outcome is not Outcome.FAIL


def _cause(check_id: str, *causes: str) -> Callable[[Results], bool]:
    return lambda results: results[check_id].cause in causes


def _config_lacks_it(results: Results) -> bool:
    return results["kernel.config"].cause == "config"


def _config_has_it(results: Results) -> bool:
    return results["kernel.config"].outcome is Outcome.PASS


_NO_SYSCALL = Conclusion(
    "python-without-ctypes",
    "D",
    "This Python cannot call the kernel",
    "nothing that needs bpf(2) can be tested",
    "the interpreter lacks a working ctypes, which calls bpf(2)",
    "use your distribution's Python, or build one with libffi and shared libraries",
    ("python",),
)
_NO_PYELFTOOLS = Conclusion(
    "pyelftools-missing",
    "D",
    "pyelftools is missing",
    "the shipped objects cannot be read",
    "this installation is incomplete",
    "pip install pyelftools",
    ("python",),
)
_NO_PROC = Conclusion(
    "no-proc",
    "B",
    "/proc is not mounted",
    "neither processes nor mounts can be seen",
    "nothing has mounted it in this mount namespace",
    "mount -t proc proc /proc",
    ("kernel.proc",),
)
_SETTINGS = Conclusion(
    "settings",
    "D",
    "The settings cannot be used",
    "every command stops with the same error",
    "a config file or an environment variable is wrong",
    "correct what the error names; pybpfthrottle config show lists where each setting comes from",
    ("settings",),
)
_SECCOMP_ALL = Conclusion(
    "bpf-refused",
    "P",
    "This process may not call bpf(2) at all",
    "every command gives ENOSYS, EPERM or EACCES, whatever its arguments",
    "a seccomp filter, as in containers, or a security module",
    "allow bpf in the container's seccomp profile or the module's policy, or run outside of it",
    ("kernel.bpf", "rights.commands", "rights.seccomp", "rights.lsm"),
)
_NO_BPF = Conclusion(
    "kernel-without-bpf",
    "B",
    "The kernel has no bpf(2)",
    "every command gives ENOSYS",
    "it was built without CONFIG_BPF_SYSCALL",
    "boot a kernel of your distribution; all of them have it",
    ("kernel.bpf", "kernel.config"),
)
_NO_RIGHTS = Conclusion(
    "not-privileged",
    "P",
    "This process lacks capabilities",
    "loading gives EPERM; attaching with CAP_BPF alone gives EPERM or EINVAL",
    "BPF programs on cgroups need CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN before Linux 5.8",
    "run it as root (sudo), or give it these capabilities",
    ("rights.capabilities",),
)
_USER_NAMESPACE = Conclusion(
    "user-namespace",
    "P",
    "Root in a user namespace is not root for bpf(2)",
    "this process has the capabilities, but every command gives EPERM",
    "only capabilities in the initial user namespace count",
    "run it outside of the rootless container",
    ("rights.user_namespace", "rights.commands"),
)
_LOCKDOWN = Conclusion(
    "lockdown",
    "P",
    "The kernel is locked down",
    "this process has the capabilities, but commands give EPERM",
    "lockdown refuses BPF on this kernel; secure boot or the kernel command line turns it on",
    "boot without lockdown, or with lockdown=integrity on a kernel of Linux 5.4 or later",
    ("kernel.lockdown", "rights.commands"),
)
_COMMANDS = Conclusion(
    "commands-refused",
    "P",
    "Some commands of bpf(2) are refused",
    "this process has the capabilities, but these commands give EPERM, EACCES or ENOSYS",
    "a seccomp filter or a security module refuses them",
    "allow them in the seccomp profile or the policy; the kernel log shows the denials",
    ("rights.commands", "rights.seccomp", "rights.lsm"),
)
_MEMLOCK = Conclusion(
    "memlock",
    "P",
    "Too little locked memory",
    "creating maps or loading programs gives EPERM despite all capabilities",
    "kernels before 5.11 charge BPF to RLIMIT_MEMLOCK",
    "ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit",
    ("rights.memlock", "trial.load"),
)
_V1_ONLY = Conclusion(
    "cgroup-v1-only",
    "B",
    "Only cgroup v1 is mounted",
    "there is no cgroup that a program could be attached to",
    "the system was started with cgroup v1 only",
    "mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2; for good, boot with"
    " systemd.unified_cgroup_hierarchy=1",
    ("cgroup.v2",),
)
_NO_CGROUP2 = Conclusion(
    "no-cgroup2",
    "B",
    "cgroup v2 is not mounted",
    "there is no cgroup that a program could be attached to",
    "nothing has mounted it in this mount namespace",
    "mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2",
    ("cgroup.v2",),
)
_GONE = Conclusion(
    "target-gone",
    "A",
    "The target is gone",
    "there is no such process or cgroup",
    "it has ended, or it is in another pid namespace",
    "name one that runs; to limit a command from its start, use pybpfthrottle run",
    ("cgroup.target", "trial.target"),
)
_WRONG = Conclusion(
    "target-wrong",
    "A",
    "The target is not a cgroup of version 2",
    "programs cannot be attached to it",
    "the path, unit or process leads elsewhere",
    "use what the error names; pybpfthrottle cgroup tree lists cgroups",
    ("cgroup.target",),
)
_NO_CGROUP_BPF = Conclusion(
    "kernel-without-cgroup-bpf",
    "B",
    "The kernel was built without BPF for cgroups",
    "a program of two instructions cannot be loaded",
    "an option is missing in its configuration",
    "boot a kernel of your distribution; all of them have these options",
    ("trial.load", "kernel.config"),
)
_KERNEL_LOAD = Conclusion(
    "kernel-refuses-program",
    "C",
    "The kernel refuses a program that it should accept",
    "a program of two instructions cannot be loaded, and no known cause applies",
    "a bug in this kernel, or a security module that does not report its refusals",
    "try another kernel; report it with --report FILE",
    ("trial.load", "kernel.log"),
)
_EXCLUSIVE = Conclusion(
    "exclusive-program",
    "O",
    "Another program allows no others",
    "attaching gives EPERM despite all capabilities",
    "it was attached without BPF_F_ALLOW_MULTI, to the target or above it",
    "ask its owner to attach it with BPF_F_ALLOW_MULTI or a link; or limit a cgroup elsewhere",
    ("attached.programs", "trial.target"),
)
_OVERRIDABLE = Conclusion(
    "overridable-program",
    "O",
    "A limit would switch another program off",
    "a program above the target stops running for it as soon as anything is attached to the target",
    "it was attached with BPF_F_ALLOW_OVERRIDE, as by old versions of systemd and some firewalls",
    "limit processes (--pid, --name, --user), or have its owner attach it with"
    " BPF_F_ALLOW_MULTI; --override-others attaches anyway",
    ("trial.target", "attached.programs"),
)
_TOO_MANY = Conclusion(
    "too-many-programs",
    "O",
    "64 programs are attached already",
    "attaching gives E2BIG",
    "a cgroup allows 64 programs at each hook",
    "detach some; pybpfthrottle cgroup show PATH lists them",
    ("attached.programs", "trial.target"),
)
_LINKS_REFUSED = Conclusion(
    "links-refused",
    "P",
    "Only links are refused",
    "BPF_LINK_CREATE gives EPERM, EACCES or ENOSYS, but the legacy call works",
    "a seccomp filter or a security module refuses this one command",
    'use --bpf-attach-method legacy, or put fallback_errnos = ["EINVAL", "EPERM"] below [bpf] in'
    " the config file",
    ("rights.commands", "trial.target"),
)
_USER_CGROUP = Conclusion(
    "user-cgroup",
    "A",
    "The target's cgroup refuses what other cgroups accept",
    "attaching works on a new cgroup, but fails on this one",
    "unknown; what is attached to this cgroup does not explain it",
    "limit its parent (--cgroup), or start the program with pybpfthrottle run",
    ("trial.target", "attached.programs"),
)
_KERNEL_ATTACH = Conclusion(
    "kernel-refuses-attachment",
    "C",
    "The kernel refuses every attachment",
    "programs can be loaded, but neither method attaches them to any cgroup",
    "a bug or a regression in this kernel",
    "try another kernel; report it with --report FILE",
    ("trial.target", "trial.legacy", "kernel.log"),
)
_MISSING = Conclusion(
    "objects-missing",
    "E",
    "This installation is incomplete",
    "the shipped objects are missing",
    "the package was not installed completely",
    "reinstall pybpfthrottle",
    ("objects",),
)
_TRUNCATED = Conclusion(
    "objects-damaged",
    "E",
    "A shipped object is damaged",
    "it cannot be read",
    "the file differs from the one that was shipped",
    "reinstall pybpfthrottle",
    ("objects",),
)
_SECTIONS = Conclusion(
    "objects-old-sections",
    "E",
    "A shipped object has the old section names",
    "its programs have no expected attach type",
    "it was built with the section cgroup/skb, which names no direction",
    "reinstall pybpfthrottle; in a checkout, use cgroup_skb/ingress and cgroup_skb/egress and run"
    " tools/build_prebuilt",
    ("objects",),
)
_STALE = Conclusion(
    "objects-stale",
    "E",
    "A shipped object is out of date",
    "its hash differs from the recorded one",
    "the object or its source has changed since the build",
    "reinstall pybpfthrottle; in a checkout, run tools/build_prebuilt",
    ("objects",),
)
_VERIFIER = Conclusion(
    "objects-rejected",
    "E",
    "The kernel rejects a shipped program",
    "the minimal program can be loaded, the shipped one cannot",
    "this kernel's verifier does not accept its instructions",
    "report it with --report FILE, which includes the verifier's message",
    ("trial.objects", "kernel.version"),
)
_LOADER = Conclusion(
    "loader",
    "D",
    "The loader does not work with this kernel",
    "the minimal program can be loaded, the shipped objects cannot",
    "our loader does something that this kernel does not support",
    "report it with --report FILE",
    ("trial.objects", "kernel.version"),
)
_NEVER_RAN = Conclusion(
    "packets-not-seen",
    "C",
    "The program is attached, but packets do not reach it",
    "more packets were sent than the program counted",
    "a bug in this kernel, or packets that bypass cgroups",
    "report it with --report FILE",
    ("trial.upload", "trial.download"),
)
_NOT_DROPPED = Conclusion(
    "limit-without-effect",
    "C",
    "The limit has no effect",
    "packets are counted, but those over the limit still arrive",
    "a bug in this kernel, or another program that overrides the verdict",
    "report it with --report FILE",
    ("trial.upload", "trial.download"),
)
_NO_OWN_CGROUP = Conclusion(
    "no-own-cgroup",
    "A",
    "No cgroup can be made for a command",
    "pybpfthrottle run fails; limits on existing cgroups work",
    "cgroup v2 is read-only here, or this process may not write to it",
    "mount it writable and run it as root; or limit what is there already, as told below",
    ("cgroup.scratch", "cgroup.root", "trial.marks"),
)
_UNPROVED = Conclusion(
    "works-unproved",
    "W",
    "This machine can limit, as far as could be tested",
    "programs can be attached to the target; whether packets are dropped could not be tested",
    "no cgroup could be made for the test, or the loopback device is down",
    "",
    ("cgroup.scratch", "trial.upload", "trial.download"),
    works=True,
)
_ALONE = Conclusion(
    "one-program-alone",
    "A",
    "The kernel runs only one program per cgroup",
    "--cgroup and --unit need --exclusive, and nothing could be tested in a cgroup of its own",
    "several programs on a cgroup, and asking which are attached, need Linux 4.15",
    "make cgroup v2 writable, detach any other tool's program above, and use pybpfthrottle run;"
    " or add --exclusive, which may switch another tool's program off",
    ("trial.target", "trial.legacy", "cgroup.scratch"),
)
_WORKS_ALONE = Conclusion(
    "works-in-own-cgroups",
    "W",
    "This machine can limit, in cgroups of its own",
    "packets over the limit are dropped, in both directions; a limit within a limit is refused",
    "this kernel (before Linux 4.15) runs only one program for a cgroup: pybpfthrottle run and"
    " --move-cgroup make one; --cgroup and --unit need --exclusive, which may switch another"
    " tool's program off",
    "",
    ("trial.target", "trial.legacy"),
    works=True,
)
_WORKS_LEGACY = Conclusion(
    "works-by-legacy",
    "W",
    "This machine can limit, by the legacy call",
    "packets over the limit are dropped, in both directions",
    "this kernel does not support links, so leftovers of a crash are removed at the next start",
    "",
    ("trial.target",),
    works=True,
)
_WORKS = Conclusion(
    "works",
    "W",
    "This machine can limit",
    "packets over the limit are dropped, in both directions",
    "",
    "",
    works=True,
)


def _traffic_proved(results: Results) -> bool:
    return all(results[name].outcome is Outcome.PASS for name in ("trial.upload", "trial.download"))


def _by_link(results: Results) -> bool:
    return results["trial.target"].cause != "legacy" and results["trial.link"].cause != "no-links"


def _beside_others(results: Results) -> bool:
    return "alone" not in (results["trial.target"].cause, results["trial.legacy"].cause)


def _traffic_cause(*causes: str) -> Callable[[Results], bool]:
    return lambda results: any(
        results[name].cause in causes for name in ("trial.upload", "trial.download")
    )


_TRAFFIC = Question(
    "Does the program see each packet?",
    lambda results: not _traffic_cause("never-ran")(results),
    Question(
        "Does it drop those over the limit?",
        lambda results: not _traffic_cause("not-dropped")(results),
        Question(
            "Could both directions be tested?",
            _traffic_proved,
            Question(
                "By link?",
                _by_link,
                _WORKS,
                Question(
                    "Is it attached beside other programs?",
                    _beside_others,
                    _WORKS_LEGACY,
                    _WORKS_ALONE,
                ),
            ),
            Question(
                "Would it be attached beside other programs?",
                _beside_others,
                Question(
                    "Is a cgroup for commands all that is missing?",
                    _cause("cgroup.scratch", "no-own-cgroup"),
                    _NO_OWN_CGROUP,
                    _UNPROVED,
                ),
                _ALONE,
            ),
        ),
        _NOT_DROPPED,
    ),
    _NEVER_RAN,
)
_OBJECTS = Question(
    "Are the shipped objects complete and up to date?",
    _ok("objects"),
    Question(
        "Does the kernel accept them?",
        _ok("trial.objects"),
        _TRAFFIC,
        Question(
            "Does the verifier reject them?",
            _cause("trial.objects", "verifier"),
            _VERIFIER,
            _LOADER,
        ),
    ),
    Question(
        "Are all of them present?",
        lambda results: results["objects"].cause != "missing",
        Question(
            "Can they be read?",
            lambda results: results["objects"].cause != "truncated",
            Question(
                "Do their sections name a direction?",
                lambda results: results["objects"].cause != "sections",
                _STALE,
                _SECTIONS,
            ),
            _TRUNCATED,
        ),
        _MISSING,
    ),
)
_REFUSED_WITH_RIGHTS = Question(
    "Is an exclusive program attached there or above?",
    _cause("attached.programs", "exclusive"),
    _EXCLUSIVE,
    Question(
        "Would a limit switch off a program above?",
        _cause("trial.target", "overridable"),
        _OVERRIDABLE,
        Question(
            "Are 64 programs attached there?",
            _cause("attached.programs", "too-many"),
            _TOO_MANY,
            Question(
                "Are only links refused?",
                _cause("trial.target", "links-refused"),
                _LINKS_REFUSED,
                Question(
                    "Can it be attached to another cgroup?",
                    lambda results: any(
                        results[name].outcome is Outcome.PASS
                        for name in ("trial.link", "trial.legacy", "trial.root")
                    ),
                    _USER_CGROUP,
                    _KERNEL_ATTACH,
                ),
            ),
        ),
    ),
)
_REFUSED_AT_TARGET = Question(
    "Is CAP_NET_ADMIN missing?",
    _cause("rights.capabilities", "net-admin"),
    _NO_RIGHTS,
    _REFUSED_WITH_RIGHTS,
)
_ATTACH = Question(
    "Can it be attached to the target?",
    _ok("trial.target"),
    _OBJECTS,
    Question(
        "Has it disappeared?",
        _cause("trial.target", "target-gone"),
        _GONE,
        _REFUSED_AT_TARGET,
    ),
)
_LOAD = Question(
    "Does the kernel accept a minimal program?",
    _ok("trial.load"),
    _ATTACH,
    Question(
        "Is locked memory used up?",
        _cause("trial.load", "memlock"),
        _MEMLOCK,
        Question(
            "Does its configuration lack something?",
            _config_lacks_it,
            _NO_CGROUP_BPF,
            _KERNEL_LOAD,
        ),
    ),
)
_TARGET = Question(
    "Is cgroup v2 mounted?",
    _ok("cgroup.v2"),
    Question(
        "Is the target a cgroup of version 2?",
        _ok("cgroup.target"),
        _LOAD,
        Question("Is it gone?", _cause("cgroup.target", "target-gone"), _GONE, _WRONG),
    ),
    Question("Is cgroup v1 mounted?", _cause("cgroup.v2", "v1-only"), _V1_ONLY, _NO_CGROUP2),
)
_REFUSED = Question(
    "Is it in a user namespace of its own?",
    _cause("rights.user_namespace", "user-namespace"),
    _USER_NAMESPACE,
    Question(
        "Is the kernel locked down?",
        _cause("kernel.lockdown", "lockdown"),
        _LOCKDOWN,
        Question(
            "Are all commands refused?",
            _cause("rights.commands", "all"),
            _SECCOMP_ALL,
            _COMMANDS,
        ),
    ),
)
_RIGHTS = Question(
    "Does this process have the capabilities?",
    _ok("rights.capabilities"),
    Question(
        "Does the kernel answer bpf(2)'s commands?", _ok("rights.commands"), _TARGET, _REFUSED
    ),
    _NO_RIGHTS,
)
_PROC = Question(
    "Is /proc mounted?",
    _ok("kernel.proc"),
    Question(
        "Can the settings be used?",
        _ok("settings"),
        Question(
            "Does bpf(2) exist?",
            _ok("kernel.bpf"),
            _RIGHTS,
            Question(
                "Is it refused rather than missing?",
                lambda results: (
                    results["rights.seccomp"].cause == "seccomp" or _config_has_it(results)
                ),
                _SECCOMP_ALL,
                _NO_BPF,
            ),
        ),
        _SETTINGS,
    ),
    _NO_PROC,
)
TREE = Question(
    "Can this Python call bpf(2)?",
    _ok("python"),
    _PROC,
    Question(
        "Is pyelftools missing?",
        _cause("python", "no-pyelftools"),
        _NO_PYELFTOOLS,
        _NO_SYSCALL,
    ),
)
