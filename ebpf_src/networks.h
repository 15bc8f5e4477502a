/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Limits for some networks only, at the other end: where the flag THROTTLE_NETWORKS says so. */

#define BPF_F_NO_PREALLOC 1
#define AF_INET6 10

#if defined(DIRECT_PACKET_ACCESS) || defined(MARKED)
#include "exempt.h"

/*
 * Whether that of the packet's other end is not. A function of its own: the verifier would else
 * follow all that comes after it for each of its ways.
 */
__attribute__((noinline)) int is_exempt_packet(struct __sk_buff *skb, __u32 direction)
{
	struct throttle_network key; /* without an initializer: that would be a map of constants */
	__u8 room[16];
	const __u8 *from = bytes_at(skb, 0, room, 1);

	if (!from)
		return 0;
	key.bits = ADDRESS_BITS;
	if (from[0] >> 4 == 4) {
		from = bytes_at(skb, direction == THROTTLE_DOWNLOAD ? 12 : 16, room, 4);
		if (!from)
			return 0;
		key.address[0] = key.address[1] = 0;
		key.address[2] = MAPPED_IP4;
		__builtin_memcpy(&key.address[3], from, 4);
	} else {
		from = bytes_at(skb, direction == THROTTLE_DOWNLOAD ? 8 : 24, room, 16);
		if (!from)
			return 0;
		__builtin_memcpy(key.address, from, 16);
	}
	return is_exempt(&key);
}

always_inline int is_exempt_end(__u32 family, __u32 ip4, __u32 first, __u32 second, __u32 third,
				__u32 fourth)
{
	struct throttle_network key = { ADDRESS_BITS, { first, second, third, fourth } };

	if (family != AF_INET6) {
		key.address[0] = key.address[1] = 0;
		key.address[2] = MAPPED_IP4;
		key.address[3] = ip4;
	}
	return is_exempt(&key);
}

/* Whether connections with the other end are not limited. */
#define IS_EXEMPT(config, from, remote)                                                            \
	((config)->flags & THROTTLE_NETWORKS &&                                                    \
	 is_exempt_end(from->family, from->remote##4, from->remote##6[0], from->remote##6[1],      \
		       from->remote##6[2], from->remote##6[3]))
#else
/* Linux 4.14 does without. */
#define is_exempt_packet(skb, direction) 0
#define IS_EXEMPT(config, from, remote) 0
#endif
