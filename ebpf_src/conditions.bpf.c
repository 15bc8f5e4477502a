// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Bad networks: packets that get lost, outages, connections that cannot be opened, and names that
 * cannot be looked up. The programs belong to a throttle, whose record they hold.
 *
 * A decision depends on the seed and on the number of the packet, so the same packets have the same
 * fate again. CPUs that race may take the same number for two packets.
 *
 * What the kernel has merged, or is yet to split, is one packet here: it passes or is lost as a
 * whole, with the chance of one. That keeps the share of what is lost; the losses come in bursts.
 *
 * It has to load on Linux 4.10, see throttle.bpf.c. EARLY makes an object for kernels before 5.1,
 * which do not tell how many packets were merged; MARKED one for the sockets of some processes.
 */
#include "throttle.h"
#include "conditions.h"
#include "divert.h"
#include "skb.h"

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define BIG_ENDIAN_16(x) __builtin_bswap16(x)
#define BIG_ENDIAN_32(x) __builtin_bswap32(x)
#else
#define BIG_ENDIAN_16(x) (x)
#define BIG_ENDIAN_32(x) (x)
#endif
#define SOCK_DGRAM 2
#define LOOPBACK_IFINDEX 1 /* in each network namespace */
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPV6_HEADER_BYTES 40
#define UDP_HEADER_BYTES 8
#define DNS_HEADER_BYTES 12
#define DNS_PORT 53
#define TCP_FLAGS_OFFSET 13
#define TCP_SYN 2
#define TCP_ACK 16
#ifdef EARLY
#define USUAL_SEGMENT_BYTES 1448
#endif

#define PASS 1
#define DROP 0
#define DROP_AND_NOTIFY_CONGESTION 2 /* egress only, since Linux 5.3 */

#define SEC(name) __attribute__((section(name), used))
#define always_inline static inline __attribute__((always_inline))

struct bpf_sock_addr {
	__u32 user_family;
	__u32 user_ip4;
	__u32 user_ip6[4];
	__u32 user_port;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	void *sk;
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   __u64 flags) = (void *)2;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static long (*bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) = (void *)26;

#define __uint(name, value) int(*name)[value]
#define __type(name, value) value *name
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_LRU_HASH 9

#include "configs.h"
#include "record.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, THROTTLE_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct conditions_rule);
} COND_RULES SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, THROTTLE_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct conditions_counts);
} COND_COUNTS SEC(".maps");

/* The start of a question that is asked of a name server. */
struct question {
	__u64 words[2];
};

/* How often a question was answered. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct question);
	__type(value, __u32);
} COND_ANSWERS SEC(".maps");

#ifdef MARKED
#define BPF_MAP_TYPE_SK_STORAGE 24
#define BPF_F_NO_PREALLOC 1
static void *(*bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;
#include "marked.h"
#define IS_MEANT(sk) mark_of(sk)
#define CONDITIONS_PROGRAM(name) pybpft_cm##name
#else
#define IS_MEANT(sk) 1
#define CONDITIONS_PROGRAM(name) pybpft_c##name
#endif

/* Where a packet's transport header begins, and of which protocol it is; 0 for none of these two. */
always_inline __u32 transport(struct __sk_buff *skb, __u32 *offset)
{
	__u8 ip[10];

	if (bpf_skb_load_bytes(skb, 0, ip, sizeof(ip)))
		return 0;
	if (ip[0] >> 4 == 6) {
		*offset = IPV6_HEADER_BYTES;
		return ip[6];
	}
	/* Only a first fragment has one. */
	if (ip[0] >> 4 != 4 || (ip[6] & 0x1f) | ip[7])
		return 0;
	*offset = (ip[0] & 0xf) * 4;
	return ip[9];
}

/* Whether an answer from a name server is to be dropped. */
always_inline int is_unanswered(struct __sk_buff *skb, const struct conditions_rule *rule,
				__u32 protocol, __u32 offset)
{
	struct question question;
	__u32 first = 1, *answers;
	__u8 port[2];

	if (!(rule->flags & (CONDITIONS_DNS_LOST | CONDITIONS_DNS_SLOW)))
		return 0;
	if ((protocol != IPPROTO_UDP && protocol != IPPROTO_TCP) ||
	    bpf_skb_load_bytes(skb, offset, port, sizeof(port)) || port[0] || port[1] != DNS_PORT)
		return 0;
	if (rule->flags & CONDITIONS_DNS_LOST)
		return 1;
	if (protocol != IPPROTO_UDP ||
	    bpf_skb_load_bytes(skb, offset + UDP_HEADER_BYTES + DNS_HEADER_BYTES, &question,
			       sizeof(question)))
		return 0;
	answers = bpf_map_lookup_elem(&COND_ANSWERS, &question);
	if (answers)
		return (*answers)++ % 2 == 0;
	bpf_map_update_elem(&COND_ANSWERS, &question, &first, 0);
	return 1;
}

