/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What a throttle has of its own where it shares the programs of others: small ones, by which the
 * shared ones are entered. To verify those anew for each throttle would take milliseconds.
 *
 * An entry tells by the record which slot is the throttle's. User space puts the shared programs into
 * the maps of programs. Once no process has those open the kernel empties them, and all passes.
 */
#define BPF_MAP_TYPE_PROG_ARRAY 3

static long (*bpf_tail_call)(void *ctx, void *programs, __u32 index) = (void *)12;

#define ENTRY_MAP(name, entries)                                                                   \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_PROG_ARRAY);                                             \
		__uint(max_entries, entries);                                                      \
		__type(key, __u32);                                                                \
		__type(value, __u32);                                                              \
	} name SEC(".maps")

/* One for each hook: the kernel wants all programs in a map to be for the same. */
ENTRY_MAP(INGRESS, 1);
ENTRY_MAP(EGRESS, THROTTLE_ENTRIES);
ENTRY_MAP(SOCKOPS, 1);

always_inline __u32 own_slot(void)
{
	__u64 zero = 0;
	struct throttle_record *record = bpf_map_lookup_elem(&THROTTLE, &zero);

	return record ? record->slot : 0;
}
#define OWN_SLOT() own_slot()

/*
 * Into a call to a place that the verifier knows the kernel writes a jump, which saves each packet
 * 14 ns, and at each load has word sent to all CPUs, which takes 0.1 ms. The policer has that, which
 * sees all packets. The gate, which sees those that leave, and the shaper go to a place that the
 * verifier does not know: no slot has the highest bit.
 */
#define BY_MAP(slot, place) ((place) + ((slot) >> 31))

always_inline int enter(struct __sk_buff *skb, __u32 slot, __u32 direction, int drop)
{
	HOLD(CGROUP_CONFIGS);
	skb->cb[0] = slot;
	if (direction == THROTTLE_DOWNLOAD)
		bpf_tail_call(skb, &INGRESS, ENTRY_DENY);
	else
		bpf_tail_call(skb, &EGRESS, drop == DROP ? ENTRY_DENY : ENTRY_TELL);
	return PASS;
}

always_inline int police(struct __sk_buff *skb, __u32 direction, int drop)
{
	return enter(skb, OWN_SLOT(), direction, drop);
}

SEC("cgroup_skb/egress") int pybpft_gate(struct __sk_buff *skb)
{
	__u32 slot = OWN_SLOT();

	skb->cb[0] = slot;
	bpf_tail_call(skb, &EGRESS, BY_MAP(slot, ENTRY_GATE));
	return PASS;
}

/* Another throttle shapes a connection; this one can only police it. */
always_inline int leave_to_others(__u32 slot)
{
	__u32 element = ELEMENT(slot, THROTTLE_DOWNLOAD);
	struct throttle_config *config = bpf_map_lookup_elem(&CGROUP_CONFIGS, &element);
	struct throttle_bucket *bucket = bpf_map_lookup_elem(&CGROUP_BUCKETS, &element);

	if (config && bucket)
		leave_room(config, bucket);
	return 1;
}

/* There is no socket yet by which the shared program could know whose it is. */
always_inline int begin_window(struct bpf_sock_ops *ctx, __u32 slot)
{
	__u32 element = ELEMENT(slot, THROTTLE_DOWNLOAD);
	struct throttle_config *config = bpf_map_lookup_elem(&CGROUP_CONFIGS, &element);
	struct throttle_bucket *bucket = bpf_map_lookup_elem(&CGROUP_BUCKETS, &element);

	if (config && bucket && does(config, bucket, THROTTLE_WINDOW, bpf_ktime_get_ns()) &&
	    !IS_EXEMPT(config, ctx, remote_ip))
		ctx->args[0] = first_window(ctx, config);
	return 1;
}

always_inline int shape_for(struct bpf_sock_ops *ctx, __u32 slot)
{
	struct throttle_socket *socket;

	switch (ctx->op) {
	case BPF_SOCK_OPS_RWND_INIT:
		return begin_window(ctx, slot);
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (!ctx->sk)
			return 1;
		socket = bpf_sk_storage_get(&SOCKETS, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (!socket)
			return 1;
		if (socket->slot && socket->slot != slot)
			return leave_to_others(slot);
		socket->slot = slot;
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		if (!ctx->sk || ctx->args[0] == BPF_WRITE_HDR_TCP_CURRENT_MSS)
			return 1;
		socket = bpf_sk_storage_get(&SOCKETS, ctx->sk, 0, 0);
		if (!socket || socket->slot != slot)
			return 1;
		break;
	case BPF_SOCK_OPS_STATE_CB:
		return look_for_end(ctx, slot);
	default:
		return 1;
	}
	bpf_tail_call(ctx, &SOCKOPS, BY_MAP(slot, 0));
	return 1;
}

always_inline int shape(struct bpf_sock_ops *ctx)
{
	return shape_for(ctx, OWN_SLOT());
}

/* The shared program tells. */
#define shape_but_multipath(ctx) shape(ctx)
