/* Tells which file each process opens, and what came of it. */
#include "bpf.h"

struct event {
	u32 pid;
	s32 result;
	char command[16];
	char path[256];
};

struct {
	__uint(type, RINGBUF);
	__uint(max_entries, 1 << 20);
	__type(value, struct event);
} events SEC(".maps");

struct {
	__uint(type, HASH);
	__uint(max_entries, 10240);
	__type(key, u64);
	__type(value, u64);
} paths SEC(".maps");

const volatile u32 pid = 0;

SEC("tp/syscalls/sys_enter_openat")
int enter(struct syscall_enter *call)
{
	u64 thread = bpf_get_current_pid_tgid(), path = call->arguments[1];

	if (!pid || thread >> 32 == pid)
		bpf_map_update_elem(&paths, &thread, &path, 0);
	return 0;
}

SEC("tp/syscalls/sys_exit_openat")
int leave(struct syscall_exit *call)
{
	u64 thread = bpf_get_current_pid_tgid(), *path = bpf_map_lookup_elem(&paths, &thread);
	struct event *event;

	if (!path)
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (event) {
		event->pid = thread >> 32;
		event->result = call->result;
		bpf_get_current_comm(event->command, sizeof(event->command));
		bpf_probe_read_user_str(event->path, sizeof(event->path), (void *)*path);
		bpf_ringbuf_submit(event, 0);
	}
	bpf_map_delete_elem(&paths, &thread);
	return 0;
}
