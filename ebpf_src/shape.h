/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The shaper: TCP is slowed down before packets have to be dropped.
 *
 * A sock_ops program on the same cgroup is called before each segment of a connection leaves, data
 * or acknowledgement. For uploads it sets the rate that TCP paces itself at; for downloads the
 * receive window, whose right edge then moves at the limit, so that the sender is clocked by it.
 * Both follow the debt of the policer's bucket in proportion: an integral controller oscillates.
 * The policer stays behind it for all that is not TCP or does not obey.
 *
 * Needs Linux 5.10: callbacks for header options, and socket storage.
 */

#define BPF_SOCK_OPS_RWND_INIT 2
#define BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB 4
#define BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB 5
#define BPF_SOCK_OPS_STATE_CB 10
#define BPF_SOCK_OPS_HDR_OPT_LEN_CB 14
#define BPF_SOCK_OPS_STATE_CB_FLAG (1 << 2)
#define BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG (1 << 6)
#define CALLBACKS (BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)
#define TCP_CLOSE 7
#define BPF_WRITE_HDR_TCP_CURRENT_MSS 1


#define SOL_SOCKET 1
#define SO_RCVLOWAT 18
#define SO_MAX_PACING_RATE 47
#define SOL_TCP 6
#define TCP_WINDOW_CLAMP 10

#define BPF_MAP_TYPE_SK_STORAGE 24
#define BPF_SK_STORAGE_GET_F_CREATE 1

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define bpf_htonl(x) __builtin_bswap32(x)
#else
#define bpf_htonl(x) (x)
#endif

#define TCP_BPF_IW 1001
#define TCP_BPF_SOCK_OPS_CB_FLAGS 1008 /* Linux 6.12 */

#define MS 1000000LL
#define MOST_PACED_NS (400 * MS)
#define MOST_QUEUED_NS (600 * MS)
#define WINDOW_TARGET_NS (20 * MS)
#define MOST_SLACK_NS (2000 * MS)
#define PROMISED_SLACK_NS (50 * MS)
#define LEAST_WINDOW_BYTES 1152
#define MOST_WINDOW_BYTES (1 << 30)
#define LEAST_SHARE_BYTES 2896 /* two usual segments */
#define LEAST_SEGMENT_BYTES 1448
#define MOST_FIRST_WINDOW_BYTES 65535
#define MOST_MEASURED_US 200000
#define LEAST_RTO_US 200000 /* after which TCP sends into a window of less than a segment */
#define STOP_NS (400 * MS)
#define FEW_FLOWS 2
#define USUAL_CLAMP (65535 << 7)
#define USUAL_CLAMP_RATE 25000000
#define SHORT_WAY_US 5000
#define LEAST_SHARE_SHIFT 6    /* a 64th of the limit */
#define MOST_SHARE_NS (200 * MS)
#define LEAST_FIRST_PACKETS 2
#define MANY_BEGINNINGS 32 /* in an epoch: then a download begins with one packet */
#define MOST_FIRST_PACKETS 10
#define FIRST_PACKET_SHARE 72500 /* so that it is 20 ms' worth */

#define TCP_BPF_DELACK_MAX 1003
#define GATE_AFTER_BYTES 6000 /* in an epoch: while nothing is owed, small flows never meet the keeper */
#define FAR_WAY_US 50000
#define LEAST_ROOM_BYTES 65536
#define MOST_GATE_SLACK_NS (1000 * MS)
#define SLOW_START_ROUND_TRIPS 4
#define MOST_SLOW_START_NS (400 * MS)
#define PAUSE_SHIFT 20 /* of nanoseconds: about a millisecond */
#define LEAST_PAUSE 500 /* of these; longer than a round trip in which nothing comes */
#define MOST_EXTRA_NS (4 * PACING_TARGET_NS) /* half as much again as the rate */
#define GATE_PATIENCE_BYTES 65536 /* with a first window, until the keeper can send where it is */

/* The start of the context, as in linux/bpf.h. */
struct bpf_sock_ops {
	__u32 op;
	__u32 args[4]; /* the first of them is the reply too */
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 is_fullsock;
	__u32 snd_cwnd;
	__u32 srtt_us; /* eight times the smoothed round trip */
	__u32 bpf_sock_ops_cb_flags;
	__u32 state;
	__u32 rtt_min;
	__u32 snd_ssthresh;
	__u32 rcv_nxt;
	__u32 snd_nxt;
	__u32 snd_una;
	__u32 mss_cache;
	__u32 ecn_flags;
	__u32 rate_delivered;
	__u32 rate_interval_us;
	__u32 packets_out;
	__u32 retrans_out;
	__u32 total_retrans;
	__u32 segs_in;
	__u32 data_segs_in;
	__u32 segs_out;
	__u32 data_segs_out;
	__u32 lost_out;
	__u32 sacked_out;
	__u32 sk_txhash;
	__u64 bytes_received;
	__u64 bytes_acked;
	void *sk;

