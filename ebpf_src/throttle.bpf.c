// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The policer: one token bucket for each direction of one throttle.
 *
 * The bucket is kept as virtual time. Each packet that passes moves even_at_ns forward by the time
 * that it takes at the limit; a packet is dropped when even_at_ns is too far ahead of the clock.
 * Moving it is one atomic add, so CPUs that race lose nothing, and a packet larger than any burst
 * still passes and is paid for afterwards.
 *
 * It has to load on Linux 4.14, so: the first instruction set (-mcpu=v1), no loops, no calls, only
 * helpers and context fields of that kernel. DIRECT_PACKET_ACCESS makes a second object of it, for
 * Linux 5.1 and later, which reads headers without a helper call each, and needs CAP_PERFMON for
 * it. MARKED makes one that limits the sockets of some processes alone. SHARED makes one whose programs
 * serve many throttles at once, and ENTRIES the small ones that each of these has, see entries.h.
 *
 * It includes no system headers, so that the objects are the same wherever they are built.
 */
#include "throttle.h"
#include "divert.h"
#include "skb.h"

#define SMALL_PACKET_BYTES 160
#define LOOPBACK_IFINDEX 1 /* in each network namespace */
#define MOST_SCALED (1ULL << 63) /* a time as it is scaled: 2.4 hours */

#define IPV6_HEADER_BYTES 40
#define TCP_DATA_OFFSET 12
#define MAX_IPV6_EXTENSIONS 6

#define IPPROTO_HOPOPTS 0
#define IPPROTO_TCP 6
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_AH 51
#define IPPROTO_DSTOPTS 60
#define IPPROTO_MH 135
/* Extension headers, but for the mobility header: its number is too large. */
#define IPV6_EXTENSIONS                                                                            \
	(1ULL << IPPROTO_HOPOPTS | 1ULL << IPPROTO_ROUTING | 1ULL << IPPROTO_FRAGMENT |            \
	 1ULL << IPPROTO_AH | 1ULL << IPPROTO_DSTOPTS)

#define PASS 1
#define DROP 0
#define DROP_AND_NOTIFY_CONGESTION 2 /* egress only, since Linux 5.3 */

#define SEC(name) __attribute__((section(name), used))
#define always_inline static inline __attribute__((always_inline))
#define unlikely(x) __builtin_expect(!!(x), 0)

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)5;
#ifndef DIRECT_PACKET_ACCESS
static long (*bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) = (void *)26;
#endif

#define __uint(name, value) int(*name)[value]
#define __type(name, value) value *name
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_ARRAY 6

#include "configs.h"
#include "buckets.h"

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, THROTTLE_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct throttle_stats);
} CGROUP_STATS SEC(".maps");

#include "record.h"

/*
 * Without a branch: the verifier would follow both ways of each. For numbers below 2^63 that are
 * less than that apart.
 */
always_inline __s64 smaller(__s64 one, __s64 other)
{
	__s64 difference = other - one, negative = difference >> 63;

	asm volatile("" : "+r"(negative)); /* or the compiler makes it a branch again */
	return one + (difference & negative);
}

always_inline __s64 larger(__s64 one, __s64 other)
{
	return one + other - smaller(one, other);
}

/* Bytes of the packet, copied to `room` where they cannot be read in place; 0 if it has not so many. */
always_inline const __u8 *bytes_at(struct __sk_buff *skb, __u32 offset, __u8 *room, __u32 len)
{
#ifdef DIRECT_PACKET_ACCESS
	/* The mask shows the verifier a bound; six extension headers of 2 KB stay below it. */
	const __u8 *from = (const __u8 *)(long)skb->data + (offset & 0x3fff);

	(void)room;
	/* TCP pulls its header into the linear part before it filters, and sends it from there. */
	return from + len > (const __u8 *)(long)skb->data_end ? 0 : from;
#else
	return bpf_skb_load_bytes(skb, offset, room, len) ? 0 : room;
#endif
}

#ifndef ENTRIES
/* TCP bytes after the header at `offset`, or all of the packet if there is no sound header. */
always_inline __u32 tcp_payload(__u32 offset, __u8 data_offset, __u32 len)
{
	__u32 headers = offset + (data_offset >> 4) * 4;

	return headers <= len ? len - headers : len;
}

always_inline __u32 tcp_payload_at(struct __sk_buff *skb, __u32 offset, __u32 len)
{
	__u8 room;
	const __u8 *data_offset = bytes_at(skb, offset + TCP_DATA_OFFSET, &room, 1);

	return data_offset ? tcp_payload(offset, *data_offset, len) : len;
}

