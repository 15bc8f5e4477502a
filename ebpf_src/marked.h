/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The marks of the sockets that are meant, whatever cgroup they are of. Linux 5.10. */

#define BPF_F_CLONE (1 << 9)

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, __u32);
	__type(value, __u32);
} MARKS SEC(".maps");

#define IS_MARKED(sk) ((sk) && bpf_sk_storage_get(&MARKS, sk, 0, 0))