	__u64 skb_data;
	__u64 skb_data_end;
	__u32 skb_len;
};

static __u32 (*bpf_get_prandom_u32)(void) = (void *)7;
static long (*bpf_setsockopt)(void *ctx, int level, int name, void *value, int len) = (void *)49;
static long (*bpf_getsockopt)(void *ctx, int level, int name, void *value, int len) = (void *)57;
static long (*bpf_sock_ops_cb_flags_set)(struct bpf_sock_ops *ctx, int flags) = (void *)59;
static void *(*bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;
#ifdef SHARED
static long (*bpf_sk_storage_delete)(void *map, void *sk) = (void *)108;
#endif
static void *(*bpf_skc_to_mptcp_sock)(void *sk) = (void *)196; /* Linux 5.19 */

/*
 * A number on the stack, for a helper to read as four bytes. The verifier takes what a slot held
 * before for forgotten only where all of its eight bytes are written, and would check all that
 * follows again for each such rest.
 */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ON_STACK(number) ((__u64)(number))
#define FROM_STACK(cell) ((__u32)(cell))
#else
#define ON_STACK(number) ((__u64)(number) << 32)
#define FROM_STACK(cell) ((__u32)((cell) >> 32))
#endif

always_inline long set_option(void *ctx, int level, int name, __u32 value)
{
	__u64 cell = ON_STACK(value);

	return bpf_setsockopt(ctx, level, name, &cell, sizeof(value));
}

always_inline long get_option(void *ctx, int level, int name, __u32 *value)
{
	__u64 cell = 0;
	long refused = bpf_getsockopt(ctx, level, name, &cell, sizeof(*value));

	*value = FROM_STACK(cell);
	return refused;
}

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, THROTTLE_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct throttle_flows);
} CGROUP_FLOWS SEC(".maps");

#include "sockets.h"

/* The counts of an epoch, which begins when it is asked for first. */
always_inline struct throttle_flows *flows_of(const struct throttle_config *config,
					      __u32 direction, __u64 epoch)
{
	__u64 key = ON_STACK(ELEMENT(config->slot, direction));
	struct throttle_flows *flows = bpf_map_lookup_elem(&CGROUP_FLOWS, &key);

	if (flows && flows->epoch != epoch) {
		/* CPUs that race here miscount a flow or two for an epoch. */
		flows->before = flows->epoch + 1 == epoch ? flows->now : 0;
		flows->now = 0;
		flows->begun = 0;
		flows->epoch = epoch;
	}
	return flows;
}

/*
 * The counts of a direction, with a connection that has moved so many bytes so far. One that takes
 * next to nothing does not count.
 */
always_inline struct throttle_flows *count_flow(const struct throttle_config *config,
						struct throttle_share *share, __u32 direction,
						__u64 bytes, __u64 now)
{
	__u64 epoch = now >> EPOCH_SHIFT;
	struct throttle_flows *flows = flows_of(config, direction, epoch);
	__u64 least = share->counted ? config->rate_bytes_per_s >> LEAST_SHARE_SHIFT :
				       LEAST_SHARE_BYTES;

	if (!flows)
		return 0;
	if (share->epoch != epoch) {
		share->epoch = epoch;
		share->epoch_bytes = share->bytes;
	}
	share->bytes = bytes;
	if (share->counted != epoch && bytes - share->epoch_bytes >= least) {
		share->counted = epoch;
		__sync_fetch_and_add(&flows->now, 1);
	}
	return flows;
}

/* How many connections share a limit. */
always_inline __u32 sharing(struct throttle_flows *flows)
{
	return larger(larger(flows->now, flows->before), 1);
}

/*
 * What a connection may send before it is known how many share the limit. Many may begin at once;
 * those that begin later get less.
 */
always_inline __u32 first_packets(const struct throttle_config *config, __u32 direction, __u64 now,
				  int begins)
{
	struct throttle_flows *flows = flows_of(config, direction, now >> EPOCH_SHIFT);
	__u64 packets = config->rate_bytes_per_s / FIRST_PACKET_SHARE;

	if (flows && begins) {
		packets /= flows->begun + 1;
		__sync_fetch_and_add(&flows->begun, 1);
	} else if (flows && flows->begun) {
		packets /= flows->begun;
	}
	if (packets < LEAST_FIRST_PACKETS)
		return flows && direction == THROTTLE_DOWNLOAD && flows->begun > MANY_BEGINNINGS
			       ? 1
			       : LEAST_FIRST_PACKETS;
	return packets < MOST_FIRST_PACKETS ? packets : MOST_FIRST_PACKETS;
}

