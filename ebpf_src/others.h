/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What has no receive window, such as UDP with QUIC: packets are dropped early and apart from each
 * other, so that a sender that slows down for losses does so before it loses all that it sends.
 *
 * How many is for a proportional-integral controller to find out, that squares its output (PI2, De
 * Schepper et al., 2016): then it is as stable at any rate. The queue that it looks at is what the
 * bucket owes: nothing waits anywhere, so it may be longer than a real one.
 *
 * While downloads wait for the gate's keeper to open their windows, all other packets together get
 * half of the limit: one that never slows down would leave nothing to those that wait.
 *
 * Where a helper may run, downloads wait in a queue instead, once they were over the limit
 * (pybpfd_queue in divert.bpf.c).
 */

#define OTHERS_PERIOD_NS (32 * 1000 * 1000)
#define OTHERS_IDLE_NS (1000 * 1000 * 1000)
#define OTHERS_TARGET (15000000 >> 10)
/* But two packets at least: at a low rate any burst would be taken for a queue. */
#define OTHERS_TARGET_BYTES 3000
/* 0.16 and 3.2 a second: 65536ths of the root of the share, for 1024 times 1024 nanoseconds. */
#define OTHERS_INTEGRAL 11
#define OTHERS_PROPORTIONAL 220
#define OTHERS_ALL 65535
#define OTHERS_DECAY_SHIFT 2
#define OTHERS_FIRST 6554 /* 1 % */
#define ECN_ECT0 2
#define ECN_CE 3
/* A sender that has halved its rate is to make up for that when it has grown again. */
#define OTHERS_CREDIT_NS (150 * 1000 * 1000)
/* Beyond what may be owed anyway: early losses have to have time to be answered. */
#define OTHERS_SLACK_NS (40 * 1000 * 1000)
#define OTHERS_HALF_NS (50 * 1000 * 1000)
/* So much until a queue is there, which takes 10 to 20 ms, and holds 500 ms. */
#define LENT_NS (400 * 1000 * 1000)

static long (*bpf_skb_ecn_set_ce)(struct __sk_buff *skb) = (void *)97; /* Linux 5.1 */

/*
 * The root of the share that is dropped, found anew once a period. A burst is no queue: the least
 * that was owed in a period counts. Nor is credit a shorter queue than none: a slow start may use
 * it up.
 */
always_inline __u32 root_of_share(struct throttle_bucket *bucket, __s64 owed_ns, __s64 target,
				  __u64 now)
{
	__s64 owed = larger(owed_ns, 0) >> 10, before = bucket->early_owed;
	__s64 root = bucket->early_root;
	__u64 since = now - bucket->early_at_ns;

	if (owed < bucket->early_least)
		bucket->early_least = owed;
	if (since < OTHERS_PERIOD_NS)
		return root;
	if (since > OTHERS_IDLE_NS)
		root = before = 0;
	else
		owed = bucket->early_least;
	root += ((owed - target) * OTHERS_INTEGRAL +
		 (owed - before) * OTHERS_PROPORTIONAL) >> 10;
	/* Once nothing is owed, what a burst has built up is soon forgotten (RFC 8033, 4.2). */
	if (!owed)
		root -= root >> OTHERS_DECAY_SHIFT;
	root = smaller(larger(root, 0), OTHERS_ALL);
	bucket->early_at_ns = now;
	bucket->early_owed = owed;
	bucket->early_least = 0xffffffff;
	bucket->early_root = root;
	return root;
}

/*
 * Whether its sender is told by a mark instead of a loss (RFC 3168). One that sends ECT(1) expects
 * marks by another law (RFC 9331): for that this queue is none, and its packets are dropped.
 */
always_inline int is_marked(struct __sk_buff *skb)
{
	__u8 room[2], ecn;
	const __u8 *start = bytes_at(skb, 0, room, sizeof(room));

	if (!start)
		return 0;
	ecn = (start[0] >> 4 == 6 ? start[1] >> 4 : start[1]) & ECN_CE;
	return ecn == ECN_CE || (ecn == ECN_ECT0 && bpf_skb_ecn_set_ce(skb) == 1);
}

/*
 * What is lent to downloads: once the gate has told of a large datagram their queue is about to start,
 * and what comes by then is rather let in. What comes after it waits for that. If the queue is late, or
 * cannot be after all, half of the limit passes while the other half pays back.
 */
always_inline __u64 lent(const struct throttle_config *config, __u32 direction, __u64 now)
{
	__u32 slot = config->slot;
	struct throttle_gate *gate;

	if (direction != THROTTLE_DOWNLOAD || !(config->flags & THROTTLE_LEND))
		return 0;
	gate = bpf_map_lookup_elem(&GATE, &slot);
	if (!gate || !gate->datagram_ns)
		return 0;
	return larger(LENT_NS - ((__s64)(now - gate->datagram_ns) >> 1), 0);
}

/* Whether a packet is to be dropped although the bucket would let it pass. */
always_inline int is_early(struct __sk_buff *skb, struct throttle_bucket *bucket,
			   const struct throttle_config *config, __u32 direction, __u32 billed,
			   __u64 lent_ns, __u64 now)
{
	__u64 half_at = bucket->half_at_ns;
	/* Pacing holds a debt, which is no queue. */
	__s64 held = config->flags & THROTTLE_PACE ? PACING_TARGET_NS : 0;
	__s64 owed = bucket->even_at_ns - now - held;
	__s64 target = larger(OTHERS_TARGET, OTHERS_TARGET_BYTES * config->inverse_rate >>
						     (INVERSE_RATE_SHIFT + 10));
	__u64 root = root_of_share(bucket, owed - (__s64)lent_ns, target, now);
	__u32 sum = bucket->early_sum + (root * root >> 16);
	__u32 slot = config->slot, tag = skb->tc_index;
	struct throttle_gate *gate;

	/* A queue has found that its turn is now, or that it is the one to get lost. */
	if ((tag & (DIVERT_TAG_MASK | DIVERT_QUEUED)) == (DIVERT_TAG | DIVERT_QUEUED))
		return !!(tag & DIVERT_LOST);
	/* A slow start doubles its rate each round trip: it has to be told at once. */
	if (root < OTHERS_FIRST / 4 && owed > target << 10) {
		bucket->early_root = OTHERS_FIRST;
		sum = OTHERS_ALL + 1;
	}
	bucket->early_sum = sum & 0xffff;
	if (bucket->credit_ns < OTHERS_CREDIT_NS)
		bucket->credit_ns = OTHERS_CREDIT_NS;
	/* While nothing is owed the limit has room. */
	if (sum >> 16 && owed > 0)
		return !is_marked(skb);
	if (direction != THROTTLE_DOWNLOAD || !(config->flags & THROTTLE_GATE))
		return 0;
	gate = bpf_map_lookup_elem(&GATE, &slot);
	if (!gate)
		return 0;
	if ((__s64)(half_at - now) > OTHERS_HALF_NS) {
		if (gate->alive && gate->next_due_ns)
			return 1;
		half_at = now + OTHERS_HALF_NS;
	} else if ((__s64)(now - half_at) > OTHERS_HALF_NS) {
		half_at = now - OTHERS_HALF_NS;
	}
	bucket->half_at_ns = half_at + (billed * config->inverse_rate >> (INVERSE_RATE_SHIFT - 1));
	return 0;
}
