/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What the programs for bad networks share with Python: pybpfthrottle/conditions/records.py declares
 * the same structures and enums, and a test compares them.
 */
#ifndef CONDITIONS_H
#define CONDITIONS_H

enum conditions_flags {
	CONDITIONS_LOOPBACK = 1, /* the loopback device too */
	CONDITIONS_NO_SYN = 2,   /* uploads: the packets that open TCP connections are dropped */
	CONDITIONS_REFUSE = 4,   /* connect(2) fails with EPERM */
	CONDITIONS_DNS_LOST = 8, /* downloads: no answer from port 53 arrives, */
	CONDITIONS_DNS_SLOW = 16, /* or only each second one to the same question */
};

/* Chances are in 2^32ths. */
enum conditions_scale {
	CONDITIONS_SHIFT = 32,
};

/* Nothing has this type; the BTF of each object has the enums by it. */
union conditions_constants {
	enum conditions_flags flags;
	enum conditions_scale scale;
};

/* Of each direction; written by user space. */
struct conditions_rule {
	__u64 seed;
	__u64 enter; /* the chance that a packet is lost after one that was not */
	__u64 leave; /* the chance that one is not after one that was */
	__u64 nth;   /* each n-th is lost; 0: they are by chance */
	__u64 begin_ns;  /* CLOCK_MONOTONIC time at which the first period began */
	__u64 period_ns; /* 0: there is no outage */
	__u64 up_ns;     /* of each period nothing passes after this time */
	__u32 flags;     /* enum conditions_flags */
	__u32 reserved;
	union conditions_constants constants[0]; /* takes no room */
};

/* Of each direction; written by the programs. Packets are counted as large as on the wire. */
struct conditions_counts {
	__u64 seen;
	__u64 lost;      /* by chance, in bursts, or as each n-th */
	__u64 outage;    /* while nothing passed */
	__u64 blocked;   /* connections that were refused, and packets that would have opened one */
	__u64 unanswered; /* answers from port 53 that were dropped */
	__u64 number;    /* how many a decision was made on */
	__u64 owed;      /* what each n-th loses, in parts of a packet */
	__u32 burst;     /* whether the last one was lost */
	__u32 reserved;
};

#endif
