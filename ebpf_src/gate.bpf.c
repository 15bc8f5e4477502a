// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The gate: acknowledgements of downloads leave by way of a process, the gate's keeper, which sends
 * them on with the receive window that the limit allows at that moment.
 *
 * A receive window that is closed at once and opened later makes a sender wait without losing
 * anything, however short the way: nothing is unacknowledged meanwhile, so no timer of the sender
 * fires. The kernel itself opens a window only when it sends an acknowledgement anyway; so the
 * keeper sends them. It needs to be told of all that leaves with an acknowledgement, to know how
 * much the sender may have been promised.
 *
 * Sequence numbers are compared by their difference as a signed number.
 *
 * Needs Linux 5.10, the kernel's types (CONFIG_DEBUG_INFO_BTF), and CAP_PERFMON.
 */
#include "throttle.h"
#include "skb.h"

#define SEC(name) __attribute__((section(name), used))
#define always_inline static inline __attribute__((always_inline))

#define __uint(name, value) int(*name)[value]
#define __type(name, value) value *name
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_SK_STORAGE 24
#define BPF_MAP_TYPE_RINGBUF 27
#define BPF_F_NO_PREALLOC 1
#define BPF_RB_NO_WAKEUP 1
#define BPF_RB_FORCE_WAKEUP 2

#define PASS 1
#define DROP 0

#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPV4_HEADER_BYTES 20
#define IPV6_HEADER_BYTES 40
#define TCP_MSS_DEFAULT 536
#define LEAST_HEADER_BYTES 40
#define LARGE_DATAGRAM_BYTES 1200 /* RFC 9000, 14.1 */
#define TCP_FIN_SYN_RST 7
#define TCP_ACK 16

#include "record.h"
#include "gate.h"
#include "sockets.h"

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

struct sock {
	struct sock_common __sk_common;
};

struct inet_connection_sock {
	struct {
		unsigned short rcv_mss;
	} icsk_ack;
};

struct tcp_options_received {
	unsigned short rcv_wscale : 4;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	struct tcp_options_received rx_opt;
	struct {
		__u32 rtt_us;
	} rcv_rtt_est;
};
#pragma clang attribute pop

/* enum bpf_field_info_kind of libbpf's headers. */
#define FIELD_BYTE_OFFSET 0
#define FIELD_BYTE_SIZE 1
#define FIELD_LSHIFT_U64 4
#define FIELD_RSHIFT_U64 5
#define info(field, kind) __builtin_preserve_field_info(field, kind)

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static long (*bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) = (void *)26;
static __u64 (*bpf_get_socket_cookie)(void *ctx) = (void *)46;
static struct bpf_sock *(*bpf_sk_fullsock)(struct bpf_sock *sk) = (void *)95;
static void *(*bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;
static void *(*bpf_ringbuf_reserve)(void *ring, __u64 size, __u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *data, __u64 flags) = (void *)132;
static void (*bpf_ringbuf_discard)(void *data, __u64 flags) = (void *)133;
static struct tcp_sock *(*bpf_skc_to_tcp_sock)(void *sk) = (void *)137;

#include "configs.h"

/* Acknowledgements on their way to the keeper. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, GATE_RING_BYTES);
} GATE_RING SEC(".maps");

always_inline __u32 big_endian(const __u8 *at)
{
	return (__u32)at[0] << 24 | (__u32)at[1] << 16 | (__u32)at[2] << 8 | at[3];
}

/* Whether the keeper does not keep up, has ended, or was stopped: then nobody waits for it. */
always_inline int is_stale(struct throttle_gate *gate, __u64 now)
{
	__u64 oldest = gate->oldest_ns, due = gate->next_due_ns;

	return !gate->alive || (oldest && (__s64)(now - oldest) > GATE_STALE_NS) ||
	       (due && (__s64)(now - due) > GATE_STALE_NS);
}

always_inline int is_served(struct throttle_gate *gate, __u32 network)
{
#pragma unroll
	for (int i = 0; i < GATE_NAMESPACES; i++)
		if (gate->namespaces[i] == network)
			return 1;
	return 0;
}

/* The window's scale: a field of four bits, wherever this kernel has it. */
always_inline __u32 scale_of(struct tcp_sock *tcp)
{
	const void *at = (const char *)tcp + info(tcp->rx_opt.rcv_wscale, FIELD_BYTE_OFFSET);
	__u64 value = 0;

	switch (info(tcp->rx_opt.rcv_wscale, FIELD_BYTE_SIZE)) {
	case 1:
		value = *(const __u8 *)at;
		break;
	case 2:
		value = *(const __u16 *)at;
		break;
	case 4:
		value = *(const __u32 *)at;
		break;
	case 8:
		value = *(const __u64 *)at;
		break;
	}
	value <<= info(tcp->rx_opt.rcv_wscale, FIELD_LSHIFT_U64);
	return value >> info(tcp->rx_opt.rcv_wscale, FIELD_RSHIFT_U64);
}

/*
 * The largest segment that its sender may send: at first as large as its own, and more if one came.
 * Nothing is sent into a window of less. The round trip is eight times what it says. Until a full
 * segment has come the kernel has only measured how long it took until a window was full.
 */
always_inline __u32 look_at(struct bpf_sock *sk, struct throttle_socket *socket)
{
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);

	if (!tcp)
		return 0;
	if (tcp->inet_conn.icsk_ack.rcv_mss > socket->segment)
		socket->segment = tcp->inet_conn.icsk_ack.rcv_mss;
	if (tcp->inet_conn.icsk_ack.rcv_mss <= TCP_MSS_DEFAULT)
		return 0;
	return tcp->rcv_rtt_est.rtt_us >> 3;
}

