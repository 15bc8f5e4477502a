/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The map that the shaper, the gate and the gate's keeper share. */
#define GATE_MAP_FLAGS (1 << 10) /* BPF_F_MMAPABLE: the keeper reads it without a system call */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, GATE_MAP_FLAGS);
	__type(key, __u32);
	__type(value, struct throttle_gate);
} GATE SEC(".maps");
