/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The records that the kernel programs share with Python.
 *
 * pybpfthrottle/backends/records.py declares the same structures for ctypes;
 * a test compares each size and offset with the object's BTF.
 */
#ifndef THROTTLE_H
#define THROTTLE_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef long long __s64;

/* The key into each map. */
enum throttle_direction {
	THROTTLE_DOWNLOAD = 0, /* ingress */
	THROTTLE_UPLOAD = 1,   /* egress */
	THROTTLE_DIRECTIONS = 2,
};

enum throttle_flags {
	THROTTLE_LOOPBACK = 1, /* limit the loopback device too */
	THROTTLE_PACE = 2,     /* uploads: TCP sends at the rate */
	THROTTLE_WINDOW = 4,   /* downloads: TCP's receive window moves at the rate */
};

#define THROTTLE_MAGIC 0x54425059 /* "YPBT" */
#define THROTTLE_VERSION 1

/*
 * Written by user space, read by the programs.
 *
 * The owner and the rate never move, whatever the version: a later release knows by them what an
 * earlier one has left behind after a crash, and can disarm it.
 */
struct throttle_config {
	__u32 magic;
	__u32 version;
	__u32 owner_pid;
	__u32 owner_pid_namespace; /* the inode of /proc/self/ns/pid */
	__u64 owner_start_ticks;   /* field 22 of /proc/PID/stat: a pid may be used again */
	__u64 rate_bytes_per_s;    /* 0: unlimited */
	__u64 inverse_rate;     /* (10^9 << INVERSE_RATE_SHIFT) / rate_bytes_per_s */
	__u64 credit_ns;        /* how far the bucket may lag behind the clock: the burst */
	__u64 debt_ns;          /* how far it may run ahead before packets are dropped */
	__u64 small_ns;         /* so much further for packets billed below SMALL_PACKET_BYTES */
	__u32 flags;            /* enum throttle_flags */
	__u32 reserved;
};

/* Written by the programs. */
struct throttle_bucket {
	__u64 even_at_ns; /* CLOCK_MONOTONIC time at which nothing is owed; 0: not used yet */
	__u64 slack_ns;   /* what may be owed beyond debt_ns, for the round trips that were seen */
};

/*
 * Written by the programs: how many connections share a limit. They are counted over epochs; the
 * last one that is over tells, or this one where it has more already.
 */
struct throttle_flows {
	__u64 epoch;
	__u32 now;
	__u32 before;
	__u32 begun; /* connections that began in this epoch */
	__u32 reserved;
};

/* What a TCP connection has moved in a direction. */
struct throttle_share {
	__u64 bytes;       /* until now */
	__u64 epoch;       /* the last in which it moved something, */
	__u64 epoch_bytes; /* and what it had moved when that began */
	__u64 counted;     /* the epoch in which it was last counted as one that shares the limit */
};

/* Of each TCP connection that is shaped. */
struct throttle_socket {
	struct throttle_share share[THROTTLE_DIRECTIONS];
	__u32 pacing;          /* bytes a second, as set by us; 0: not set */
	__u32 clamp;           /* bytes, as set by us; 0: not set */
	__u32 original_pacing; /* what they were before */
	__u32 original_clamp;
	__u32 stop; /* how much of a stop is due, in 65536ths */
	__u32 promised; /* bytes of a window from before the limit that are still to come */
};

/* Of each process whose new sockets are marked, by its id (tgid) in the first pid namespace. */
struct throttle_process {
	__u32 follow; /* the processes that it starts are taken in too */
};

/* setsockopt(2) with this level is about a connection that was open before the limit. */
#define THROTTLE_ADOPT 0x54425059

/* One for each possible CPU. Bytes are billed bytes: TCP payload, or the IP length of all else. */
struct throttle_stats {
	__u64 program_calls;
	__u64 packets_total; /* those that the limit is for, the dropped ones included */
	__u64 bytes_total;
	__u64 packets_dropped;
	__u64 bytes_dropped;
};

#endif
