/* Tells of each TCP connection that ends: whose, how long, how much. */
#include "bpf.h"

enum { SYN_SENT = 2, SYN_RECV = 3, CLOSE = 7, TCP = 6 };

/* Source: /sys/kernel/tracing/events/sock/inet_sock_set_state. */
struct set_state {
	u64 common;
	const void *socket;
	s32 old, new;
	u16 source_port, target_port, family, protocol;
	u8 source[4], target[4], source6[16], target6[16];
};

struct tcp_sock {
	u64 bytes_received, bytes_acked;
} CORE;

struct begin {
	u64 at_ns;
	u32 pid;
	char command[16];
};

struct event {
	u64 duration_ns, received, sent;
	u32 pid;
	u16 source_port, target_port;
	u8 source[16], target[16];
	char command[16];
};

struct {
	__uint(type, RINGBUF);
	__uint(max_entries, 1 << 20);
	__type(value, struct event);
} events SEC(".maps");

struct {
	__uint(type, HASH);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct begin);
} begins SEC(".maps");

SEC("tp/sock/inet_sock_set_state")
int set_state(struct set_state *ctx)
{
	const struct tcp_sock *socket = ctx->socket;
	struct begin first = {}, *begin;
	u64 key = (u64)socket;
	struct event *event;

	if (ctx->protocol != TCP)
		return 0;
	if (ctx->new == SYN_SENT || ctx->new == SYN_RECV) {
		first.at_ns = bpf_ktime_get_ns();
		if (ctx->new == SYN_SENT) { /* in the process that connects */
			first.pid = bpf_get_current_pid_tgid() >> 32;
			bpf_get_current_comm(first.command, sizeof(first.command));
		}
		bpf_map_update_elem(&begins, &key, &first, 0);
		return 0;
	}
	begin = bpf_map_lookup_elem(&begins, &key);
	if (!begin || ctx->new != CLOSE)
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (event) {
		event->duration_ns = bpf_ktime_get_ns() - begin->at_ns;
		event->pid = begin->pid;
		event->source_port = ctx->source_port;
		event->target_port = ctx->target_port;
		__builtin_memcpy(event->source, ctx->source6, 16);
		__builtin_memcpy(event->target, ctx->target6, 16);
		__builtin_memcpy(event->command, begin->command, 16);
		event->received = event->sent = 0;
		bpf_probe_read_kernel(&event->received, 8, &socket->bytes_received);
		bpf_probe_read_kernel(&event->sent, 8, &socket->bytes_acked);
		bpf_ringbuf_submit(event, 0);
	}
	bpf_map_delete_elem(&begins, &key);
	return 0;
}
