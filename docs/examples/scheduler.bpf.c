/* A scheduler (sched_ext): one queue for all CPUs, first come, first served, by time slices. */
#include "bpf.h"

struct task_struct {
	s32 pid;
} CORE;

/* The members that it sets; the kernel's struct has more, which keep their defaults. */
struct sched_ext_ops {
	s32 (*select_cpu)(struct task_struct *task, s32 previous, u64 flags);
	void (*enqueue)(struct task_struct *task, u64 flags);
	void (*dispatch)(s32 cpu, struct task_struct *previous);
	s32 (*init)(void);
	u32 timeout_ms;
	char name[128];
};

/* Functions of the kernel; 6.13 has renamed two of them. */
#define KFUNC extern __attribute__((section(".ksyms")))
#define WEAK __attribute__((weak))
KFUNC s32 scx_bpf_create_dsq(u64 id, s32 node);
KFUNC void scx_bpf_dsq_insert(struct task_struct *task, u64 id, u64 slice, u64 flags) WEAK;
KFUNC void scx_bpf_dispatch(struct task_struct *task, u64 id, u64 slice, u64 flags) WEAK;
KFUNC _Bool scx_bpf_dsq_move_to_local(u64 id) WEAK;
KFUNC _Bool scx_bpf_consume(u64 id) WEAK;

enum { QUEUE = 1 };

const volatile u64 slice_ns = 5000000; /* how long a task runs before the next one's turn */

u64 queued;

SEC("struct_ops.s")
int begin(u64 *arguments)
{
	return scx_bpf_create_dsq(QUEUE, -1);
}

/* No look for an idle CPU: each takes from the queue as it gets free. */
SEC("struct_ops")
int stay(u64 *arguments)
{
	return arguments[1];
}

SEC("struct_ops")
void enqueue(u64 *arguments)
{
	struct task_struct *task = (void *)arguments[0];

	__sync_fetch_and_add(&queued, 1);
	if (scx_bpf_dsq_insert)
		scx_bpf_dsq_insert(task, QUEUE, slice_ns, arguments[1]);
	else
		scx_bpf_dispatch(task, QUEUE, slice_ns, arguments[1]);
}

SEC("struct_ops")
void dispatch(u64 *arguments)
{
	if (scx_bpf_dsq_move_to_local)
		scx_bpf_dsq_move_to_local(QUEUE);
	else
		scx_bpf_consume(QUEUE);
}

SEC(".struct_ops.link")
struct sched_ext_ops scheduler = {
	.select_cpu = (void *)stay,
	.enqueue = (void *)enqueue,
	.dispatch = (void *)dispatch,
	.init = (void *)begin,
	.timeout_ms = 5000,
	.name = "pybpf_example",
};
