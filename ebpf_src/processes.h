/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The map that marks.h and processes.bpf.c share. */
#define MOST_PROCESSES 32768

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MOST_PROCESSES);
	__type(key, __u32);
	__type(value, struct throttle_process);
} PROCESSES SEC(".maps");