/*
 * A fair share at the target debt, less above it, and more below it, up to the whole rate. While
 * there is credit it is more than the whole: TCP paces its headers too, and a slow start is made up for.
 * At the largest rate, 100 GB/s, the product is below 2^63.
 */
always_inline __u64 paced_rate(__u64 rate, __u32 flows, __s64 debt, __s64 target)
{
	__u64 share = rate / flows;
	__u64 paced;

	if (debt <= 0)
		return rate + (rate >> PACING_EXTRA_SHIFT) *
				      (__u64)smaller(-debt, MOST_EXTRA_NS) / PACING_TARGET_NS;
	paced = share * (__u64)target / (__u64)debt;
	return larger(smaller(paced, rate), share >> PACING_LEAST_SHIFT);
}

/* After a change of the rate it is the old rate's until the next packet that the limit is for. */
always_inline __s64 debt_of(struct throttle_bucket *bucket, __u64 now)
{
	return bucket->even_at_ns ? (__s64)(bucket->even_at_ns - now) : 0;
}

/* What a slow start leaves out may be made up for, as far as it is usual on a way. */
always_inline void make_up(struct throttle_bucket *bucket, __u64 way_us)
{
	__u64 credit = smaller(way_us * SLOW_START_ROUND_TRIPS * 1000, MOST_SLOW_START_NS);

	if (bucket->credit_ns < credit)
		bucket->credit_ns = credit;
}

/*
 * More than a small message has come. After a pause the credit for a slow start begins anew, from
 * none, or the pause would be made up for. How much there may be is learnt again, too.
 */
always_inline void forget_pause(struct throttle_bucket *bucket, struct throttle_flows *flows,
				__u64 now)
{
	__u32 time = now >> PAUSE_SHIFT;

	if (time - flows->moved > LEAST_PAUSE) {
		if (debt_of(bucket, now) < 0)
			bucket->even_at_ns = now;
		bucket->credit_ns = 0;
	}
	flows->moved = time;
}

/* This kernel refuses the option: the policer alone is left, and needs a longer burst. */
always_inline void police_instead(struct throttle_bucket *bucket, __u32 flag)
{
	bucket->refused |= flag;
	bucket->slack_ns = POLICE_SLACK_NS;
}

always_inline void pace(struct bpf_sock_ops *ctx, struct throttle_socket *socket,
			struct throttle_config *config, struct throttle_bucket *bucket, __u64 now)
{
	struct throttle_flows *counts = count_flow(config, &socket->share[THROTTLE_UPLOAD],
						   THROTTLE_UPLOAD, ctx->bytes_acked, now);
	__u32 flows = counts ? sharing(counts) : 1;
	__s64 share = (__u64)flows * 2 * ctx->mss_cache * config->inverse_rate >> INVERSE_RATE_SHIFT;
	/* A queue that paces, as fq does, holds two of what TCP sends at once: charged, not sent yet. */
	__s64 queued = (__u64)ctx->skb_len * 2 * config->inverse_rate >> INVERSE_RATE_SHIFT;
	/* TCP sends at least two segments at once, so each connection may owe as many. */
	__s64 target = PACING_TARGET_NS + smaller(share, MOST_PACED_NS) +
		       smaller(queued, MOST_QUEUED_NS);
	__s64 debt = debt_of(bucket, now);
	__u32 value, difference, packets;

	/*
	 * Pacing holds a debt. What a pause has saved would come on top of it in the first seconds of a
	 * bulk transfer, which begins with a full segment.
	 */
	if (counts && !counts->now && !counts->before && ctx->skb_len >= ctx->mss_cache &&
	    debt < PACING_TARGET_NS) {
		debt = PACING_TARGET_NS;
		bucket->even_at_ns = now + debt;
	}
	make_up(bucket, ctx->srtt_us / 8);
	value = smaller(paced_rate(config->rate_bytes_per_s, flows, debt, target), UNLIMITED);
	difference = larger(value, socket->pacing) - smaller(value, socket->pacing);
	/* Pacing begins after ten packets. Refused, and not needed, where something was sent before. */
	if (!socket->pacing) {
		packets = first_packets(config, THROTTLE_UPLOAD, now, 1);
		if (packets < MOST_FIRST_PACKETS)
			set_option(ctx, SOL_TCP, TCP_BPF_IW, packets);
	}
	if (difference <= socket->pacing >> PACING_STEP_SHIFT)
		return;
	/* Connections that share the bucket may owe more than one alone: pacing makes up for it. */
	if (!bucket->slack_ns)
		bucket->slack_ns = PACING_SLACK_NS;
	/* Four bytes: eight are refused. */
	if (set_option(ctx, SOL_SOCKET, SO_MAX_PACING_RATE, value))
		police_instead(bucket, THROTTLE_PACE);
	else
		socket->pacing = value;
}

