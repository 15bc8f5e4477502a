// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The diversion: what comes in for a cgroup's sockets, or for marked ones, is copied to a process
 * and dropped. When it is due the process, the diversion's keeper, writes it to a device of ours,
 * from which pybpfd_back has it come in once more by the device that it came in by. So a packet has
 * taken a longer way, and nothing else is different.
 *
 * A packet that comes back is recognised by its tc_index. It has a bit for each diversion that it has
 * been through, so that several on one socket add up in any order.
 *
 * Needs Linux 5.10, the kernel's types (CONFIG_DEBUG_INFO_BTF), and CAP_PERFMON.
 */
#include "throttle.h"
#include "divert.h"
#include "skb.h"

#define SEC(name) __attribute__((section(name), used))
#define always_inline static inline __attribute__((always_inline))

#define __uint(name, value) int(*name)[value]
#define __type(name, value) value *name
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_LRU_HASH 9
#define BPF_MAP_TYPE_SK_STORAGE 24
#define BPF_MAP_TYPE_RINGBUF 27
#define BPF_F_NO_PREALLOC 1
#define BPF_F_MMAPABLE (1 << 10)
#define BPF_F_INGRESS 1
#define BPF_RB_NO_WAKEUP 1
#define BPF_SK_STORAGE_GET_F_CREATE 1

#define PASS 1
#define DROP 0
#define TC_ACT_SHOT 2

#define PACKET_HOST 0
#define LOOPBACK_DEVICE 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPV4_WITHOUT_OPTIONS 0x45
#define MOST_TRANSLATIONS 4096

#include "bpf_sock.h"

/* What is read of the kernel's own structures; where they have it is found when this is loaded. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	possible_net_t skc_net;
};
#pragma clang attribute pop

#define FIELD_BYTE_OFFSET 0 /* enum bpf_field_info_kind of libbpf's headers */
#define COMMON_BYTES 64	    /* the start of a socket, with its namespace */

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   __u64 flags) = (void *)2;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static long (*bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)23;
static long (*bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) = (void *)26;
static struct bpf_sock *(*bpf_sk_fullsock)(struct bpf_sock *sk) = (void *)95;
static void *(*bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;
static long (*bpf_probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)113;
static void *(*bpf_ringbuf_reserve)(void *ring, __u64 size, __u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *data, __u64 flags) = (void *)132;
static void (*bpf_ringbuf_discard)(void *data, __u64 flags) = (void *)133;
static void *(*bpf_skc_to_mptcp_sock)(void *sk) = (void *)196;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct divert_keeper);
} DIVERT_KEEPER SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct divert_state);
} DIVERT_STATE SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, DIVERT_RING_BYTES);
} DIVERT_RING SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MOST_TRANSLATIONS);
	__type(key, struct divert_flow);
	__type(value, struct divert_translation);
} DIVERT_NAT SEC(".maps");

#include "configs.h"
#include "buckets.h"
#include "exempt.h"
#include "multipath.h"

/* The start of a packet, up to the ports. */
struct start {
	__u8 bytes[44];
	__u32 protocol;
	__u32 ports_at; /* 0: the packet has other headers before them */
};

#define ADD(field, n) __sync_fetch_and_add(&(field), n)

always_inline __u32 segments_of(struct __sk_buff *skb)
{
	return skb->gso_segs ? skb->gso_segs : 1;
}

/* Whether this is TCP or UDP: raw and ping sockets get clones of what others get too. */
always_inline int read_start(struct start *start, struct __sk_buff *skb)
{
	start->ports_at = 0;
	if (bpf_skb_load_bytes(skb, 0, start->bytes, 24))
		return 0;
	if (start->bytes[0] >> 4 == 6) {
		start->protocol = start->bytes[6];
		if (bpf_skb_load_bytes(skb, 24, start->bytes + 24, 20))
			return 0;
		start->ports_at = 40;
	} else {
		start->protocol = start->bytes[9];
		if (start->bytes[0] == IPV4_WITHOUT_OPTIONS)
			start->ports_at = 20;
	}
	return start->protocol == IPPROTO_TCP || start->protocol == IPPROTO_UDP;
}

/* Whether the keeper does not keep up, has ended, or was stopped: then nobody waits for it. */
always_inline int is_stale(struct divert_keeper *keeper, __u64 now)
{
	__u64 oldest = keeper->oldest_ns, due = keeper->next_due_ns;

	return !keeper->alive || (oldest && (__s64)(now - oldest) > DIVERT_STALE_NS) ||
	       (due && (__s64)(now - due) > DIVERT_STALE_NS);
}

/*
 * The number of a socket's network namespace. Its address may not be calculated with, so the start of
 * the socket is copied.
 */
