"""Events a second into Python on one CPU, next to BCC and to a C program with libbpf.

A program puts events of 24 bytes into a buffer, and then each reader reads them all; only the
reading is timed. Also the time until an event is there in `async for`, the median.

Needs clang-14. On Debian 12, libbpf's reader needs gcc and libbpf-dev, BCC's python3-bpfcc and
headers of a kernel in one directory, such as a copy of both directories of linux-headers-amd64 in
/usr/src: BCC_KERNEL_SOURCE=DIRECTORY names it.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from benches.surroundings import ENVIRONMENT, ROOT
from benches.table import configure, show
from pybpfthrottle import bpf
from pybpfthrottle.bpf.programs import Program

__all__ = ["configure", "main"]

# How many events a reader returns that it has read, and in how many nanoseconds.
Way = Callable[[], tuple[int, int]]

COUNT = 100_000
KINDS = ("ring", "array")
_PACKET = bytes(64)
_LATENCIES = 100
_PAGES = 2048
_SYSTEM_PYTHON = "/usr/bin/python3"
_CLANG = ("clang-14", "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-c")

_SOURCE = """
typedef unsigned int u32;
typedef unsigned long long u64;
#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name
static u64 (*ktime)(void) = (void *)5;
static long (*perf)(void *, void *, u64, void *, u64) = (void *)25;
static long (*output)(void *, void *, u64, u64) = (void *)130;
struct event { u64 sequence, at_ns; u32 pid, length; };
struct { __uint(type, 27); __uint(max_entries, 1 << 23); __type(value, struct event); }
    ring SEC(".maps");
struct { __uint(type, 4); __uint(key_size, 4); __uint(value_size, 4); } array SEC(".maps");
u64 sequence;
SEC("tc") int to_ring(void *ctx)
{
    struct event event = { sequence++, ktime(), 1, 2 };
    return output(&ring, &event, sizeof(event), 0);
}
SEC("tc") int to_array(void *ctx)
{
    struct event event = { sequence++, ktime(), 1, 2 };
    return perf(ctx, &array, 0xffffffff, &event, sizeof(event));
}
char LICENSE[] SEC("license") = "GPL";
"""

# Reads a pinned map each time that it gets a line, and prints how many events and nanoseconds.
_LIBBPF = """
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
struct event { unsigned long long sequence, at_ns; unsigned pid, length; };
static unsigned long long count, sum;
static int in_ring(void *ctx, void *data, size_t size)
{
    count++;
    sum += ((struct event *)data)->sequence;
    return 0;
}
static void in_array(void *ctx, int cpu, void *data, unsigned size) { in_ring(ctx, data, size); }
static long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}
int main(int argc, char **argv)
{
    int fd = bpf_obj_get(argv[1]), is_ring = argv[2][0] == 'r';
    struct ring_buffer *ring = is_ring ? ring_buffer__new(fd, in_ring, 0, 0) : 0;
    struct perf_buffer *array = is_ring ? 0 : perf_buffer__new(fd, PAGES, in_array, 0, 0, 0);
    char line[8];
    if (!ring && !array)
        return 1;
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin)) {
        long long begin = now();
        count = 0;
        is_ring ? ring_buffer__consume(ring) : perf_buffer__consume(array);
        printf("%llu %lld\\n", count, now() - begin);
        fflush(stdout);
    }
    return sum == 0;
}
"""

# The same by BCC, whose program is its own; it is run as ours are.
_BCC = """
import sys, time
sys.path.append(ROOT)
from bcc import BPF
from pybpfthrottle.bpf.programs import Program
program = BPF(text='''
struct event { u64 sequence, at_ns; u32 pid, length; };
BPF_RINGBUF_OUTPUT(ring, 2048);
BPF_PERF_OUTPUT(array);
BPF_ARRAY(sequence, u64, 1);
int to_ring(struct __sk_buff *ctx) {
    struct event event = { 1, bpf_ktime_get_ns(), 1, 2 };
    return ring.ringbuf_output(&event, sizeof(event), 0);
}
int to_array(struct __sk_buff *ctx) {
    struct event event = { 1, bpf_ktime_get_ns(), 1, 2 };
    return array.perf_submit(ctx, &event, sizeof(event));
}
''')
kind, count = sys.argv[1], int(sys.argv[2])
table, seen = program[kind], 0
def see(ctx, data, size):
    global seen
    seen += table.event(data).pid
if kind == "ring":
    table.open_ring_buffer(see)
    read = program.ring_buffer_consume
else:
    table.open_perf_buffer(see, page_cnt=2048)
    read = lambda: program.perf_buffer_poll(timeout=0)
function = program.load_func(f"to_{kind}", BPF.SCHED_CLS)
sender = Program(function.fd, name="bcc", type=3, expected_attach_type=None)
print("ready", flush=True)
for line in sys.stdin:
    sender.test_run(bytes(64), repeat=count)
    begin, seen = time.monotonic_ns(), 0
    read()
    print(seen, time.monotonic_ns() - begin, flush=True)
