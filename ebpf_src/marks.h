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

#include "multipath.h"

#ifdef ENTRIES
always_inline int police_marked(struct __sk_buff *skb, const __u32 *mark, __u32 direction, int drop)
{
	HOLD_RECORD();
	return mark ? enter(skb, *mark, direction, drop) : PASS;
}

always_inline int shape_marked(struct bpf_sock_ops *ctx, const __u32 *mark)
{
	HOLD_RECORD();
	return mark ? shape_for(ctx, *mark) : 1;
}

/* The shared program tells. */
#define shape_marked_multipath(ctx, mark) shape_marked(ctx, mark)

SEC("cgroup_skb/egress") int pybpft_mgate(struct __sk_buff *skb)
{
	const __u32 *mark = mark_of(skb->sk);

	HOLD_RECORD();
	if (!mark)
		return PASS;
	skb->cb[0] = *mark;
	bpf_tail_call(skb, &EGRESS, ENTRY_GATE);
	return PASS;
}
#else
#define police_marked(skb, mark, direction, drop) ((mark) ? police(skb, direction, drop) : PASS)
#define shape_marked(ctx, mark) ((mark) ? shape(ctx) : 1)
#define shape_marked_multipath(ctx, mark) ((mark) ? shape_but_multipath(ctx) : 1)
#endif

SEC("cgroup_skb/ingress") int pybpft_mingress(struct __sk_buff *skb)
{
	return police_marked(skb, mark_of(skb->sk), THROTTLE_DOWNLOAD, DROP);
}

SEC("cgroup_skb/egress") int pybpft_megress(struct __sk_buff *skb)
{
	return police_marked(skb, mark_of(skb->sk), THROTTLE_UPLOAD, DROP);
}

SEC("cgroup_skb/egress") int pybpft_megressc(struct __sk_buff *skb)
{
	return police_marked(skb, mark_of(skb->sk), THROTTLE_UPLOAD, DROP_AND_NOTIFY_CONGESTION);
}

SEC("sockops") int pybpft_msockops(struct bpf_sock_ops *ctx)
{
	return shape_marked(ctx, mark_of(ctx->sk));
}

/* The same with MPTCP, since Linux 5.19. */
SEC("cgroup_skb/ingress") int pybpft_pingress(struct __sk_buff *skb)
{
	return police_marked(skb, multipath_mark_of(skb->sk), THROTTLE_DOWNLOAD, DROP);
}

SEC("cgroup_skb/egress") int pybpft_pegress(struct __sk_buff *skb)
{
	return police_marked(skb, multipath_mark_of(skb->sk), THROTTLE_UPLOAD, DROP);
}

SEC("cgroup_skb/egress") int pybpft_pegressc(struct __sk_buff *skb)
{
	return police_marked(skb, multipath_mark_of(skb->sk), THROTTLE_UPLOAD,
			     DROP_AND_NOTIFY_CONGESTION);
}

SEC("sockops") int pybpft_psockops(struct bpf_sock_ops *ctx)
{
	int is_shaped = ctx->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB; /* as those of MPTCP never are */

	return shape_marked_multipath(ctx, is_shaped ? mark_of(ctx->sk) :
						       multipath_mark_of(ctx->sk));
}

SEC("cgroup/sock_create") int pybpft_create(struct bpf_sock *ctx)
{
	__u32 *mark, direction = THROTTLE_UPLOAD;
	__u32 number = bpf_get_current_pid_tgid() >> 32;
	struct throttle_process *process = bpf_map_lookup_elem(&PROCESSES, &number);

	HOLD_RECORD();
	/* By the configuration each version finds out who has left this program behind. */
	if (!bpf_map_lookup_elem(&CGROUP_CONFIGS, &direction) || !process)
		return 1;
	mark = bpf_sk_storage_get(&MARKS, ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (mark)
		*mark = process->slot;
	return 1;
}
