"""Time from process start to a loaded object, and peak memory, next to bpftool and BCC.

Loads the shipped object, one with CO-RE relocations and the same one without, and a large one.
Without clang-14 it loads only the shipped one.

BCC compiles a program like the shipped one when it loads it. On Debian 12, install python3-bpfcc
and linux-headers-amd64; if the headers are not the running kernel's, set
BCC_KERNEL_SOURCE=/usr/src/linux-headers-.... bpftool's memory is not measured.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benches.process import Sample, medians, timed
from benches.surroundings import ENVIRONMENT, ROOT
from benches.table import configure, show

__all__ = ["configure", "main"]

_PROGRAMS, _STEPS = 100, 400
_CLANG = ("clang-14", "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-c")
_SYSTEM_PYTHON = "/usr/bin/python3"

# The end of each command in Python.
_ARRIVED = """
import time
print(time.time_ns())
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
_LOAD = """
import sys
from pybpfthrottle.bpf.obj import elf; from pybpfthrottle.bpf import loader
loaded = loader.load(elf.read_file(sys.argv[1]))
"""
# The time of mounting is not bpftool's: it ends before the call begins.
_BPFTOOL = """
set -e
mount -t bpf none "$1"
begin=$(date +%s%N)
bpftool prog loadall "$2" "$1/programs"
echo "$begin $(date +%s%N)"
"""
# In BCC's dialect: a clock for each direction, moved by each packet; counters for each CPU.
_BCC = '''
from bcc import BPF
program = BPF(text="""
struct bucket { u64 even_at_ns; };
struct stats { u64 calls, packets, bytes, dropped; };
BPF_ARRAY(buckets, struct bucket, 2);
BPF_PERCPU_ARRAY(counters, struct stats, 2);
int police(struct __sk_buff *skb) {
    u32 key = 0;
    u64 now = bpf_ktime_get_ns();
    struct bucket *bucket = buckets.lookup(&key);
    struct stats *stats = counters.lookup(&key);
    if (!bucket || !stats)
        return 1;
    stats->calls++;
    if (bucket->even_at_ns > now + 250000000) {
        stats->dropped++;
        return 0;
    }
    lock_xadd(&bucket->even_at_ns, (u64)skb->len * 1000);
    stats->packets++;
    stats->bytes += skb->len;
    return 1;
}
""")
program.load_func("police", BPF.CGROUP_SKB)
'''

_PREFIX = """
typedef unsigned int u32;
typedef unsigned long long u64;
#define SEC(name) __attribute__((section(name), used))
char LICENSE[] SEC("license") = "GPL";
u64 found;
"""
_CORE = """
static void *(*bpf_get_current_task)(void) = (void *)35;
static long (*bpf_probe_read_kernel)(void *, u32, const void *) = (void *)113;
struct task_struct { int tgid; } ACCESS;
SEC("raw_tp/sys_enter") int reads(void *context)
{
    struct task_struct *task = bpf_get_current_task();
    return bpf_probe_read_kernel(&found, sizeof(int), &task->tgid);
}
"""
_LARGE = """
SEC("socket") int program_%d(u32 *context)
{
    u64 sum = context[0];
%s    found += sum;
    return sum;
}
"""


def measure(rounds: int) -> dict[str, dict[str, object]]:
    """Each way in turn, so that what disturbs one disturbs all."""
    with tempfile.TemporaryDirectory() as directory:
        ways = _ways(Path(directory))
        # The modules that are not ours are compiled in this round.
        for command in ways.values():
            timed(command, ENVIRONMENT)
        samples: dict[str, list[Sample]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, command in ways.items():
                samples[name].append(timed(command, ENVIRONMENT))
    return medians(samples)


def _ways(directory: Path) -> dict[str, list[str]]:
    target = "bpfel" if sys.byteorder == "little" else "bpfeb"
    objects = {"shipped": str(ROOT / "prebuilt" / f"throttle.{target}.o")}
    objects.update(_compiled(directory))
    ways = {"bare interpreter": [sys.executable, "-c", _ARRIVED]}
    for name, path in objects.items():
        ways[f"{name}: pybpfthrottle"] = [sys.executable, "-c", _LOAD + _ARRIVED, path]
        if shutil.which("bpftool"):
            mounted = directory / "bpf"
            mounted.mkdir(exist_ok=True)
            command = ["sh", "-c", _BPFTOOL, "sh", str(mounted), path]
            ways[f"{name}: bpftool"] = ["unshare", "--mount", *command]
    if _has_bcc():
        ways["shipped: BCC, the like"] = [_SYSTEM_PYTHON, "-c", _BCC + _ARRIVED]
    return ways


def _compiled(directory: Path) -> dict[str, str]:
    """The objects that are made for this."""
    if shutil.which(_CLANG[0]) is None:
        _left_out("all but the shipped object", "clang-14 is missing (apt-get install clang-14)")
        return {}
    steps = "".join(f"    sum = sum * {2 * n + 3} ^ sum >> {n % 31 + 1};\n" for n in range(_STEPS))
    large = "".join(_LARGE % (number, steps) for number in range(_PROGRAMS))
    sources = {
        "without CO-RE": _PREFIX + _CORE.replace("ACCESS", ""),
        "CO-RE": _PREFIX + _CORE.replace("ACCESS", "__attribute__((preserve_access_index))"),
        f"{_PROGRAMS} programs": _PREFIX + large,
    }
    built = {}
    for name, source in sources.items():
        path = Path(directory, f"{name.replace(' ', '_')}.c")
        path.write_text(source)
        built[name] = str(path.with_suffix(".o"))
        subprocess.run([*_CLANG, str(path), "-o", built[name]], check=True)
    return built


def _has_bcc() -> bool:
    done = subprocess.run([_SYSTEM_PYTHON, "-c", _BCC], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it failed"]
        _left_out("BCC", f"{lines[-1]} (see --help)")
    return not done.returncode


def _left_out(what: str, why: str) -> None:
    print(f"{what} is left out: {why}", file=sys.stderr)


def main(arguments: argparse.Namespace) -> int:
    return show(measure(arguments.rounds), as_json=arguments.json)