always_inline __u32 billed_ipv6(struct __sk_buff *skb, __u8 next_header, __u32 len)
{
	__u32 offset = IPV6_HEADER_BYTES;
	const __u8 *extension;
	__u8 room[4];

#pragma unroll
	for (int i = 0; i < MAX_IPV6_EXTENSIONS; i++) {
		if (next_header == IPPROTO_TCP)
			break;
		if (next_header != IPPROTO_MH &&
		    (next_header > IPPROTO_DSTOPTS || !(IPV6_EXTENSIONS >> next_header & 1)))
			return len;
		extension = bytes_at(skb, offset, room, sizeof(room));
		if (!extension)
			return len;
		if (next_header == IPPROTO_FRAGMENT) {
			/* Only the first fragment carries the TCP header. */
			if (extension[2] | (extension[3] & 0xf8))
				return len;
			offset += 8;
		} else if (next_header == IPPROTO_AH) {
			offset += (extension[1] + 2) * 4;
		} else {
			offset += (extension[1] + 1) * 8;
		}
		next_header = extension[0];
	}
	if (next_header != IPPROTO_TCP)
		return len;
	return tcp_payload_at(skb, offset, len);
}

/* What a packet costs in bytes. At these hooks it begins with its IP header. */
always_inline __u32 billed_bytes(struct __sk_buff *skb, __u32 len)
{
	__u8 room[40]; /* all of IPv6's header; IPv4's and TCP's, where neither has options */
	const __u8 *ip = bytes_at(skb, 0, room, sizeof(room));
	__u32 header_bytes;

	/* Too short for IP and TCP together, so not TCP. */
	if (!ip)
		return len;
	if (ip[0] >> 4 == 6)
		return billed_ipv6(skb, ip[6], len);
	if (ip[0] >> 4 != 4 || ip[9] != IPPROTO_TCP)
		return len;
	/* Only the first fragment carries the TCP header. */
	if ((ip[6] & 0x1f) | ip[7])
		return len;
	header_bytes = (ip[0] & 0xf) * 4;
	if (header_bytes == 20)
		return tcp_payload(header_bytes, ip[20 + TCP_DATA_OFFSET], len);
	return tcp_payload_at(skb, header_bytes, len);
}

/*
 * The rate has changed. What is owed is owed in bytes, so the time that it takes changes too.
 *
 * A CPU that comes between the two writes takes what is owed for the new rate's already, and what
 * it adds is lost: at worst a packet is free, or dropped. The other order would let it scale twice.
 */
always_inline __u64 charge_anew(struct throttle_bucket *bucket, __u64 even_at, __u64 before,
				__u64 inverse_rate, __u64 now)
{
	__u64 owed = even_at - now, bytes, most;

	if (!inverse_rate) /* The configuration is half written. */
		return even_at;
	*(volatile __u64 *)&bucket->inverse_rate = inverse_rate;
	if (!before || !even_at || (__s64)owed <= 0)
		return even_at;
	if (owed > MOST_SCALED >> INVERSE_RATE_SHIFT)
		owed = MOST_SCALED >> INVERSE_RATE_SHIFT;
	bytes = (owed << INVERSE_RATE_SHIFT) / before;
	most = MOST_SCALED / inverse_rate;
	if (bytes > most)
		bytes = most;
	even_at = now + (bytes * inverse_rate >> INVERSE_RATE_SHIFT);
	*(volatile __u64 *)&bucket->even_at_ns = even_at;
	return even_at;
}

/* Takes the packet's price from the bucket, or returns 0 where the bucket has run too far ahead. */
always_inline int pay(struct throttle_bucket *bucket, const struct throttle_config *config,
		      __u32 billed, __u64 slack, __u64 now)
{
	/* In this order: what was scaled already is not taken for the old rate's. */
	__u64 even_at = *(volatile __u64 *)&bucket->even_at_ns;
	__u64 charged_at = *(volatile __u64 *)&bucket->inverse_rate;
	__u64 inverse_rate = config->inverse_rate;
	__u64 credit = larger(config->credit_ns, bucket->credit_ns);
	__u64 limit = config->debt_ns +
		      larger(slack, larger(config->slack_ns, bucket->slack_ns));

	if (unlikely(charged_at != inverse_rate))
		even_at = charge_anew(bucket, even_at, charged_at, inverse_rate, now);
	if (unlikely(!even_at)) {
		/* Pacing holds a debt, which would otherwise come on top of the first seconds. */
		bucket->even_at_ns = even_at =
			now + (config->flags & THROTTLE_PACE ? PACING_TARGET_NS : 0);
	} else if ((__s64)(now - even_at) > (__s64)credit) {
		bucket->even_at_ns = even_at = now - credit;
	}
	if (billed < SMALL_PACKET_BYTES)
		limit += config->small_ns;
	if ((__s64)(even_at - now) > (__s64)limit)
		return 0;
	__sync_fetch_and_add(&bucket->even_at_ns, billed * inverse_rate >> INVERSE_RATE_SHIFT);
	return 1;
}

