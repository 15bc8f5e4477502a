// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Counts the packets of each process, wherever they go, and limits nothing.
 *
 * A socket belongs to the process that has created it, and what a listener accepts to the listener's
 * at first. User space hands over the sockets that were open before, and those that have passed to
 * another process; connections that it did not meet belong to the process that has closed them.
 * Packets of no known process are counted under the number 0.
 *
 * Counted are the bytes of IP packets as the network carries them: what the kernel has combined
 * (GSO, GRO) counts with the headers of each of its segments.
 *
 * Needs Linux 5.10: socket storage by a packet's socket, and for new sockets; and CAP_PERFMON.
 *
 * With REMOTES the addresses that a process communicates with are counted as well.
 */
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;

#include "divert.h"
#include "skb.h"

#define SEC(name) __attribute__((section(name), used))
#define always_inline static inline __attribute__((always_inline))

#define __uint(name, value) int(*name)[value]
#define __type(name, value) value *name
#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_PERCPU_HASH 5
#define BPF_MAP_TYPE_LRU_HASH 9
#define BPF_MAP_TYPE_SK_STORAGE 24
#define BPF_F_NO_PREALLOC 1
#define BPF_F_CLONE (1 << 9)
#define BPF_SK_STORAGE_GET_F_CREATE 1
#define BPF_ANY 0
#define BPF_NOEXIST 1
#define BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB 5

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
#define MOST_REMOTES 65536
#define MAPPED_IP4 0xffff /* ::ffff:0:0/96 */

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
	__u32 interface; /* its index in the socket's network namespace */
};

struct traffic_remote {
	struct traffic_key key;
	__u32 address[4]; /* of IPv6; IPv4 is mapped */
};

/* One for each possible CPU. */
struct traffic_counts {
	__u64 download_packets;
	__u64 download_bytes;
	__u64 upload_packets;
	__u64 upload_bytes;
};

/*
 * Whose a socket is. Until it is known which process has accepted a connection, what the listener's
 * is charged for it is kept here as well, to be moved.
 */
struct traffic_owner {
	__u32 process;
	__u32 open; /* nonzero: it is an open question */
	struct traffic_remote charged;
	__u32 reserved;
	struct traffic_counts counts;
};

/* What a process was when it created its last socket. */
struct traffic_process {
	char name[NAME_BYTES];
	__u64 cgroup_id;
	__u64 namespace; /* the cookie of the socket's network namespace; 0: not known */
	__u32 user;
	__u32 reserved;
};

/* The start of the contexts, as in linux/bpf.h. */
struct bpf_sock;

struct bpf_sock_ops {
	__u32 op;
	__u32 others[45];
	void *sk;
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   __u64 flags) = (void *)2;
static __u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;
static __u64 (*bpf_get_current_uid_gid)(void) = (void *)15;
static long (*bpf_get_current_comm)(void *to, __u32 size) = (void *)16;
static __u64 (*bpf_get_current_cgroup_id)(void) = (void *)80;
static __u64 (*bpf_get_netns_cookie)(void *ctx) = (void *)122;
static void *(*bpf_skc_to_mptcp_sock)(void *sk) = (void *)196; /* Linux 5.19 */
static void *(*bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, __u32);
	__type(value, struct traffic_owner);
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

#ifdef REMOTES
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MOST_REMOTES);
	__type(key, struct traffic_remote);
	__type(value, struct traffic_counts);
} TRAFFIC_REMOTES SEC(".maps");
#endif

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

always_inline struct traffic_counts *counts_of(void *map, const void *key)
{
	struct traffic_counts *counts = bpf_map_lookup_elem(map, key);

	if (!counts) {
		struct traffic_counts none = {};

		bpf_map_update_elem(map, key, &none, BPF_NOEXIST);
		counts = bpf_map_lookup_elem(map, key);
	}
	return counts;
}

always_inline void add(struct traffic_counts *to, int downloads, __u64 packets, __u64 bytes)
{
	__sync_fetch_and_add(downloads ? &to->download_packets : &to->upload_packets, packets);
	__sync_fetch_and_add(downloads ? &to->download_bytes : &to->upload_bytes, bytes);
}

/* Whose a packet's socket is; one of several that an MPTCP socket has is its. */
always_inline struct traffic_owner *owner_of(void *sk, int multipath)
{
	struct traffic_owner *owner = bpf_sk_storage_get(&SOCKET_OWNERS, sk, 0, 0);
	void *mptcp;

	if (owner || !multipath)
		return owner;
	mptcp = bpf_skc_to_mptcp_sock(sk);
	return mptcp ? bpf_sk_storage_get(&SOCKET_OWNERS, mptcp, 0, 0) : 0;
}

