/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What is known of each TCP connection that is shaped. */

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct throttle_socket);
} SOCKETS SEC(".maps");
