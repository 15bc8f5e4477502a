/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The limits, and whose the throttle is. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, THROTTLE_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct throttle_config);
} CGROUP_CONFIGS SEC(".maps");
