/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The map that all programs of a throttle share, by which its record is found. */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct throttle_record);
} THROTTLE SEC(".maps");

/*
 * The kernel keeps a map as long as a program refers to it, and tells its id to whoever asks the
 * program. Loading the address into a register is such a reference, and no more than that.
 */
#define HOLD(map) asm volatile("" ::"r"(&(map)))
#ifdef SHARED
#define HOLD_RECORD() /* Their entries do. */
#define PROGRAM(name) pybpfs_##name
#define SLOT_OF(skb) ((skb)->cb[0]) /* as the entry has put it there */
#else
#define HOLD_RECORD() HOLD(THROTTLE)
#define PROGRAM(name) pybpft_##name
#define SLOT_OF(skb) 0
#endif
