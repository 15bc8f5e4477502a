/* Counts how long requests to block devices take, in powers of two of a microsecond. */
#include "bpf.h"

#define BUCKETS 27

/* The beginning of both; source: /sys/kernel/tracing/events/block. */
struct request {
	u64 common;
	u32 device;
	u64 sector;
};

struct key {
	u64 sector, device;
};

struct {
	__uint(type, HASH);
	__uint(max_entries, 10240);
	__type(key, struct key);
	__type(value, u64);
} issued SEC(".maps");

struct {
	__uint(type, PERCPU_ARRAY);
	__uint(max_entries, BUCKETS);
	__type(key, u32);
	__type(value, u64);
} buckets SEC(".maps");

SEC("tp/block/block_rq_issue")
int issue(struct request *request)
{
	struct key key = { request->sector, request->device };
	u64 now = bpf_ktime_get_ns();

	bpf_map_update_elem(&issued, &key, &now, 0);
	return 0;
}

SEC("tp/block/block_rq_complete")
int complete(struct request *request)
{
	struct key key = { request->sector, request->device };
	u64 *begin = bpf_map_lookup_elem(&issued, &key), took_us, *count;
	u32 bucket = 0;

	if (!begin)
		return 0;
	took_us = (bpf_ktime_get_ns() - *begin) / 1000;
#pragma unroll
	for (int bit = 1; bit < BUCKETS; bit++)
		bucket += took_us >= 1ull << bit;
	count = bpf_map_lookup_elem(&buckets, &bucket);
	if (count)
		(*count)++;
	bpf_map_delete_elem(&issued, &key);
	return 0;
}
