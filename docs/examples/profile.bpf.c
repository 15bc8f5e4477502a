/* Counts where processes are found running, by their stacks. */
#include "bpf.h"

struct key {
	u32 pid;
	s32 user, kernel;
	char command[16];
};

struct {
	__uint(type, HASH);
	__uint(max_entries, 10240);
	__type(key, struct key);
	__type(value, u64);
} counts SEC(".maps");

struct {
	__uint(type, STACK_TRACE);
	__uint(max_entries, 16384);
	__uint(key_size, 4);
	__uint(value_size, 8 * 127);
} stacks SEC(".maps");

const volatile u32 pid = 0;

SEC("perf_event")
int sample(void *ctx)
{
	struct key key = { .pid = bpf_get_current_pid_tgid() >> 32 };
	u64 one = 1, *count;

	if (!key.pid || (pid && key.pid != pid)) /* 0 is who idles */
		return 0;
	bpf_get_current_comm(key.command, sizeof(key.command));
	key.user = bpf_get_stackid(ctx, &stacks, USER_STACK);
	key.kernel = bpf_get_stackid(ctx, &stacks, 0);
	count = bpf_map_lookup_elem(&counts, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&counts, &key, &one, 0);
	return 0;
}