"""


def main(arguments: argparse.Namespace) -> int:
    """Measure, and show the table."""
    if shutil.which(_CLANG[0]) is None:
        print("clang-14 is missing (apt-get install clang-14)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        path = Path(directory)
        (path / "events.c").write_text(_SOURCE)
        built = [*_CLANG, str(path / "events.c"), "-o", str(path / "events.o")]
        subprocess.run(built, check=True)
        loaded = stack.enter_context(bpf.load(path / "events.o"))
        ways = dict([*_own(loaded), *_libbpf(loaded, path, stack), *_bcc()])
        rates: dict[str, list[float]] = {name: [] for name in ways}
        # Each in turn, so that what disturbs one disturbs all. The best round counts.
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                count, took_ns = way()
                rates[name].append(count / took_ns * 1e9)
        table: dict[str, dict[str, Any]] = {
            name: {"events_per_s": round(max(found))} for name, found in rates.items()
        }
        for kind in KINDS:
            delay_us = round(asyncio.run(_latency(loaded, kind)) * 1e6)
            table[f"{kind}: async for"] = {"median_us": delay_us}
    return show(table, as_json=arguments.json)


def _own(loaded: bpf.Object) -> Iterator[tuple[str, Way]]:
    """Our ways. A map has one reader at a time, so each opens it anew."""
    types: dict[str, Any] = {
        "typed by BTF": loaded.record("event"),
        "tuples": "QQII",
        "bytes": bytes,
        "memoryviews": memoryview,
    }
    for kind in KINDS:
        for name, record in types.items():
            yield f"{kind}: {name}", partial(_read, loaded, kind, record)


def _read(loaded: bpf.Object, kind: str, record: Any) -> tuple[int, int]:
    with _reader(loaded, kind, record) as reader:
        _send(loaded.programs[f"to_{kind}"], COUNT)
        begin = time.monotonic_ns()
        count = sum(1 for _ in reader.read(0))
        return count, time.monotonic_ns() - begin


def _reader(loaded: bpf.Object, kind: str, record: Any) -> Any:
    if kind == "ring":
        return bpf.RingBuffer(loaded.maps[kind], record)
    return bpf.PerfBuffer(loaded.maps[kind], record, pages=_PAGES)


def _send(program: Program, count: int) -> None:
    program.test_run(_PACKET, repeat=count)


async def _latency(loaded: bpf.Object, kind: str) -> float:
    """Return the median of the seconds from an event's sending to its arrival."""
    delays = []
    with _reader(loaded, kind, "QQII") as reader:
        stream = reader.__aiter__()
        for _ in range(_LATENCIES):
            task = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.001)
            _send(loaded.programs[f"to_{kind}"], 1)
            _, sent_ns, *_ = await task
            delays.append((time.monotonic_ns() - sent_ns) / 1e9)
        await stream.aclose()
    return float(sorted(delays)[_LATENCIES // 2])


def _libbpf(loaded: bpf.Object, path: Path, stack: ExitStack) -> Iterator[tuple[str, Way]]:
    source, program = path / "libbpf.c", path / "libbpf"
    source.write_text(_LIBBPF)
    command = ["cc", "-O2", f"-DPAGES={_PAGES}", str(source), "-o", str(program), "-lbpf"]
    if not shutil.which("cc"):
        _left_out("libbpf's reader in C", "there is no cc (apt-get install gcc)")
        return
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        _left_out("libbpf's reader in C", f"{done.stderr.splitlines()[0]} (see --help)")
        return
    mounted = path / "bpf"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "bpf", "none", str(mounted)], check=True)
    stack.callback(subprocess.run, ["umount", str(mounted)], check=True)
    for kind in KINDS:
        loaded.maps[kind].pin(mounted / kind)
        send = partial(_send, loaded.programs[f"to_{kind}"], COUNT)
        yield (
            f"{kind}: C with libbpf",
            partial(_of_process, [str(program), str(mounted / kind), kind], send),
        )


def _bcc() -> Iterator[tuple[str, Way]]:
    script = _BCC.replace("ROOT", repr(str(ROOT)))
    for kind in KINDS:
        command = [_SYSTEM_PYTHON, "-c", script, kind, str(COUNT)]
        try:
            _of_process(command)
        except (OSError, subprocess.CalledProcessError) as error:
            told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            _left_out(f"BCC's reader of {kind}", f"{told[-1]} (see --help)")
            continue
        yield f"{kind}: Python with BCC", partial(_of_process, command)


def _of_process(command: Sequence[str], send: Callable[[], None] = lambda: None) -> tuple[int, int]:
    """Return how many events another program has read, and its nanoseconds."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if ready:
            send()
        out, errors = process.communicate("go\n" if ready else None)
        if process.returncode or not ready:
            raise subprocess.CalledProcessError(process.returncode, command, out, errors)
    count, took_ns = map(int, out.split())
    return count, took_ns


def _left_out(what: str, why: str) -> None:
    print(f"{what} is left out: {why}", file=sys.stderr)