always_inline __u32 network_of(void *sk)
{
	__u32 at = __builtin_preserve_field_info(((struct sock_common *)0)->skc_net,
						 FIELD_BYTE_OFFSET);
	__u8 common[COMMON_BYTES] = {};
	struct net *net;
	__u32 number = 0;

	if (at > COMMON_BYTES - sizeof(net) || bpf_probe_read_kernel(common, sizeof(common), sk))
		return 0;
	net = *(struct net **)(common + at);
	bpf_probe_read_kernel(&number, sizeof(number), &net->ns.inum);
	return number;
}

always_inline int is_served(struct divert_keeper *keeper, __u32 network)
{
#pragma unroll
	for (int i = 0; i < DIVERT_NAMESPACES; i++)
		if (keeper->namespaces[i] == network)
			return 1;
	return 0;
}

/* Tell the keeper of a namespace that it cannot write to yet. */
always_inline void ask_for(struct divert_keeper *keeper, __u32 network, __u64 now)
{
	struct divert_packet *packet;

	if (keeper->asked_ns && (__s64)(now - keeper->asked_ns) < DIVERT_ASK_NS)
		return;
	packet = bpf_ringbuf_reserve(&DIVERT_RING, sizeof(*packet), 0);
	if (!packet)
		return;
	keeper->asked_ns = now;
	packet->length = 0;
	packet->network = network;
	bpf_ringbuf_submit(packet, 0);
}

always_inline struct divert_translation *translation_of(struct start *start, __u32 network)
{
	struct divert_flow flow = {};
	__u32 *words = (__u32 *)start->bytes;

	flow.network = network;
	flow.protocol = start->protocol;
	if (start->ports_at == 20) {
		flow.remote[0] = words[3];
		flow.remote_port = *(__u16 *)(start->bytes + 20);
		flow.local_port = *(__u16 *)(start->bytes + 22);
	} else {
		flow.remote[0] = words[2];
		flow.remote[1] = words[3];
		flow.remote[2] = words[4];
		flow.remote[3] = words[5];
		flow.remote_port = *(__u16 *)(start->bytes + 40);
		flow.local_port = *(__u16 *)(start->bytes + 42);
	}
	return bpf_map_lookup_elem(&DIVERT_NAT, &flow);
}

/*
 * Copy the packet into the ring, in a record of constant size: the least that it fits into. To the
 * verifier the length has to be one that is neither zero nor too large.
 */
#define TAKE(room)                                                                                 \
	if (length <= (room)) {                                                                    \
		packet = bpf_ringbuf_reserve(&DIVERT_RING, sizeof(*packet) + (room), 0);           \
		if (!packet) {                                                                     \
			ADD(state->full, segments_of(skb));                                        \
			skb->mark = DIVERT_TAKEN;                                                  \
			return DROP;                                                               \
		}                                                                                  \
		last = (__u64)length - 1;                                                          \
		asm volatile("" : "+r"(last));                                                     \
		if (last >= (room)) {                                                              \
			bpf_ringbuf_discard(packet, 0);                                            \
			return PASS;                                                               \
		}                                                                                  \
		asm volatile("" : "+r"(last));                                                     \
		if (bpf_skb_load_bytes(skb, 0, packet->packet, (__u32)(last + 1))) {               \
			bpf_ringbuf_discard(packet, 0);                                            \
			return PASS;                                                               \
		}                                                                                  \
		goto taken;                                                                        \
	}

/* Whether the network of a packet's sender is not limited. */
always_inline int is_exempt_sender(struct start *start)
{
	__u32 *words = (__u32 *)start->bytes;
	struct throttle_network key = { ADDRESS_BITS, { 0, 0, MAPPED_IP4, words[3] } };

	if (start->bytes[0] >> 4 == 6) {
		key.address[0] = words[2];
		key.address[1] = words[3];
		key.address[2] = words[4];
		key.address[3] = words[5];
	}
	return is_exempt(&key);
}

/*
 * Whether a packet has to wait for its turn: what has no receive window, once something is owed, and
 * then until nothing waits any more, so that all stay in order. What is blocked is left to the
 * policer.
 */
always_inline int has_to_wait(struct divert_state *state, struct start *start, __u64 now)
{
	__u32 element = ELEMENT(state->slot, THROTTLE_DOWNLOAD);
	struct throttle_config *config = bpf_map_lookup_elem(&CGROUP_CONFIGS, &element);
	struct throttle_bucket *bucket = bpf_map_lookup_elem(&CGROUP_BUCKETS, &element);

	if (!config || !bucket || !config->rate_bytes_per_s || (__s64)config->debt_ns < 0 ||
	    (__s64)now > config->expires_ns)
		return 0;
	if (!state->waits && (__s64)(bucket->even_at_ns - now) <= 0)
		return 0;
	return !(config->flags & THROTTLE_NETWORKS && is_exempt_sender(start));
}

