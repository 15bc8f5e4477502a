// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Follows the processes that are limited, without a gap: those that they start, and those that
 * begin to have an expected name, are limited from their first instruction on, and an id is
 * forgotten when its last thread ends.
 *
 * Needs Linux 5.8, the kernel's types (CONFIG_DEBUG_INFO_BTF), and CAP_PERFMON.
 */
#include "throttle.h"

#define SEC(name) __attribute__((section(name), used))

#define __uint(name, value) int(*name)[value]
#define __type(name, value) value *name
#define BPF_NOEXIST 1
#define NAME_BYTES 16
#define MOST_NAMES 4096
#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_RINGBUF 27

#include "processes.h"
#include "record.h"

/* What is read of the kernel's own structures; where they have it is found when this is loaded. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
typedef struct {
	int counter;
} atomic_t;

struct signal_struct {
	atomic_t live; /* threads */
};

struct task_struct {
	int tgid;
	struct signal_struct *signal;
};
#pragma clang attribute pop

struct bpf_raw_tracepoint_args {
	__u64 args[3];
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   __u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static __u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;
static long (*bpf_get_current_comm)(void *name, __u32 size) = (void *)16;
static long (*bpf_probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)113;
static long (*bpf_ringbuf_output)(void *ring, const void *data, __u64 size,
				  __u64 flags) = (void *)130;

/* The ids of processes that have executed another program. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} EXECUTED SEC(".maps");

struct process_name {
	char text[NAME_BYTES];
};

/* What a process becomes that executes a program and then has this name. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MOST_NAMES);
	__type(key, struct process_name);
	__type(value, struct throttle_process);
} NAMES SEC(".maps");

/* Arguments: the parent's task, the child's. The parent is the current one. */
SEC("raw_tp/sched_process_fork") int pybpft_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *child = (void *)ctx->args[1];
	__u32 process = bpf_get_current_pid_tgid() >> 32;
	struct throttle_process *parent = bpf_map_lookup_elem(&PROCESSES, &process);
	struct throttle_process value;
	__u32 started;

	HOLD_RECORD();
	if (!parent || !(parent->flags & THROTTLE_FOLLOW))
		return 0;
	if (bpf_probe_read_kernel(&started, sizeof(started), &child->tgid) || started == process)
		return 0; /* a thread */
	value = *parent;
	value.flags &= ~THROTTLE_BY_NAME;
	bpf_map_update_elem(&PROCESSES, &started, &value, 0);
	return 0;
}

/* Argument: the task that ends; its thread is not counted any more. */
SEC("raw_tp/sched_process_exit") int pybpft_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	__u32 process = bpf_get_current_pid_tgid() >> 32;
	struct signal_struct *group;
	int threads;

	HOLD_RECORD();
	if (!bpf_map_lookup_elem(&PROCESSES, &process))
		return 0;
	if (bpf_probe_read_kernel(&group, sizeof(group), &task->signal) ||
	    bpf_probe_read_kernel(&threads, sizeof(threads), &group->live.counter) || threads)
		return 0;
	bpf_map_delete_elem(&PROCESSES, &process);
	return 0;
}

/* A process that is limited already stays with its throttle. */
SEC("raw_tp/sched_process_exec") int pybpft_expect(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 process = bpf_get_current_pid_tgid() >> 32;
	struct process_name name = {};
	struct throttle_process *expected, value;

	(void)ctx;
	HOLD_RECORD();
	bpf_get_current_comm(name.text, sizeof(name.text));
	expected = bpf_map_lookup_elem(&NAMES, &name);
	if (!expected)
		return 0;
	value = *expected;
	bpf_map_update_elem(&PROCESSES, &process, &value, BPF_NOEXIST);
	return 0;
}

SEC("raw_tp/sched_process_exec") int pybpft_exec(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 process = bpf_get_current_pid_tgid() >> 32;

	(void)ctx;
	HOLD_RECORD();
	bpf_ringbuf_output(&EXECUTED, &process, sizeof(process), 0);
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