/* Whether a packet would open a TCP connection. */
always_inline int opens(struct __sk_buff *skb, const struct conditions_rule *rule, __u32 protocol,
			__u32 offset)
{
	__u8 flags;

	return rule->flags & CONDITIONS_NO_SYN && protocol == IPPROTO_TCP &&
	       !bpf_skb_load_bytes(skb, offset + TCP_FLAGS_OFFSET, &flags, 1) &&
	       (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* A number that looks random, below 2^32 (SplitMix64). */
always_inline __u64 drawn(__u64 seed, __u64 number)
{
	__u64 x = seed + (number + 1) * 0x9e3779b97f4a7c15ULL;

	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return (x ^ x >> 31) >> CONDITIONS_SHIFT;
}

always_inline int is_lost(const struct conditions_rule *rule, struct conditions_counts *counts,
			  __u64 packets)
{
	__u64 number, chance;

	if (rule->nth) {
		counts->owed += packets;
		if (counts->owed < rule->nth * packets)
			return 0;
		counts->owed -= rule->nth * packets;
		return 1;
	}
	if (!rule->enter)
		return 0;
	number = counts->number;
	counts->number = number + 1;
	chance = counts->burst ? 1ULL << CONDITIONS_SHIFT : rule->enter;
	if (counts->burst)
		chance -= rule->leave;
	counts->burst = drawn(rule->seed, number) < chance;
	return counts->burst;
}

always_inline int judge(struct __sk_buff *skb, __u32 direction, int drop)
{
	struct conditions_rule *rule = bpf_map_lookup_elem(&COND_RULES, &direction);
	struct conditions_counts *counts = bpf_map_lookup_elem(&COND_COUNTS, &direction);
	__u32 offset = 0, protocol;
	__u64 packets;

	HOLD_RECORD();
	HOLD(CGROUP_CONFIGS); /* by which is found who has left this program behind */
	if (!rule || !counts)
		return PASS;
	/* It comes again, late: what is decided is decided then. */
	if (direction == THROTTLE_DOWNLOAD && skb->mark == DIVERT_TAKEN)
		return PASS;
#ifdef EARLY
	packets = (skb->len + USUAL_SEGMENT_BYTES - 1) / USUAL_SEGMENT_BYTES;
#else
	packets = skb->gso_segs;
#endif
	if (!packets)
		packets = 1;
	protocol = transport(skb, &offset);
	/* Name servers are often on this machine. */
	if (direction == THROTTLE_DOWNLOAD && is_unanswered(skb, rule, protocol, offset)) {
		__sync_fetch_and_add(&counts->unanswered, packets);
		return drop;
	}
	if (skb->ifindex == LOOPBACK_IFINDEX && !(rule->flags & CONDITIONS_LOOPBACK))
		return PASS;
	__sync_fetch_and_add(&counts->seen, packets);
	if (rule->period_ns &&
	    (bpf_ktime_get_ns() - rule->begin_ns) % rule->period_ns >= rule->up_ns) {
		__sync_fetch_and_add(&counts->outage, packets);
		return drop;
	}
	if (direction == THROTTLE_UPLOAD && opens(skb, rule, protocol, offset)) {
		__sync_fetch_and_add(&counts->blocked, 1);
		return drop;
	}
	if (is_lost(rule, counts, packets)) {
		__sync_fetch_and_add(&counts->lost, packets);
		return drop;
	}
	return PASS;
}

#ifndef EARLY
/* Whether connect(2) may go on. Name servers are another matter, see CONDITIONS_DNS_LOST. */
always_inline int admit(struct bpf_sock_addr *ctx, int is_local)
{
	__u32 direction = THROTTLE_UPLOAD;
	struct conditions_rule *rule = bpf_map_lookup_elem(&COND_RULES, &direction);
	struct conditions_counts *counts = bpf_map_lookup_elem(&COND_COUNTS, &direction);

	HOLD_RECORD();
	HOLD(CGROUP_CONFIGS);
	if (!rule || !counts || !(rule->flags & CONDITIONS_REFUSE))
		return PASS;
	if (is_local && !(rule->flags & CONDITIONS_LOOPBACK))
		return PASS;
	if (ctx->type == SOCK_DGRAM && ctx->user_port == BIG_ENDIAN_16(DNS_PORT))
		return PASS;
	__sync_fetch_and_add(&counts->blocked, 1);
	return DROP;
}

SEC("cgroup/connect4") int CONDITIONS_PROGRAM(con4)(struct bpf_sock_addr *ctx)
{
	/* Its first byte, in whatever byte order. Connecting to no address is to this machine too. */
	int is_local = !ctx->user_ip4 || *(__u8 *)&ctx->user_ip4 == 127;

	return IS_MEANT(ctx->sk) ? admit(ctx, is_local) : PASS;
}

SEC("cgroup/connect6") int CONDITIONS_PROGRAM(con6)(struct bpf_sock_addr *ctx)
{
	__u32 first = ctx->user_ip6[0] | ctx->user_ip6[1], third = ctx->user_ip6[2];
	__u32 last = ctx->user_ip6[3];
	int is_local;

	/* No address and ::1, and 127/8 as sockets for both IP versions have it. */
	if (third == BIG_ENDIAN_32(0xffff))
		is_local = !first && (last & BIG_ENDIAN_32(0xff000000)) == BIG_ENDIAN_32(0x7f000000);
	else
		is_local = !(first | third) && (!last || last == BIG_ENDIAN_32(1));
	return IS_MEANT(ctx->sk) ? admit(ctx, is_local) : PASS;
}
#endif

SEC("cgroup_skb/ingress") int CONDITIONS_PROGRAM(in)(struct __sk_buff *skb)
{
	return IS_MEANT(skb->sk) ? judge(skb, THROTTLE_DOWNLOAD, DROP) : PASS;
}

SEC("cgroup_skb/egress") int CONDITIONS_PROGRAM(out)(struct __sk_buff *skb)
{
	return IS_MEANT(skb->sk) ? judge(skb, THROTTLE_UPLOAD, DROP) : PASS;
}

/* Tells TCP that a packet was lost, where DROP has it wait, and fail a UDP program's send. */
SEC("cgroup_skb/egress") int CONDITIONS_PROGRAM(outcn)(struct __sk_buff *skb)
{
	return IS_MEANT(skb->sk) ? judge(skb, THROTTLE_UPLOAD, DROP_AND_NOTIFY_CONGESTION) : PASS;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
