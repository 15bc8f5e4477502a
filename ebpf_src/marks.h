/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Limits for some processes: the packets of sockets that are marked, whatever cgroup they are of.
 *
 * User space marks the sockets that a process has, the kernel those that it makes (and, with the
 * programs of processes.bpf.c, those of the processes that it starts). What a marked listener
 * accepts is marked from the handshake on. A packet without a mark passes at once.
 *
 * Needs Linux 5.10: socket storage in programs for new sockets, and by a packet's socket.
 */

#define BPF_MAP_TYPE_HASH 1

#include "processes.h"

static __u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;

#include "marked.h"

/*
 * An MPTCP socket has its packets sent by others, which the kernel opens for it and nobody can
 * reach. They take its mark over with their first packet. A listener's does so with the first
 * handshake, before anything is accepted: that is marked then too, plain TCP included.
 */
always_inline int is_marked_multipath(void *sk)
{
	void *mptcp;

	if (!sk)
		return 0;
	if (bpf_sk_storage_get(&MARKS, sk, 0, 0))
		return 1;
	mptcp = bpf_skc_to_mptcp_sock(sk);
	if (!mptcp || !bpf_sk_storage_get(&MARKS, mptcp, 0, 0))
		return 0;
	bpf_sk_storage_get(&MARKS, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	return 1;
}

#ifndef MARKS_ONLY
SEC("cgroup_skb/ingress") int pybpft_mingress(struct __sk_buff *skb)
{
	return IS_MARKED(skb->sk) ? police(skb, THROTTLE_DOWNLOAD, DROP) : PASS;
}

SEC("cgroup_skb/egress") int pybpft_megress(struct __sk_buff *skb)
{
	return IS_MARKED(skb->sk) ? police(skb, THROTTLE_UPLOAD, DROP) : PASS;
}

SEC("cgroup_skb/egress") int pybpft_megressc(struct __sk_buff *skb)
{
	return IS_MARKED(skb->sk) ? police(skb, THROTTLE_UPLOAD, DROP_AND_NOTIFY_CONGESTION) : PASS;
}

/* Connections that are shaped had a mark when that began. */
SEC("sockops") int pybpft_msockops(struct bpf_sock_ops *ctx)
{
	if (ctx->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB || IS_MARKED(ctx->sk))
		return shape(ctx);
	return 1;
}

/* The same with MPTCP, since Linux 5.19. */
SEC("cgroup_skb/ingress") int pybpft_pingress(struct __sk_buff *skb)
{
	return is_marked_multipath(skb->sk) ? police(skb, THROTTLE_DOWNLOAD, DROP) : PASS;
}

SEC("cgroup_skb/egress") int pybpft_pegress(struct __sk_buff *skb)
{
	return is_marked_multipath(skb->sk) ? police(skb, THROTTLE_UPLOAD, DROP) : PASS;
}

SEC("cgroup_skb/egress") int pybpft_pegressc(struct __sk_buff *skb)
{
	return is_marked_multipath(skb->sk) ?
		       police(skb, THROTTLE_UPLOAD, DROP_AND_NOTIFY_CONGESTION) :
		       PASS;
}

SEC("sockops") int pybpft_psockops(struct bpf_sock_ops *ctx)
{
	if (ctx->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB || is_marked_multipath(ctx->sk))
		return shape_but_multipath(ctx);
	return 1;
}

SEC("cgroup/sock_create") int pybpft_create(struct bpf_sock *ctx)
{
	__u32 direction = THROTTLE_UPLOAD;
	__u32 process = bpf_get_current_pid_tgid() >> 32;

	HOLD_RECORD();
	/* By the configuration each version finds out who has left this program behind. */
	if (bpf_map_lookup_elem(&CGROUP_CONFIGS, &direction) &&
	    bpf_map_lookup_elem(&PROCESSES, &process))
		bpf_sk_storage_get(&MARKS, ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
	return 1;
}
#endif