/* Tell the keeper of a namespace that it cannot send in yet; return whether there was room. */
always_inline int ask_for(struct throttle_gate *gate, __u32 network)
{
	struct throttle_ack *ack = bpf_ringbuf_reserve(&GATE_RING, sizeof(*ack), 0);

	if (!ack)
		return 0;
	ack->length = 0;
	ack->gate = gate->id;
	ack->network = network;
	bpf_ringbuf_submit(ack, BPF_RB_FORCE_WAKEUP);
	return 1;
}

/*
 * Tell the keeper of the first large datagram: QUIC begins with one, a round trip before its first
 * data comes, and the queue for that takes as long to start. Names are asked for by small ones.
 */
always_inline void tell_of_datagram(struct throttle_gate *gate, struct __sk_buff *skb)
{
	if (skb->len >= LARGE_DATAGRAM_BYTES && !gate->datagram_ns && ask_for(gate, 0))
		gate->datagram_ns = bpf_ktime_get_ns();
}

/* Whether the keeper can send for a connection, and, found out once, how its window is scaled. */
always_inline __u32 state_of(struct bpf_sock *sk, struct throttle_socket *socket,
			     struct throttle_gate *gate)
{
	struct tcp_sock *tcp;
	struct net *net;

	if (socket->gate == GATE_READY || socket->gate == GATE_NEVER)
		return socket->gate;
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp)
		return socket->gate = GATE_NEVER;
	if (!socket->network) {
		net = ((struct sock *)tcp)->__sk_common.skc_net.net;
		socket->network = net->ns.inum;
		socket->window_scale = scale_of(tcp);
	}
	if (is_served(gate, socket->network)) {
		socket->gate = GATE_READY;
	} else if (socket->gate == GATE_UNKNOWN) {
		socket->gate = GATE_ASKED;
		ask_for(gate, socket->network);
	}
	return socket->gate;
}

/* The ends of a connection as its socket has them. */
struct ends {
	__u32 device; /* that the socket is bound to, or 0 */
	__u32 source_port, target_port; /* the second in network byte order */
	__u32 source4, target4;
	__u32 source6[4], target6[4];
};

/* All at once: the compiler must not calculate with the socket's address. */
always_inline void read_ends(struct ends *ends, struct bpf_sock *sk)
{
	volatile struct bpf_sock *own = sk;

	ends->device = own->bound_dev_if;
	ends->source_port = own->src_port;
	ends->target_port = own->dst_port;
	ends->source4 = own->src_ip4;
	ends->target4 = own->dst_ip4;
	ends->source6[0] = own->src_ip6[0];
	ends->source6[1] = own->src_ip6[1];
	ends->source6[2] = own->src_ip6[2];
	ends->source6[3] = own->src_ip6[3];
	ends->target6[0] = own->dst_ip6[0];
	ends->target6[1] = own->dst_ip6[1];
	ends->target6[2] = own->dst_ip6[2];
	ends->target6[3] = own->dst_ip6[3];
}

/*
 * The socket's own addresses and ports in place of the packet's: the packet may have been translated
 * by now, and sent once more like that it would be a connection that nobody knows.
 */
always_inline void untranslate(struct throttle_ack *ack, const struct ends *ends, __u32 at)
{
	__u32 *words = (__u32 *)ack->packet;

	if (at == IPV4_HEADER_BYTES) {
		words[3] = ends->source4;
		words[4] = ends->target4;
		ack->packet[20] = ends->source_port >> 8;
		ack->packet[21] = ends->source_port;
		*(__u16 *)(ack->packet + 22) = ends->target_port;
	} else {
		words[2] = ends->source6[0];
		words[3] = ends->source6[1];
		words[4] = ends->source6[2];
		words[5] = ends->source6[3];
		words[6] = ends->target6[0];
		words[7] = ends->target6[1];
		words[8] = ends->target6[2];
		words[9] = ends->target6[3];
		ack->packet[40] = ends->source_port >> 8;
		ack->packet[41] = ends->source_port;
		*(__u16 *)(ack->packet + 42) = ends->target_port;
	}
}