/* Behind a receive window the policer's burst is short; who has no such window needs the long one. */
always_inline void leave_room(struct throttle_config *config, struct throttle_bucket *bucket)
{
	if (config->flags & THROTTLE_WINDOW && bucket->slack_ns < POLICE_SLACK_NS)
		bucket->slack_ns = POLICE_SLACK_NS;
}

/*
 * Whether a connection has to stop, whose fair share of what fits on the way is less than a segment.
 * With a window of less than a segment TCP waits for its timer, 200 ms and a round trip, and then
 * sends what fits. So some connections stop while the others send a segment each round trip, as many
 * of each as make up the limit. Chance tells them apart: in step they would all stop at once. One
 * or two have nobody to make up for them, and stop as evenly as may be.
 */
always_inline int has_to_stop(struct throttle_socket *socket, int few, __u64 fair, __u64 segment,
			      __u64 way_us)
{
	/* What a stop costs, and what it would cost never to stop; their ratio is the share of stops. */
	__u64 over = (segment - fair) * way_us, under = fair * (LEAST_RTO_US + way_us);
	__u32 before = few ? socket->stop : bpf_get_prandom_u32();

	socket->stop = (before & 0xffff) + (over < under ? (over << 16) / under : 1 << 16);
	return socket->stop >> 16;
}

/*
 * An acknowledgement that TCP puts off, for 40 ms where less than two segments came, would keep its
 * sender from getting more. Twice the kernel's tick is the least that it takes.
 */
always_inline void hurry_acknowledgements(struct bpf_sock_ops *ctx)
{
	__u32 most_us = 2000;

	if (!set_option(ctx, SOL_TCP, TCP_BPF_DELACK_MAX, most_us))
		return;
	most_us = 8000;
	if (!set_option(ctx, SOL_TCP, TCP_BPF_DELACK_MAX, most_us))
		return;
	most_us = 20000;
	set_option(ctx, SOL_TCP, TCP_BPF_DELACK_MAX, most_us);
}

/*
 * TCP's own autotuning takes what comes in bursts for the work of a slow reader (Linux 6.18), and a
 * window for a long way would stay small. To ask for so much data at once enlarges the buffer, and
 * leaves it to autotuning; nobody sees it, as the socket is locked.
 */
always_inline void make_room(struct bpf_sock_ops *ctx, struct throttle_socket *socket, __u32 bytes)
{
	__u32 before;

	if (bytes <= socket->room || bytes < LEAST_ROOM_BYTES)
		return;
	socket->room = bytes;
	if (get_option(ctx, SOL_SOCKET, SO_RCVLOWAT, &before))
		return;
	set_option(ctx, SOL_SOCKET, SO_RCVLOWAT, bytes);
	set_option(ctx, SOL_SOCKET, SO_RCVLOWAT, before);
}

/*
 * Where the gate's keeper opens the window, the kernel has only to keep from promising much by
 * itself: with data that is sent, and until the keeper has a connection in hand. Always the same
 * promise, so that TCP's autotuning has nothing to recover from.
 */
always_inline int clamp_for_gate(struct bpf_sock_ops *ctx, struct throttle_socket *socket,
				 struct throttle_config *config, struct throttle_bucket *bucket,
				 __u64 now)
{
	__u64 slot = ON_STACK(config->slot);
	__u32 value;
	struct throttle_gate *gate = bpf_map_lookup_elem(&GATE, &slot);
	struct throttle_share *share = &socket->share[THROTTLE_DOWNLOAD];
	__u64 bytes, least, way_us, slack, after, since;
	int gated, is_far = ctx->srtt_us > FAR_WAY_US * 8;

	if (!gate || !gate->alive)
		return 0;
	if (socket->gate != GATE_READY && ctx->bytes_received > GATE_PATIENCE_BYTES)
		return 0;
	if (!socket->segment) {
		socket->segment = ctx->mss_cache;
		socket->first = first_packets(config, THROTTLE_DOWNLOAD, now, 0);
		socket->awaited = socket->first * socket->segment;
		__sync_fetch_and_add(&bucket->awaited, socket->awaited);
		hurry_acknowledgements(ctx);
	}
	way_us = gate->round_trip_ns / 1000;
	after = GATE_AFTER_BYTES;
	since = share->epoch_bytes;
	/*
	 * First windows, one each round trip, may never come to that on a long way. Nor has the kernel
	 * time to learn there that it may promise more.
	 */
	if (is_far) {
		way_us = larger(way_us, ctx->srtt_us / 8);
		after = smaller(after, socket->first * socket->segment);
		since = 0;
	}
	gated = socket->gated || (socket->gate == GATE_READY &&
				  (debt_of(bucket, now) > 0 || ctx->bytes_received - since >= after));
	way_us = smaller(way_us, MOST_GATE_WAY_US);
	bytes = config->rate_bytes_per_s / 1000 * (GATE_WINDOW_US + 2 * way_us) / 1000;
	least = 2 * socket->segment + LEAST_GATE_BYTES;
	bytes = gated || is_far ? larger(bytes, least) : socket->first * socket->segment;
	value = smaller(bytes, MOST_WINDOW_BYTES);
	if (set_option(ctx, SOL_TCP, TCP_WINDOW_CLAMP, value)) {
		socket->gated = 0;
		return 0;
	}
	socket->clamp = value;
	socket->gated = gated;
	if (gated)
		make_room(ctx, socket, value);
	/*
	 * What was asked for may come at any time, of all connections at once, and to drop it would only
	 * make it come twice.
	 */
	slack = GATE_SLACK_NS + ((__u64)larger(bucket->awaited, 0) * config->inverse_rate >>
				 INVERSE_RATE_SHIFT);
	slack = smaller(slack, MOST_GATE_SLACK_NS);
	if (bucket->slack_ns < slack)
		bucket->slack_ns = slack;
	if (gated)
		make_up(bucket, way_us);
	return 1;
}