always_inline int divert(struct __sk_buff *skb, int queues)
{
	__u32 zero = 0, length = skb->len, tag = skb->tc_index, network;
	struct divert_keeper *keeper = bpf_map_lookup_elem(&DIVERT_KEEPER, &zero);
	struct divert_state *state = bpf_map_lookup_elem(&DIVERT_STATE, &zero);
	struct divert_translation *wire = 0;
	struct divert_packet *packet;
	struct start start;
	__u64 now, last;
	int waits;

	if (!keeper || !state || !state->on || !skb->sk)
		return PASS;
	if ((tag & DIVERT_TAG_MASK) != DIVERT_TAG)
		tag = DIVERT_TAG;
	/* Multicast and broadcast go to other sockets as well, which would get them twice. */
	if ((tag & state->bit && !queues) || skb->mark == DIVERT_TAKEN || skb->pkt_type != PACKET_HOST ||
	    (skb->ifindex == LOOPBACK_DEVICE && !state->loopback) ||
	    skb->ifindex >= DIVERT_DEVICES || !read_start(&start, skb))
		return PASS;
	now = bpf_ktime_get_ns();
	if (queues) {
		if (tag & DIVERT_QUEUED) {
			ADD(state->returned, 1);
			return PASS;
		}
		if (start.protocol != IPPROTO_UDP || !has_to_wait(state, &start, now))
			return PASS;
	}
	if (is_stale(keeper, now)) {
		ADD(state->stale, segments_of(skb));
		return PASS;
	}
	network = network_of(skb->sk);
	if (!is_served(keeper, network)) {
		ADD(state->unserved, segments_of(skb));
		ask_for(keeper, network, now);
		return PASS;
	}
	if (state->translations && start.ports_at)
		wire = translation_of(&start, network);
	/* Larger than 65535 (BIG TCP) is none of these: it passes. */
	TAKE(200) TAKE(2048) TAKE(9216) TAKE(24576) TAKE(65535)
	return PASS;
taken:
	packet->at_ns = now;
	packet->diversion = state->id;
	packet->length = length;
	packet->device = skb->ifindex;
	packet->segment = skb->gso_size;
	packet->network = network;
	packet->tag = tag | state->bit;
	packet->translated = 0;
	if (wire) {
		packet->translated = 1;
		packet->wire = *wire;
	}
	if (!keeper->oldest_ns)
		keeper->oldest_ns = now;
	ADD(state->taken, segments_of(skb));
	/* While others wait before it, the keeper finds it when it gives those back. */
	waits = queues && state->waits && keeper->next_due_ns;
	state->waits = 1;
	bpf_ringbuf_submit(packet, waits ? BPF_RB_NO_WAKEUP : 0);
	skb->mark = DIVERT_TAKEN;
	return DROP;
}

/* The ends of a socket. */
struct ends {
	__u32 local4, remote4;
	__u32 local6[4], remote6[4];
	__u16 local_port, remote_port;
};

/* All at once: the compiler must not calculate with the socket's address. */
always_inline void read_ends(struct ends *ends, struct bpf_sock *sk)
{
	volatile struct bpf_sock *own = sk;

	ends->local4 = own->src_ip4;
	ends->remote4 = own->dst_ip4;
	ends->local6[0] = own->src_ip6[0];
	ends->local6[1] = own->src_ip6[1];
	ends->local6[2] = own->src_ip6[2];
	ends->local6[3] = own->src_ip6[3];
	ends->remote6[0] = own->dst_ip6[0];
	ends->remote6[1] = own->dst_ip6[1];
	ends->remote6[2] = own->dst_ip6[2];
	ends->remote6[3] = own->dst_ip6[3];
	ends->local_port = own->src_port;
	ends->remote_port = own->dst_port;
}

always_inline int is_zero(const __u32 *words)
{
	return !(words[0] | words[1] | words[2] | words[3]);
}

always_inline int are_equal(const __u32 *one, const __u32 *other)
{
	return one[0] == other[0] && one[1] == other[1] && one[2] == other[2] &&
	       one[3] == other[3];
}

