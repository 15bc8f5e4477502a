/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The networks of a limit for some networks only. */

#define BPF_MAP_TYPE_LPM_TRIE 11
#define ADDRESS_BITS 128
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MAPPED_IP4 0xffff0000 /* the third word of an IPv4 address in IPv6 */
#else
#define MAPPED_IP4 0x0000ffff
#endif

/*
 * Whether packets to and from a network are limited: 0 or 1. Of several the smallest decides. User
 * space makes it as large as it has to be: before Linux 5.11 memory is charged for all elements.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct throttle_network);
	__type(value, __u32);
} CGROUP_NETWORKS SEC(".maps");

/* Whether the network of an address is not limited. */
always_inline int is_exempt(const struct throttle_network *address)
{
	const __u32 *limited = bpf_map_lookup_elem(&CGROUP_NETWORKS, address);

	return limited && !*limited;
}