#endif

#include "networks.h"
#include "gate.h"
#if defined(DIRECT_PACKET_ACCESS) || defined(MARKED)
#include "others.h"
#else
/* Linux 4.14 does without. */
#define OTHERS_SLACK_NS 0
#define lent(config, direction, now) 0
#define is_early(skb, bucket, config, direction, billed, lent_ns, now) 0
#endif

#ifndef ENTRIES
always_inline int police(struct __sk_buff *skb, __u32 direction, int drop)
{
	__u32 element = ELEMENT(SLOT_OF(skb), direction);
	struct throttle_config *config = bpf_map_lookup_elem(&CGROUP_CONFIGS, &element);
	struct throttle_stats *stats = bpf_map_lookup_elem(&CGROUP_STATS, &element);
	struct throttle_bucket *bucket = bpf_map_lookup_elem(&CGROUP_BUCKETS, &element);
	__u64 now, slack = 0;
	__u32 billed;
	int early = 0;

	HOLD_RECORD();
	if (!config || !stats || !bucket)
		return PASS;
	/* A diversion has taken it: it is paid for when it comes again. */
	if (direction == THROTTLE_DOWNLOAD && unlikely(skb->mark == DIVERT_TAKEN))
		return PASS;
	stats->program_calls++;
	if (skb->ifindex == LOOPBACK_IFINDEX && !(config->flags & THROTTLE_LOOPBACK))
		return PASS;
	if (unlikely(config->flags & THROTTLE_NETWORKS) && is_exempt_packet(skb, direction))
		return PASS;
	billed = billed_bytes(skb, skb->len);
	stats->packets_total++;
	stats->bytes_total += billed;
	/* A pure acknowledgement is free: dropping it would only make its sender repeat data. */
	if (!billed || !config->rate_bytes_per_s)
		return PASS;
	now = bpf_ktime_get_ns();
	if (unlikely((__s64)now > config->expires_ns))
		return PASS;
	/* TCP's headers are free, where they are found. */
	if (billed == skb->len) {
		slack = lent(config, direction, now);
		if (billed >= SMALL_PACKET_BYTES) {
			early = is_early(skb, bucket, config, direction, billed, slack, now);
			slack += OTHERS_SLACK_NS;
		}
	}
	if (!early && pay(bucket, config, billed, slack, now))
		return PASS;
	stats->packets_dropped++;
	stats->bytes_dropped += billed;
	/* At a full queue TCP tries again each 0.5 s, 15 times: what is blocked is to last longer. */
	return (__s64)config->debt_ns < 0 ? DROP : drop;
}
#endif

#include "shape.h"

#if defined(MARKED) || defined(ENTRIES)
#include "marks.h"
#endif
#ifndef MARKED
SEC("cgroup_skb/ingress") int PROGRAM(ingress)(struct __sk_buff *skb)
{
	return police(skb, THROTTLE_DOWNLOAD, DROP);
}

SEC("cgroup_skb/egress") int PROGRAM(egress)(struct __sk_buff *skb)
{
	return police(skb, THROTTLE_UPLOAD, DROP);
}

/* Tells TCP of a drop as of a full queue, where DROP would fail a UDP program's send with EPERM. */
SEC("cgroup_skb/egress") int PROGRAM(egresscn)(struct __sk_buff *skb)
{
	return police(skb, THROTTLE_UPLOAD, DROP_AND_NOTIFY_CONGESTION);
}

SEC("sockops") int PROGRAM(sockops)(struct bpf_sock_ops *ctx)
{
	return shape(ctx);
}

SEC("sockops") int PROGRAM(sockopsp)(struct bpf_sock_ops *ctx)
{
	return shape_but_multipath(ctx);
}
#endif

char LICENSE[] SEC("license") = "Dual MIT/GPL";
