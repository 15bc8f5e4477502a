/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The map that the policer, the shaper, the gate and the gate's keeper share. Where there is a keeper,
 * user space makes it so that the keeper can map it into its memory (Linux 5.5).
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct throttle_gate);
} GATE SEC(".maps");
