/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What is owed to the limits. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, THROTTLE_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct throttle_bucket);
} CGROUP_BUCKETS SEC(".maps");
