/* Counts packets and bytes by protocol, as early as the kernel sees them. */
#include "bpf.h"

struct xdp_md {
	u32 data, data_end;
};

struct counter {
	u64 packets, bytes;
};

struct {
	__uint(type, PERCPU_ARRAY);
	__uint(max_entries, 256);
	__type(key, u32);
	__type(value, struct counter);
} protocols SEC(".maps");

enum { PASS = 2, ETHERNET = 14, OTHER = 255 };

SEC("xdp")
int count(struct xdp_md *ctx)
{
	u8 *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct counter *counter;
	u32 protocol = OTHER;

	if (data + ETHERNET + 20 <= end) {
		if (data[12] == 0x08 && data[13] == 0x00)
			protocol = data[ETHERNET + 9];
		else if (data[12] == 0x86 && data[13] == 0xdd)
			protocol = data[ETHERNET + 6];
	}
	counter = bpf_map_lookup_elem(&protocols, &protocol);
	if (counter) {
		counter->packets++;
		counter->bytes += end - data;
	}
	return PASS;
}
