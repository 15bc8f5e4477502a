// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Counts the packets of each process, wherever they go, and limits nothing.
 *
 * A socket belongs to the process that has created it, and what a listener accepts to the
 * listener's. User space hands over the sockets that were open before, and those that have passed
 * to another process. Packets of no known process are counted under the number 0.
 *
 * Counted are the bytes of IP packets as the network carries them: what the kernel has combined
 * (GSO, GRO) counts with the headers of each of its segments.
 *
 * Needs Linux 5.10: socket storage by a packet's socket, and for new sockets; and CAP_PERFMON.
 */
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;

#define SEC(name) __attribute__((section(name), used))
#define always_inline static inline __attribute__((always_inline))

#define __uint(name, value) int(*name)[value]
#define __type(name, value) value *name
#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_PERCPU_HASH 5
#define BPF_MAP_TYPE_SK_STORAGE 24
#define BPF_F_NO_PREALLOC 1
#define BPF_F_CLONE (1 << 9)
#define BPF_SK_STORAGE_GET_F_CREATE 1
#define BPF_ANY 0
#define BPF_NOEXIST 1

#define PASS 1
#define LOOPBACK_IFINDEX 1 /* in each network namespace */
#define IPV4_HEADER_BYTES 20
#define IPV6_HEADER_BYTES 40
#define UDP_HEADER_BYTES 8
#define TCP_DATA_OFFSET 12
#define IPPROTO_TCP 6
#define NAME_BYTES 16
#define MOST_PROCESSES 65536
#define MOST_COUNTED 131072

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ntohl(number) __builtin_bswap32(number)
#else
#define ntohl(number) (number)
#endif

/* How far the other end is. */
enum traffic_scope {
	TRAFFIC_INTERNET = 0,
	TRAFFIC_LOCAL = 1,    /* a private, link-local or multicast address */
	TRAFFIC_LOOPBACK = 2, /* this machine */
};

struct traffic_key {
	__u32 process; /* its id (tgid) in the first pid namespace; 0: not known */
	enum traffic_scope scope;
};

/* One for each possible CPU. */
struct traffic_counts {
	__u64 download_packets;
	__u64 download_bytes;
	__u64 upload_packets;
	__u64 upload_bytes;
};

/* What a process was when it created its last socket. */
struct traffic_process {
	char name[NAME_BYTES];
	__u64 cgroup_id;
	__u32 user;
	__u32 reserved;
};

/* The start of the contexts, as in linux/bpf.h. */
struct bpf_sock;

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	void *flow_keys;
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	void *sk;
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   __u64 flags) = (void *)2;
static __u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;
static __u64 (*bpf_get_current_uid_gid)(void) = (void *)15;
static long (*bpf_get_current_comm)(void *to, __u32 size) = (void *)16;
static __u64 (*bpf_get_current_cgroup_id)(void) = (void *)80;
static void *(*bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, __u32);
	__type(value, __u32); /* the process */
} SOCKET_OWNERS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MOST_PROCESSES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct traffic_process);
} TRAFFIC_NAMES SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MOST_COUNTED);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct traffic_key);
	__type(value, struct traffic_counts);
} TRAFFIC SEC(".maps");

always_inline int is_local_ip4(__u32 address)
{
	return address >> 24 == 10 || address >> 20 == 0xac1 || address >> 16 == 0xc0a8 ||
	       address >> 16 == 0xa9fe || address >> 22 == 0x191 || address >> 28 >= 14;
}

always_inline int is_local_ip6(const __u8 *address)
{
	return (address[0] & 0xfe) == 0xfc || address[0] == 0xff ||
	       (address[0] == 0xfe && address[1] & 0x80);
}

always_inline int count(struct __sk_buff *skb, int downloads)
{
	const __u8 *ip = (const __u8 *)(long)skb->data, *end = (const __u8 *)(long)skb->data_end;
	const __u8 *tcp;
	__u32 *owner = skb->sk ? bpf_sk_storage_get(&SOCKET_OWNERS, skb->sk, 0, 0) : 0;
	struct traffic_key key = { owner ? *owner : 0, TRAFFIC_INTERNET };
	struct traffic_counts *counts, none = {};
	__u32 segments = skb->gso_segs ? skb->gso_segs : 1, header, protocol;
	__u64 bytes = skb->len;

	if (skb->ifindex == LOOPBACK_IFINDEX)
		key.scope = TRAFFIC_LOOPBACK;
	if (ip + IPV4_HEADER_BYTES <= end && ip[0] >> 4 == 4) {
		if (!key.scope &&
		    is_local_ip4(ntohl(*(const __u32 *)(ip + (downloads ? 12 : 16)))))
			key.scope = TRAFFIC_LOCAL;
		header = (ip[0] & 0xf) * 4;
		protocol = ip[9];
	} else if (ip + IPV6_HEADER_BYTES <= end) {
		if (!key.scope && is_local_ip6(ip + (downloads ? 8 : 24)))
			key.scope = TRAFFIC_LOCAL;
		header = IPV6_HEADER_BYTES;
		protocol = ip[6];
	} else {
		header = segments = 1;
		protocol = 0;
	}
	if (segments > 1) {
		if (protocol != IPPROTO_TCP)
			header += UDP_HEADER_BYTES;
		else if ((tcp = ip + (header & 0x7c)) + TCP_DATA_OFFSET + 1 <= end)
			header += (tcp[TCP_DATA_OFFSET] >> 4) * 4;
		bytes += (__u64)(segments - 1) * header;
	}
	counts = bpf_map_lookup_elem(&TRAFFIC, &key);
	if (!counts) {
		bpf_map_update_elem(&TRAFFIC, &key, &none, BPF_NOEXIST);
		counts = bpf_map_lookup_elem(&TRAFFIC, &key);
		if (!counts)
			return PASS;
	}
	/* What is received cannot be interrupted by more of it on the same CPU; what is sent can. */
	if (downloads) {
		counts->download_packets += segments;
		counts->download_bytes += bytes;
	} else {
		__sync_fetch_and_add(&counts->upload_packets, segments);
		__sync_fetch_and_add(&counts->upload_bytes, bytes);
	}
	return PASS;
}

SEC("cgroup_skb/ingress") int pybpft_received(struct __sk_buff *skb)
{
	return count(skb, 1);
}

SEC("cgroup_skb/egress") int pybpft_sent(struct __sk_buff *skb)
{
	return count(skb, 0);
}

SEC("cgroup/sock_create") int pybpft_owner(struct bpf_sock *ctx)
{
	__u32 process = bpf_get_current_pid_tgid() >> 32;
	struct traffic_process value = {
		.cgroup_id = bpf_get_current_cgroup_id(),
		.user = bpf_get_current_uid_gid(),
	};

	bpf_get_current_comm(value.name, sizeof(value.name));
	bpf_sk_storage_get(&SOCKET_OWNERS, ctx, &process, BPF_SK_STORAGE_GET_F_CREATE);
	bpf_map_update_elem(&TRAFFIC_NAMES, &process, &value, BPF_ANY);
	return 1;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