/* A limit that was lifted: TCP is as it was before. */
always_inline void restore_pacing(struct bpf_sock_ops *ctx, struct throttle_socket *socket)
{
	if (!socket->pacing)
		return;
	socket->pacing = 0;
	bpf_setsockopt(ctx, SOL_SOCKET, SO_MAX_PACING_RATE, &socket->original_pacing, 4);
}

always_inline void restore_clamp(struct bpf_sock_ops *ctx, struct throttle_socket *socket)
{
	if (!socket->clamp)
		return;
	socket->clamp = 0;
	bpf_setsockopt(ctx, SOL_TCP, TCP_WINDOW_CLAMP, &socket->original_clamp, 4);
}

/* The mean of those that came; never less than what is usual, as many are not full. */
always_inline __u64 segment_bytes(struct bpf_sock_ops *ctx)
{
	return larger(ctx->bytes_received / larger(ctx->data_segs_in, 1), LEAST_SEGMENT_BYTES);
}

/*
 * The round trip: from a window that was opened to the first data that was sent because of it. The
 * handshake alone does not tell, as its first packet may have been lost, or have woken a radio; and
 * ways change. A sender that has nothing to send seems to be far away, hence the bound.
 */
always_inline __u64 measure_way(struct bpf_sock_ops *ctx, struct throttle_socket *socket, __u64 now)
{
	__u64 sample, most = ctx->srtt_us / 8, way = socket->way_us;

	if (!way)
		way = most;
	if (!socket->asked_ns || ctx->bytes_received <= socket->answer)
		return way;
	sample = smaller((now - socket->asked_ns) / 1000, larger(most, MOST_MEASURED_US));
	/* Down at once, and up by halves. */
	way = larger(smaller(sample, (sample + way) / 2), 1);
	socket->asked_ns = 0;
	socket->way_us = way;
	return way;
}

/* Remember that the window was opened, for measure_way. */
always_inline void opened(struct bpf_sock_ops *ctx, struct throttle_socket *socket, __u64 window,
			  __u64 segment, __u64 now)
{
	__u64 edge = ctx->bytes_received + window;

	if (!socket->opened)
		socket->opened = ctx->bytes_received + MOST_FIRST_WINDOW_BYTES + socket->promised;
	/* Who has to stop does not answer at once. */
	if (window < segment)
		socket->asked_ns = 0;
	if (edge <= socket->opened)
		return;
	if (!socket->asked_ns && window >= segment) {
		/* A window is told in coarse units, rounded up. */
		socket->answer = socket->opened + segment;
		socket->asked_ns = now;
	}
	socket->opened = edge;
}

