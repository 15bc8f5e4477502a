/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The marks of the sockets that are meant, whatever cgroup they are of. Linux 5.10. */

#define BPF_F_CLONE (1 << 9)

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, __u32);
	__type(value, __u32);
} MARKS SEC(".maps");

/*
 * A mark has the slot of the throttle that limits its socket: 0 where the throttle has all maps for
 * itself. Where throttles share a bank, they may share the marks too; then one set of programs at the
 * root of all cgroups serves them all, and enters the shared programs for the slot that it finds.
 * A socket is marked for one slot at most; the mark of a throttle that has ended limits nothing.
 */
always_inline __u32 *mark_of(void *sk)
{
	return sk ? bpf_sk_storage_get(&MARKS, sk, 0, 0) : 0;
}