always_inline int pass_gate(struct __sk_buff *skb)
{
	__u32 slot = SLOT_OF(skb), down = ELEMENT(slot, THROTTLE_DOWNLOAD);
	__u32 at, headers, payload, number, edge, kept, round_trip_us;
	struct throttle_config *config = bpf_map_lookup_elem(&CGROUP_CONFIGS, &down);
	struct throttle_gate *gate = bpf_map_lookup_elem(&GATE, &slot);
	struct throttle_socket *socket;
	struct bpf_sock *sk = skb->sk;
	struct throttle_ack *ack;
	__u8 start[LEAST_HEADER_BYTES + 20], *tcp;
	struct ends ends;
	__u64 now;
	int passes, looks, wakes;

	HOLD_RECORD();
	if (!gate || !config || !sk)
		return PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return PASS;
	socket = bpf_sk_storage_get(&SOCKETS, sk, 0, 0);
	if (!socket && sk->protocol == IPPROTO_UDP)
		tell_of_datagram(gate, skb);
	if (!socket || socket->slot != slot || state_of(sk, socket, gate) != GATE_READY)
		return PASS;
	if (bpf_skb_load_bytes(skb, 0, start, LEAST_HEADER_BYTES))
		return PASS;
	if (start[0] == 0x45) { /* without options */
		if (start[9] != IPPROTO_TCP)
			return PASS;
		at = IPV4_HEADER_BYTES;
		tcp = start + IPV4_HEADER_BYTES;
	} else {
		if (start[0] >> 4 != 6 || start[6] != IPPROTO_TCP ||
		    bpf_skb_load_bytes(skb, IPV6_HEADER_BYTES, start + IPV6_HEADER_BYTES, 20))
			return PASS;
		at = IPV6_HEADER_BYTES;
		tcp = start + IPV6_HEADER_BYTES;
	}
	headers = at + (tcp[12] >> 4) * 4;
	number = big_endian(tcp + 8);
	edge = number + ((__u32)(tcp[14] << 8 | tcp[15]) << socket->window_scale);
	payload = skb->len - headers;
	now = bpf_ktime_get_ns();
	passes = tcp[13] & TCP_FIN_SYN_RST || payload || !socket->gated || !socket->edge_known ||
		 !config->rate_bytes_per_s || (__s64)now > config->expires_ns || is_stale(gate, now);
	if (passes) {
		if (!socket->edge_known || (__s32)(edge - socket->edge) > 0)
			socket->edge = edge;
		socket->edge_known = 1;
		if (!socket->gated || !config->rate_bytes_per_s || !(tcp[13] & TCP_ACK))
			return PASS;
	}
	number = bpf_get_socket_cookie(skb) & (GATE_UNGATED - 1);
	if (gate->ungated[number] == bpf_get_socket_cookie(skb))
		return PASS;
	if (headers < LEAST_HEADER_BYTES || headers > GATE_PACKET_BYTES)
		return PASS;
	read_ends(&ends, sk);
	round_trip_us = look_at(sk, socket);
	ack = bpf_ringbuf_reserve(&GATE_RING, sizeof(*ack), 0);
	if (!ack)
		return PASS;
	ack->cookie = bpf_get_socket_cookie(skb);
	ack->at_ns = now;
	ack->gate = gate->id;
	ack->device = ends.device;
	ack->edge = socket->edge;
	ack->payload = payload;
	ack->mark = skb->mark;
	ack->network = socket->network;
	ack->segment = socket->segment;
	ack->round_trip_us = round_trip_us;
	ack->length = headers;
	ack->window_scale = socket->window_scale;
	ack->passed = passes;
	kept = headers & 127;
	if (kept < LEAST_HEADER_BYTES || kept > GATE_PACKET_BYTES ||
	    bpf_skb_load_bytes(skb, 0, ack->packet, kept)) {
		bpf_ringbuf_discard(ack, 0);
		return PASS;
	}
	untranslate(ack, &ends, at);
	/* A barrier as well: the record is in the ring before it is read whether the keeper looks there. */
	__sync_fetch_and_add(&gate->taken, 1);
	/*
	 * A wake-up is an interrupt to a CPU, and one is enough for all that waits. Adaptive ones would
	 * stop after one that is left out, until the keeper has caught up.
	 */
	looks = *(volatile __u64 *)&gate->oldest_ns != 0;
	if (!payload && !looks)
		gate->oldest_ns = now;
	wakes = !payload && (!looks || gate->woken != (__u32)(now >> GATE_WAKE_SHIFT));
	if (wakes)
		gate->woken = now >> GATE_WAKE_SHIFT;
	bpf_ringbuf_submit(ack, wakes ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
	/* Not the verdict that tells of congestion: the connection would slow down its own sending. */
	return passes ? PASS : DROP;
}

SEC("cgroup_skb/egress") int PROGRAM(gate)(struct __sk_buff *skb)
{
	return pass_gate(skb);
}

#ifndef SHARED
#include "marked.h"

/* The packets of all processes come here, and large datagrams are not to be told of for others. */
SEC("cgroup_skb/egress") int pybpft_mgate(struct __sk_buff *skb)
{
	HOLD_RECORD();
	return mark_of(skb->sk) ? pass_gate(skb) : PASS;
}
#endif

char LICENSE[] SEC("license") = "Dual MIT/GPL";