always_inline void clamp(struct bpf_sock_ops *ctx, struct throttle_socket *socket,
			 struct throttle_config *config, struct throttle_bucket *bucket,
			 __u32 flows, __u64 moved, __u64 now)
{
	__u64 way_us = measure_way(ctx, socket, now), segment = segment_bytes(ctx);
	__s64 credit = config->credit_ns;
	__s64 debt = debt_of(bucket, now);
	__s64 ahead = (__s64)way_us * 1250 + WINDOW_TARGET_NS; /* a round trip and more */
	__s64 share = (__u64)flows * 2 * segment * config->inverse_rate >> INVERSE_RATE_SHIFT;
	__s64 slack, lack;
	__u64 bytes, fair, least;
	int few = flows <= FEW_FLOWS;
	__u32 value;

	socket->promised = moved < socket->promised ? socket->promised - moved : 0;
	/*
	 * On a short way even the smallest window is more than a small limit, and one of less than two
	 * segments has its acknowledgements delayed: such a connection is policed.
	 */
	if (way_us < SHORT_WAY_US) {
		restore_clamp(ctx, socket);
		leave_room(config, bucket);
		return;
	}
	share = smaller(share, MOST_SHARE_NS);
	/*
	 * What is on its way cannot be called back: dropping it would only make it come twice. Nor can
	 * a window from before the limit, but its sender has to slow down: what it owed by then would
	 * be taken off when its new window has hold of it.
	 */
	slack = socket->promised ? PROMISED_SLACK_NS : ahead * 4 + share;
	if (slack > (__s64)bucket->slack_ns && slack <= MOST_SLACK_NS)
		bucket->slack_ns = slack;
	ahead += share;
	ahead -= larger(debt, -credit);
	/* Microseconds: nanoseconds at 100 GB/s would overflow. */
	bytes = (__u64)larger(ahead, 0) / 1000 * (config->rate_bytes_per_s / flows) / 1000000;
	/*
	 * Two segments, where they are no more than a fair share of what fits on the way: of less, the
	 * acknowledgements are delayed, and before Linux 6.18 such a window is slow to grow again.
	 */
	fair = config->rate_bytes_per_s / flows * way_us / 1000000;
	least = smaller(fair, 2 * segment);
	if (fair < segment) {
		lack = (__s64)(segment * flows * config->inverse_rate >> INVERSE_RATE_SHIFT) - ahead;
		least = segment;
		if (few && bytes > 2 * segment)
			bytes = 2 * segment;
		if (few || lack > 0) {
			fair = lack < STOP_NS ? fair * (__u64)(STOP_NS - lack) / STOP_NS : 0;
			if (fair < segment && has_to_stop(socket, few, fair, segment, way_us))
				bytes = least = LEAST_WINDOW_BYTES;
		}
	}
	value = smaller(larger(bytes, larger(least, LEAST_WINDOW_BYTES)), MOST_WINDOW_BYTES);
	/* On every acknowledgement, even if it is the same: TCP's autotuning overwrites it. */
	if (set_option(ctx, SOL_TCP, TCP_WINDOW_CLAMP, value))
		police_instead(bucket, THROTTLE_WINDOW);
	else
		socket->clamp = value;
	make_room(ctx, socket, value);
	opened(ctx, socket, value, segment, now);
}

/* Of its first window something has come, or nothing will. */
always_inline void await_no_longer(struct throttle_socket *socket, struct throttle_bucket *bucket)
{
	if (!socket->awaited)
		return;
	__sync_fetch_and_add(&bucket->awaited, -(__s32)socket->awaited);
	socket->awaited = 0;
}

/* Set the receive window; `gates` says whether the gate's keeper may open it instead. */
always_inline void move_window(struct bpf_sock_ops *ctx, struct throttle_socket *socket,
			       struct throttle_config *config, struct throttle_bucket *bucket,
			       int gates, __u64 now)
{
	struct throttle_share *share = &socket->share[THROTTLE_DOWNLOAD];
	__u64 before = share->bytes;
	/* Of a connection from before the limit it is not known at first. */
	__u64 moved = before || !socket->promised ? ctx->bytes_received - before : 0;
	int news = !ctx->skb_len || ctx->bytes_received != before;
	struct throttle_flows *flows;

	if (!gates && !news)
		return;
	flows = count_flow(config, share, THROTTLE_DOWNLOAD, ctx->bytes_received, now);
	if (moved)
		await_no_longer(socket, bucket);
	if (flows && moved >= LEAST_SEGMENT_BYTES / 2)
		forget_pause(bucket, flows, now);
	if (!flows || (gates && clamp_for_gate(ctx, socket, config, bucket, now)))
		return;
	if (news)
		clamp(ctx, socket, config, bucket, sharing(flows), moved, now);
}

/*
 * Whether a connection does not leave the machine: to 127.0.0.0/8, or to its own address. Such are
 * policed alone, if at all: segments of 64 KB do not go with a receive window.
 */
always_inline int is_local(__u32 family, __u32 remote_ip4, __u32 local_ip4, __u32 mapped,
			   __u32 differ_ip6)
{
	if (family == AF_INET6 && mapped != bpf_htonl(0xffff))
		return !differ_ip6;
	return (remote_ip4 & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) ||
	       remote_ip4 == local_ip4;
}