always_inline int count(struct __sk_buff *skb, int downloads, int multipath)
{
	const __u8 *ip = (const __u8 *)(long)skb->data, *end = (const __u8 *)(long)skb->data_end;
	const __u8 *tcp, *far;
	struct traffic_owner *owner = skb->sk ? owner_of(skb->sk, multipath) : 0;
	struct traffic_key key = { owner ? owner->process : 0, TRAFFIC_INTERNET, skb->ifindex };
	struct traffic_counts *counts;
	__u32 segments = skb->gso_segs ? skb->gso_segs : 1, header, protocol, address[4] = {};
	__u64 bytes = skb->len;

	/* A diversion gives it back: it was counted when it came. */
	if (downloads && (skb->tc_index & DIVERT_TAG_MASK) == DIVERT_TAG)
		return 1;
	if (key.interface == LOOPBACK_IFINDEX)
		key.scope = TRAFFIC_LOOPBACK;
	if (ip + IPV4_HEADER_BYTES <= end && ip[0] >> 4 == 4) {
		far = ip + (downloads ? 12 : 16);
		address[2] = ntohl(MAPPED_IP4);
		address[3] = *(const __u32 *)far;
		if (!key.scope && is_local_ip4(ntohl(address[3])))
			key.scope = TRAFFIC_LOCAL;
		header = (ip[0] & 0xf) * 4;
		protocol = ip[9];
	} else if (ip + IPV6_HEADER_BYTES <= end) {
		far = ip + (downloads ? 8 : 24);
		__builtin_memcpy(address, far, sizeof(address));
		if (!key.scope && is_local_ip6(far))
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
	counts = counts_of(&TRAFFIC, &key);
	if (!counts) {
		/* There are more processes than have room. */
		key.process = 0;
		counts = counts_of(&TRAFFIC, &key);
		if (!counts)
			return PASS;
	}
	/* What is received cannot be interrupted by more of it on the same CPU; what is sent can. */
	if (downloads) {
		counts->download_packets += segments;
		counts->download_bytes += bytes;
	} else {
		add(counts, downloads, segments, bytes);
	}
#ifdef REMOTES
	struct traffic_remote remote = { .key = key };

	__builtin_memcpy(remote.address, address, sizeof(address));
	if (owner && owner->open)
		__builtin_memcpy(owner->charged.address, address, sizeof(address));
	else if ((counts = counts_of(&TRAFFIC_REMOTES, &remote)))
		add(counts, downloads, segments, bytes);
#endif
	if (owner && owner->open) {
		owner->charged.key = key;
		add(&owner->counts, downloads, segments, bytes);
	}
	return PASS;
}

SEC("cgroup_skb/ingress") int pybpft_received(struct __sk_buff *skb)
{
	return count(skb, 1, 0);
}

SEC("cgroup_skb/ingress") int pybpft_recvp(struct __sk_buff *skb)
{
	return count(skb, 1, 1);
}

SEC("cgroup_skb/egress") int pybpft_sent(struct __sk_buff *skb)
{
	return count(skb, 0, 0);
}

SEC("cgroup_skb/egress") int pybpft_sentp(struct __sk_buff *skb)
{
	return count(skb, 0, 1);
}

/* Remember what the current process is. */
always_inline void meet(__u32 process, __u64 namespace)
{
	struct traffic_process value = {
		.cgroup_id = bpf_get_current_cgroup_id(),
		.namespace = namespace,
		.user = bpf_get_current_uid_gid(),
	};

	bpf_get_current_comm(value.name, sizeof(value.name));
	bpf_map_update_elem(&TRAFFIC_NAMES, &process, &value, BPF_ANY);
}

SEC("cgroup/sock_create") int pybpft_owner(struct bpf_sock *ctx)
{
	struct traffic_owner owner = { .process = bpf_get_current_pid_tgid() >> 32 };

	bpf_sk_storage_get(&SOCKET_OWNERS, ctx, &owner, BPF_SK_STORAGE_GET_F_CREATE);
	meet(owner.process, bpf_get_netns_cookie(ctx));
	return 1;
}

/* A connection has come to a listener, which the storage was copied from. */
always_inline int came(struct bpf_sock_ops *ctx, int multipath)
{
	struct traffic_owner new = {}, *owner;
	void *sk = ctx->sk;

	if (ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB || !sk)
		return 1;
	owner = owner_of(sk, multipath);
	if (!owner)
		owner = bpf_sk_storage_get(&SOCKET_OWNERS, sk, &new,
					   BPF_SK_STORAGE_GET_F_CREATE);
	if (owner)
		owner->open = 1;
	return 1;
}

SEC("sockops") int pybpft_came(struct bpf_sock_ops *ctx)
{
	return came(ctx, 0);
}

SEC("sockops") int pybpft_camep(struct bpf_sock_ops *ctx)
{
	return came(ctx, 1);
}

always_inline void add_all(struct traffic_counts *to, const struct traffic_counts *counts, int sign)
{
	add(to, 1, sign * counts->download_packets, sign * counts->download_bytes);
	add(to, 0, sign * counts->upload_packets, sign * counts->upload_bytes);
}

/* The last process that has a socket open closes it, or ends. */
SEC("cgroup/sock_release") int pybpft_closed(struct bpf_sock *ctx)
{
	struct traffic_owner *owner = bpf_sk_storage_get(&SOCKET_OWNERS, ctx, 0, 0);
	__u32 process = bpf_get_current_pid_tgid() >> 32;
	struct traffic_counts *from, *to;
	struct traffic_remote charged;

	if (!owner || !owner->open)
		return 1;
	if (owner->process != process)
		meet(process, bpf_get_netns_cookie(ctx));
	owner->process = process;
	owner->open = 0;
	charged = owner->charged;
	from = bpf_map_lookup_elem(&TRAFFIC, &charged.key);
	charged.key.process = process;
	to = counts_of(&TRAFFIC, &charged.key);
	if (!from || !to)
		return 1;
	add_all(from, &owner->counts, -1);
	add_all(to, &owner->counts, 1);
#ifdef REMOTES
	to = counts_of(&TRAFFIC_REMOTES, &charged);
	if (to)
		add_all(to, &owner->counts, 1);
#endif
	return 1;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
