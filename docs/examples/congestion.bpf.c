/* A congestion control: Reno, but a loss leaves a share of the window that Python chooses. */
#include "bpf.h"

struct sock;

struct tcp_sock {
	u32 snd_cwnd, snd_cwnd_cnt, snd_ssthresh, prior_cwnd;
} CORE;

struct tcp_congestion_ops {
	char name[16];
	u32 (*ssthresh)(struct sock *sk);
	u32 (*undo_cwnd)(struct sock *sk);
	void (*cong_avoid)(struct sock *sk, u32 ack, u32 acked);
	void (*init)(struct sock *sk);
};

const volatile u32 percent = 70; /* what a loss leaves of the window */

u64 connections, losses, acknowledged;

SEC("struct_ops")
void begin(u64 *arguments)
{
	__sync_fetch_and_add(&connections, 1);
}

SEC("struct_ops")
int after_loss(u64 *arguments)
{
	struct tcp_sock *tp = (void *)arguments[0];
	u32 window = tp->snd_cwnd * percent / 100;

	__sync_fetch_and_add(&losses, 1);
	return window < 2 ? 2 : window;
}

SEC("struct_ops")
int undo(u64 *arguments)
{
	struct tcp_sock *tp = (void *)arguments[0];

	return tp->snd_cwnd > tp->prior_cwnd ? tp->snd_cwnd : tp->prior_cwnd;
}

/* A segment more for each that was acknowledged in slow start, and for each window later. */
SEC("struct_ops")
void grow(u64 *arguments)
{
	struct tcp_sock *tp = (void *)arguments[0];
	u32 acked = arguments[2], window = tp->snd_cwnd;

	__sync_fetch_and_add(&acknowledged, acked);
	if (window < tp->snd_ssthresh) {
		tp->snd_cwnd = window + acked;
		return;
	}
	tp->snd_cwnd_cnt += acked;
	if (tp->snd_cwnd_cnt >= window) {
		tp->snd_cwnd_cnt = 0;
		tp->snd_cwnd = window + 1;
	}
}

SEC(".struct_ops.link")
struct tcp_congestion_ops control = {
	.name = "pybpf_example",
	.init = (void *)begin,
	.ssthresh = (void *)after_loss,
	.undo_cwnd = (void *)undo,
	.cong_avoid = (void *)grow,
};