/* Read into values first: the compiler must not merge accesses to the context. */
#define IS_LOCAL(from, remote, local)                                                              \
	is_local(from->family, from->remote##4, from->local##4, from->remote##6[2],                \
		 (from->remote##6[0] ^ from->local##6[0]) | (from->remote##6[1] ^ from->local##6[1]) | \
			 (from->remote##6[2] ^ from->local##6[2]) |                                \
			 (from->remote##6[3] ^ from->local##6[3]))

/* Remember what we are going to change. `ctx` is what the helpers know the connection by. */
always_inline void remember(void *ctx, struct throttle_socket *socket)
{
	if (bpf_getsockopt(ctx, SOL_SOCKET, SO_MAX_PACING_RATE, &socket->original_pacing, 4))
		socket->original_pacing = UNLIMITED;
	/* Linux 6.1; before, a large one does as well: the buffer bounds the window too. */
	if (bpf_getsockopt(ctx, SOL_TCP, TCP_WINDOW_CLAMP, &socket->original_clamp, 4))
		socket->original_clamp = USUAL_CLAMP;
}

/* In packets. */
always_inline __u32 first_window(struct bpf_sock_ops *ctx, const struct throttle_config *config)
{
	__u32 clamp;

	/*
	 * The window is scaled for the largest one that there may be. Where net.ipv4.tcp_rmem allows
	 * more than usual, its unit is 1024 bytes, and none is less than a segment.
	 */
	if (config->rate_bytes_per_s <= USUAL_CLAMP_RATE &&
	    !get_option(ctx, SOL_TCP, TCP_WINDOW_CLAMP, &clamp) &&
	    (!clamp || clamp > USUAL_CLAMP)) {
		clamp = USUAL_CLAMP;
		set_option(ctx, SOL_TCP, TCP_WINDOW_CLAMP, clamp);
	}
	return first_packets(config, THROTTLE_DOWNLOAD, bpf_ktime_get_ns(), 1);
}

/* Whether a limit is to be kept in a way, which this kernel has not refused. */
always_inline __u32 does(struct throttle_config *config, struct throttle_bucket *bucket, __u32 flag,
			 __u64 now)
{
	__s64 over = (config->expires_ns - (__s64)now) >> 63; /* all bits, or none */

	return config->rate_bytes_per_s ? config->flags & ~bucket->refused & flag & ~over : 0;
}

/* A connection has another state. */
always_inline int look_for_end(struct bpf_sock_ops *ctx, __u32 slot)
{
	__u64 down = ON_STACK(ELEMENT(slot, THROTTLE_DOWNLOAD));
	struct throttle_bucket *bucket = bpf_map_lookup_elem(&CGROUP_BUCKETS, &down);
	struct throttle_socket *socket;

	if (ctx->args[1] != TCP_CLOSE || !ctx->sk || !bucket)
		return 1;
	socket = bpf_sk_storage_get(&SOCKETS, ctx->sk, 0, 0);
	if (socket && socket->slot == slot)
		await_no_longer(socket, bucket);
	return 1;
}

#ifdef ENTRIES
#include "entries.h"
#else
/* Another throttle may shape a connection that this one does not. */
#ifdef SHARED
#define LEAVE_TO_OTHERS(sk) bpf_sk_storage_delete(&SOCKETS, sk)
#else
#define LEAVE_TO_OTHERS(sk)
#endif

/*
 * The connections of an MPTCP socket are policed alone: nobody could give them back what they had,
 * since they have no descriptors. `multipath` says whether this kernel can tell (Linux 5.19).
 */
always_inline int shape_any(struct bpf_sock_ops *ctx, int multipath)
{
	void *sk = ctx->sk;
#ifdef SHARED
	/* The entry has found out that it is its throttle's. */
	struct throttle_socket *socket = sk ? bpf_sk_storage_get(&SOCKETS, sk, 0, 0) : 0;
	__u32 slot = socket ? socket->slot : 0;
#else
	struct throttle_socket *socket = 0;
	__u32 slot = 0;
#endif
	__u64 up = ON_STACK(ELEMENT(slot, THROTTLE_UPLOAD));
	__u64 down = ON_STACK(ELEMENT(slot, THROTTLE_DOWNLOAD));
	struct throttle_config *upload = bpf_map_lookup_elem(&CGROUP_CONFIGS, &up);
	struct throttle_config *download = bpf_map_lookup_elem(&CGROUP_CONFIGS, &down);
	struct throttle_bucket *upload_bucket = bpf_map_lookup_elem(&CGROUP_BUCKETS, &up);
	struct throttle_bucket *download_bucket = bpf_map_lookup_elem(&CGROUP_BUCKETS, &down);
	int starts = 0;
	__u32 paces, moves, gates;
	__u64 now = bpf_ktime_get_ns();

	HOLD_RECORD();
	if (!upload || !download || !upload_bucket || !download_bucket)
		return 1;
	paces = does(upload, upload_bucket, THROTTLE_PACE, now);
	moves = does(download, download_bucket, THROTTLE_WINDOW, now);
	gates = does(download, download_bucket, THROTTLE_GATE, now);
	switch (ctx->op) {
	case BPF_SOCK_OPS_RWND_INIT:
		if (moves && !IS_EXEMPT(upload, ctx, remote_ip))
			ctx->args[0] = first_window(ctx, download);
		return 1;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (!sk)
			return 1;
		if (IS_EXEMPT(upload, ctx, remote_ip)) {
			LEAVE_TO_OTHERS(sk);
			return 1;
		}
		if (IS_LOCAL(ctx, remote_ip, local_ip) ||
		    (multipath && bpf_skc_to_mptcp_sock(sk))) {
			leave_room(download, download_bucket);
			LEAVE_TO_OTHERS(sk);
			return 1;
		}
		socket = bpf_sk_storage_get(&SOCKETS, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (!socket)
			return 1;
		remember(ctx, socket);
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | CALLBACKS);
		starts = 1;
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		if (!sk || ctx->args[0] == BPF_WRITE_HDR_TCP_CURRENT_MSS)
			return 1;
		socket = bpf_sk_storage_get(&SOCKETS, sk, 0, 0);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		return look_for_end(ctx, slot);
	default:
		return 1;
	}
	if (!socket)
		return 1;
	if (!paces)
		restore_pacing(ctx, socket);
	else if (starts || ctx->skb_len)
		pace(ctx, socket, upload, upload_bucket, now);
	if (!moves)
		restore_clamp(ctx, socket);
	else
		move_window(ctx, socket, download, download_bucket, gates, now);
	return 1;
}

always_inline int shape(struct bpf_sock_ops *ctx)
{
	return shape_any(ctx, 0);
}

always_inline int shape_but_multipath(struct bpf_sock_ops *ctx)
{
	return shape_any(ctx, 1);
}

#define OWN_SLOT() 0
#endif

#ifndef SHARED
#include "bpf_sock.h"

/* The start of the context of setsockopt(2), as in linux/bpf.h. */
struct bpf_sockopt {
	struct bpf_sock *sk;
	void *optval;
	void *optval_end;
	int level;
	int optname;
	int optlen;
	int retval;
};

/*
 * Connections that were open before have no callbacks. User space calls setsockopt(2) on each of
 * them, with a level that nobody else knows, and as the option the bytes of the receive window;
 * this runs for those alone that are in the cgroup.
 */
SEC("cgroup/setsockopt") int pybpft_adopt(struct bpf_sockopt *ctx)
{
	__u32 slot = OWN_SLOT(), element = ELEMENT(slot, THROTTLE_UPLOAD);
	struct throttle_config *config = bpf_map_lookup_elem(&CGROUP_CONFIGS, &element);
	struct throttle_socket *socket;
	__u32 flags = 0;

	HOLD_RECORD();
	if (ctx->level != THROTTLE_ADOPT)
		return 1;
	/* By the configuration each version finds out who has left this program behind. */
	if (!ctx->sk || !config || IS_LOCAL(ctx->sk, dst_ip, src_ip) ||
	    IS_EXEMPT(config, ctx->sk, dst_ip))
		return 0;
	socket = bpf_sk_storage_get(&SOCKETS, ctx->sk, 0, 0);
	if (socket) {
		if (socket->slot != slot)
			return 0;
		ctx->optlen = -1;
		return 1;
	}
	if (get_option(ctx->sk, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags))
		return 0;
	flags |= CALLBACKS;
	socket = bpf_sk_storage_get(&SOCKETS, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!socket)
		return 0;
	remember(ctx->sk, socket);
	socket->promised = ctx->optname;
	socket->slot = slot;
	if (set_option(ctx->sk, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, flags))
		return 0;
	/* The kernel itself is not to see it. */
	ctx->optlen = -1;
	return 1;
}

/*
 * Where the kernel cannot adopt them, user space paces their uploads. This answers which they are:
 * those of the cgroup that leave the machine, and that nothing shapes yet. Needs Linux 5.3.
 */
SEC("cgroup/setsockopt") int pybpft_belongs(struct bpf_sockopt *ctx)
{
	__u32 element = ELEMENT(OWN_SLOT(), THROTTLE_UPLOAD);
	struct throttle_config *config = bpf_map_lookup_elem(&CGROUP_CONFIGS, &element);

	HOLD_RECORD();
	if (ctx->level != THROTTLE_ADOPT)
		return 1;
	if (!ctx->sk || !config || IS_LOCAL(ctx->sk, dst_ip, src_ip) ||
	    IS_EXEMPT(config, ctx->sk, dst_ip))
		return 0;
	if (bpf_sk_storage_get(&SOCKETS, ctx->sk, 0, 0))
		return 0;
	ctx->optlen = -1;
	return 1;
}
#endif