always_inline void copy_address(__u32 *to, const __u32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

always_inline __u16 in_network_order(__u16 port)
{
	__u8 bytes[2] = {port >> 8, port};

	return *(__u16 *)bytes;
}

/* A packet's ends as it leaves: those on the wire. */
always_inline void read_wire(struct divert_translation *wire, struct start *start)
{
	__u32 *words = (__u32 *)start->bytes;

	if (start->ports_at == 20) {
		wire->local[0] = words[3];
		wire->remote[0] = words[4];
		wire->local_port = *(__u16 *)(start->bytes + 20);
		wire->remote_port = *(__u16 *)(start->bytes + 22);
	} else {
		copy_address(wire->local, words + 2);
		copy_address(wire->remote, words + 6);
		wire->local_port = *(__u16 *)(start->bytes + 40);
		wire->remote_port = *(__u16 *)(start->bytes + 42);
	}
}

/*
 * Where a packet that leaves differs from its socket it was translated, and the answer will be
 * translated back before it is diverted. Given back like that, it would belong to no connection that
 * the translator knows: what it looked like on the wire is noted here. A socket that is not connected
 * does not know its ends, so all of its packets are noted.
 */
always_inline int note(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct divert_state *state = bpf_map_lookup_elem(&DIVERT_STATE, &zero);
	struct bpf_sock *sk = skb->sk;
	struct divert_translation wire = {}, *known;
	struct divert_flow flow = {};
	struct ends ends;
	__u32 local[4] = {};
	struct start start;

	if (!state || !state->on || !sk)
		return PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk || skb->ifindex == LOOPBACK_DEVICE || !read_start(&start, skb) || !start.ports_at ||
	    (state->bit & DIVERT_QUEUED && start.protocol != IPPROTO_UDP))
		return PASS;
	read_ends(&ends, sk);
	read_wire(&wire, &start);
	if (start.ports_at == 20) {
		local[0] = ends.local4;
		flow.remote[0] = ends.remote4;
	} else {
		copy_address(local, ends.local6);
		copy_address(flow.remote, ends.remote6);
	}
	flow.local_port = in_network_order(ends.local_port);
	flow.remote_port = ends.remote_port;
	if (is_zero(flow.remote)) {
		copy_address(flow.remote, wire.remote);
		flow.remote_port = wire.remote_port;
	}
	if (are_equal(local, wire.local) && are_equal(flow.remote, wire.remote) &&
	    flow.local_port == wire.local_port && flow.remote_port == wire.remote_port)
		return PASS;
	flow.network = network_of(sk);
	flow.protocol = start.protocol;
	known = bpf_map_lookup_elem(&DIVERT_NAT, &flow);
	if (known && are_equal(known->remote, wire.remote) && are_equal(known->local, wire.local) &&
	    known->remote_port == wire.remote_port && known->local_port == wire.local_port)
		return PASS;
	bpf_map_update_elem(&DIVERT_NAT, &flow, &wire, 0);
	ADD(state->translations, 1);
	return PASS;
}

SEC("cgroup_skb/ingress") int pybpfd_in(struct __sk_buff *skb)
{
	return divert(skb, 0);
}

SEC("cgroup_skb/egress") int pybpfd_out(struct __sk_buff *skb)
{
	return note(skb);
}

SEC("cgroup_skb/ingress") int pybpfd_inm(struct __sk_buff *skb)
{
	return mark_of(skb->sk) ? divert(skb, 0) : PASS;
}

SEC("cgroup_skb/egress") int pybpfd_outm(struct __sk_buff *skb)
{
	return mark_of(skb->sk) ? note(skb) : PASS;
}

/* The same with MPTCP, since Linux 5.19. */
SEC("cgroup_skb/ingress") int pybpfd_inp(struct __sk_buff *skb)
{
	return multipath_mark_of(skb->sk) ? divert(skb, 0) : PASS;
}

SEC("cgroup_skb/egress") int pybpfd_outp(struct __sk_buff *skb)
{
	return multipath_mark_of(skb->sk) ? note(skb) : PASS;
}

/* Those of a limit's queue, which holds UDP only. */
SEC("cgroup_skb/ingress") int pybpfd_queue(struct __sk_buff *skb)
{
	return divert(skb, 1);
}

/* Marks that others share have the slot of a limit; those of one limit alone are 0. */
SEC("cgroup_skb/ingress") int pybpfd_queuem(struct __sk_buff *skb)
{
	const __u32 *mark = mark_of(skb->sk);
	struct divert_state *state;
	__u32 zero = 0;

	if (!mark)
		return PASS;
	state = bpf_map_lookup_elem(&DIVERT_STATE, &zero);
	return state && (!*mark || *mark == state->slot) ? divert(skb, 1) : PASS;
}

/*
 * On our own device: to the device that a packet had come in by, as if it came in there. The source
 * address of Ethernet is 02, the tag, and that device. Nothing else comes in here.
 */
SEC("tc") int pybpfd_back(struct __sk_buff *skb)
{
	__u8 source[6];
	__u32 device;

	if (bpf_skb_load_bytes(skb, 6, source, sizeof(source)) || source[0] != 2)
		return TC_ACT_SHOT;
	device = (__u32)source[3] << 16 | source[4] << 8 | source[5];
	if (!device)
		return TC_ACT_SHOT;
	skb->tc_index = source[1] << 8 | source[2];
	return bpf_redirect(device, BPF_F_INGRESS);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
