/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The marks of MPTCP sockets, whose packets other sockets send. Linux 5.19. */

#include "marked.h"

/*
 * An MPTCP socket has its packets sent by others, which the kernel opens for it and nobody can
 * reach. They take its mark over with their first packet. A listener's does so with the first
 * handshake, before anything is accepted: that is marked then too, plain TCP included.
 */
always_inline __u32 *multipath_mark_of(void *sk)
{
	__u32 *mark, *theirs;
	void *mptcp;

	if (!sk)
		return 0;
	mark = bpf_sk_storage_get(&MARKS, sk, 0, 0);
	mptcp = bpf_skc_to_mptcp_sock(sk);
	if (!mptcp)
		return mark;
	theirs = bpf_sk_storage_get(&MARKS, mptcp, 0, 0);
	if (!theirs)
		return mark;
	if (!mark)
		mark = bpf_sk_storage_get(&MARKS, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (mark)
		*mark = *theirs;
	return theirs;
}
