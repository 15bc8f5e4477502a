/* Tells which programs are started, and with which arguments. */
#include "bpf.h"

#define ARGUMENTS 8
#define LENGTH 64

struct event {
	u32 pid;
	s32 result;
	char command[16];
	char arguments[ARGUMENTS][LENGTH];
};

struct {
	__uint(type, PERF_EVENT_ARRAY);
	__uint(key_size, 4);
	__uint(value_size, 4);
} events SEC(".maps");

struct {
	__uint(type, HASH);
	__uint(max_entries, 1024);
	__type(key, u64);
	__type(value, struct event);
} starts SEC(".maps");

/* What an event begins as: the stack has no room for it. */
struct event blank;

SEC("tp/syscalls/sys_enter_execve")
int enter(struct syscall_enter *call)
{
	u64 thread = bpf_get_current_pid_tgid();
	const char **arguments = (const char **)call->arguments[1], *argument;
	struct event *event;

	bpf_map_update_elem(&starts, &thread, &blank, 0);
	event = bpf_map_lookup_elem(&starts, &thread);
	if (!event)
		return 0;
	event->pid = thread >> 32;
#pragma unroll
	for (int number = 0; number < ARGUMENTS; number++) {
		argument = (void *)0;
		bpf_probe_read_user(&argument, sizeof(argument), &arguments[number]);
		if (!argument)
			break;
		bpf_probe_read_user_str(event->arguments[number], LENGTH, argument);
	}
	return 0;
}

SEC("tp/syscalls/sys_exit_execve")
int leave(struct syscall_exit *call)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct event *event = bpf_map_lookup_elem(&starts, &thread);

	if (!event)
		return 0;
	event->result = call->result;
	bpf_get_current_comm(event->command, sizeof(event->command));
	bpf_perf_event_output(call, &events, CURRENT_CPU, event, sizeof(*event));
	bpf_map_delete_elem(&starts, &thread);
	return 0;
}
