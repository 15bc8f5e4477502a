/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The records and constants that the kernel programs share with Python.
 *
 * pybpfthrottle/backends/ebpf/records.py declares the same structures and enums;
 * a test compares each of them with the BTF of each object, in both directions.
 *
 * Each record has one writer: user space, or the programs. But user space replaces the throttle_socket
 * of a connection that it shapes itself. What a program has written meanwhile is found out again.
 */
#ifndef THROTTLE_H
#define THROTTLE_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef int __s32;
typedef long long __s64;

/* With its slot, a throttle's key into each map. */
enum throttle_direction {
	THROTTLE_DOWNLOAD = 0, /* ingress */
	THROTTLE_UPLOAD = 1,   /* egress */
};
#define THROTTLE_DIRECTIONS 2
/*
 * The slot tells apart throttles that share maps, from 1 on; 0 is that of a throttle with maps of its
 * own. Where they are shared, slot 0 limits nothing.
 */
#define ELEMENT(slot, direction) ((slot) * THROTTLE_DIRECTIONS + (direction))

enum throttle_flags {
	THROTTLE_LOOPBACK = 1, /* limit the loopback device too */
	THROTTLE_PACE = 2,     /* uploads: TCP sends at the rate */
	THROTTLE_WINDOW = 4,   /* downloads: TCP's receive window moves at the rate */
	THROTTLE_GATE = 8,     /* downloads: the gate's keeper opens the window, where it can */
	THROTTLE_NETWORKS = 16, /* the address of the other end decides whether to limit */
	THROTTLE_LEND = 32,    /* downloads: what comes before their queue may be owed */
};

/* How a record begins. Version 1 had a shorter configuration, and no struct throttle_record. */
enum throttle_format {
	THROTTLE_MAGIC = 0x54425059, /* "YPBT" */
	THROTTLE_VERSION = 2,
};

/* setsockopt(2) with this level is about a connection that was open before the limit. */
enum throttle_level {
	THROTTLE_ADOPT = 0x54425059,
};

enum throttle_shift {
	INVERSE_RATE_SHIFT = 20,
	EPOCH_SHIFT = 30, /* of nanoseconds: 1.07 s */
};

/* What connections may owe beyond debt_ns. */
enum throttle_slack {
	PACING_SLACK_NS = 300 * 1000 * 1000,
	POLICE_SLACK_NS = 180 * 1000 * 1000, /* up to the policer's own burst */
};

enum throttle_gate_bounds {
	GATE_NAMESPACES = 8,    /* network namespaces that a keeper serves for one throttle */
	GATE_UNGATED = 64,      /* connections that are left to the kernel, by their cookie */
	GATE_PACKET_BYTES = 100, /* the headers of an acknowledgement */
	GATE_RING_BYTES = 1 << 18,
	GATE_STALE_NS = 60 * 1000 * 1000, /* what waits longer waits for nobody */
	GATE_WAKE_SHIFT = 20, /* of nanoseconds: while the keeper looks it is woken up once in 1 ms */
};

/* Whether the keeper can send for a connection. */
enum throttle_gate_state {
	GATE_UNKNOWN = 0,
	GATE_READY = 1,
	GATE_NEVER = 2,
	GATE_ASKED = 3, /* not yet: the keeper has been told of its network namespace */
};

/* The law of pacing, by which user space paces what the kernel does not adopt. */
enum throttle_pacing {
	PACING_TARGET_NS = 60 * 1000 * 1000,
	PACING_EXTRA_SHIFT = 3, /* an 8th more than the rate for a credit as large as the target, */
	PACING_LEAST_SHIFT = 2, /* and never less than a quarter of a fair share */
	PACING_STEP_SHIFT = 6,  /* a change by less than a 64th is none */
};

/* The window that the kernel advertises by itself where the gate's keeper opens it, and its price. */
enum throttle_gate_window {
	GATE_WINDOW_US = 8000, /* beyond two round trips */
	MOST_GATE_WAY_US = 200000,
	LEAST_GATE_BYTES = 256, /* beyond two segments */
	GATE_SLACK_NS = 330 * 1000 * 1000,
};

/* What SO_MAX_PACING_RATE has where nothing is paced. */
enum throttle_pacing_rate {
	UNLIMITED = 0xffffffff,
};

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
	__u64 debt_ns;          /* how far it may run ahead before packets are dropped; < 0: blocked */
	__u64 small_ns;         /* so much further for packets billed below SMALL_PACKET_BYTES */
	__u32 flags;            /* enum throttle_flags */
	__u32 slot;
	__u64 slack_ns; /* how much further for connections that nothing else slows down */
	__s64 expires_ns; /* CLOCK_MONOTONIC time after which all packets pass; the largest: never */
};

/* The key of a trie: addresses with the same first bits, IPv4 ones as IPv6 has them mapped. */
struct throttle_network {
	__u32 bits;
	__u32 address[4]; /* in network byte order */
};

/* Written by the programs. */
struct throttle_bucket {
	__u64 even_at_ns; /* CLOCK_MONOTONIC time at which nothing is owed; 0: not used yet */
	__u64 slack_ns;   /* what may be owed beyond debt_ns, for the round trips that were seen */
	__u64 inverse_rate; /* the one that what is owed was charged at; 0: not charged yet */
	__u32 refused;      /* enum throttle_flags: what this kernel has refused to do */
	__s32 awaited;      /* bytes of the first windows of connections on which nothing has come yet */
	__u64 credit_ns; /* how far it may lag behind the clock instead, for a slow start far away */
	__u64 early_at_ns;   /* when the share of packets to drop early was found, */
	__u32 early_owed;    /* and the least that was owed before, in 1024 ns; */
	__u32 early_least;   /* the least since then */
	__u32 early_root;    /* its root, in 65536ths */
	__u32 early_sum;     /* how much of a packet is due to be dropped, in 65536ths */
	__u64 half_at_ns;    /* even_at_ns of what is not TCP alone, at half of the limit */
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
	__u32 moved; /* when a download last moved more than a small message, in 2^20 ns */
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
	__u32 segment;  /* the most bytes in one of its segments, as far as it is known */
	__u32 first;    /* the packets of its first window */
	__u32 gate;     /* enum throttle_gate_state */
	__u32 gated;    /* whether its acknowledgements go by way of the keeper */
	__u32 window_scale;
	__u32 edge_known;
	__u32 edge; /* the sequence number up to which its sender may send, as told by the kernel */
	__u32 network; /* the inode of its network namespace */
	__u32 room;    /* the window in bytes that its buffer was made large enough for */
	__u32 way_us;  /* its round trip, as measured by us; 0: not yet */
	__u32 slot;    /* of the throttle that shapes it */
	__u32 awaited; /* bytes of its first window, until any have come */
	__u64 opened;  /* the number of the byte up to which its window was opened by us, */
	__u64 answer;  /* that of one that only comes once the window opened at */
	__u64 asked_ns; /* this time is known to the sender; 0: nothing is measured */
};

/*
 * The gate of one throttle. Written by its keeper, but for `id` and the last five. `oldest_ns` is since
 * when an acknowledgement waits for the keeper, or the keeper looks at what has come: the programs set
 * it where it is 0, the keeper when it begins to look, and to 0 when it has done so. Then it looks
 * whether something has come meanwhile, of which nobody told it. The others are the programs'.
 */
struct throttle_gate {
	__u32 alive; /* whether the keeper serves it */
	__u32 id;    /* by which the keeper tells it from others */
	__u64 next_due_ns;   /* when the keeper is going to open a window; 0: none waits */
	__u64 round_trip_ns; /* the longest that it has seen */
	__u32 namespaces[GATE_NAMESPACES]; /* the inodes of those that it can send in */
	__u64 ungated[GATE_UNGATED];
	__u64 taken;
	__u64 oldest_ns;
	__u64 datagram_ns; /* when the keeper was told that a large datagram has left; 0: not yet */
	__u32 woken;       /* when the keeper was last woken up, in 2^20 ns */
	__u32 reserved;
};

/* An acknowledgement as the keeper gets it. */
struct throttle_ack {
	__u64 cookie; /* of the socket */
	__u64 at_ns;
	__u32 gate;    /* struct throttle_gate's id */
	__u32 device;  /* the index of the device that its socket is bound to, or 0 */
	__u32 edge;    /* struct throttle_socket's */
	__u32 payload; /* bytes of data that it was sent with */
	__u32 mark;
	__u32 network; /* the inode of its network namespace; 0: a large datagram has left */
	__u32 segment;
	__u32 round_trip_us; /* as the kernel estimates it from data that has come; 0: not yet */
	__u8 length; /* of its headers in bytes */
	__u8 window_scale;
	__u8 passed; /* it has left by itself, and is only to be known */
	__u8 reserved;
	__u8 packet[GATE_PACKET_BYTES]; /* its headers, with the socket's own addresses */
};

/* Of each process whose new sockets are marked, by its id (tgid) in the first pid namespace. */
struct throttle_process {
	__u32 flags; /* of enum throttle_process_flags */
	__u32 slot;  /* of the throttle that limits it */
};

enum throttle_process_flags {
	THROTTLE_FOLLOW = 1,  /* the processes that it starts are taken in too */
	THROTTLE_BY_NAME = 2, /* it was taken in by its name alone, and is to be looked at */
};

/* One for each possible CPU. Bytes are billed bytes: TCP payload, or the IP length of all else. */
struct throttle_stats {
	__u64 program_calls;
	__u64 packets_total; /* those that the limit is for, the dropped ones included */
	__u64 bytes_total;
	__u64 packets_dropped;
	__u64 bytes_dropped;
};

enum throttle_record_flags {
	THROTTLE_KEPT = 1,    /* stays in force after its owner has ended */
	THROTTLE_REMOVED = 2, /* somebody has taken the limit away; the owner ends */
};

/* Where shared programs are in the maps by which they are entered. */
enum throttle_entry {
	ENTRY_DENY = 0, /* policers, by the verdict, and the only program in their map */
	ENTRY_TELL = 1,
	ENTRY_GATE = 2,
};
#define THROTTLE_ENTRIES 3

/* Nothing has this type. It has what no map's value tells in the BTF of each object. */
union throttle_constants {
	struct throttle_ack ack;
	enum throttle_direction direction;
	enum throttle_flags flags;
	enum throttle_record_flags record_flags;
	enum throttle_process_flags process_flags;
	enum throttle_format format;
	enum throttle_level level;
	enum throttle_entry entry;
	enum throttle_shift shift;
	enum throttle_slack slack;
	enum throttle_pacing pacing;
	enum throttle_pacing_rate pacing_rate;
	enum throttle_gate_bounds gate_bounds;
	enum throttle_gate_state gate_state;
	enum throttle_gate_window gate_window;
};

/*
 * What a throttle is to limit, as whoever asks any of its programs can read it. Written by user
 * space alone; the programs only hold it. The generation is odd while it is being written: who
 * reads it compares the generation before and after.
 */
struct throttle_record {
	__u32 magic;
	__u32 version;
	__u32 generation;
	__u32 flags;  /* enum throttle_record_flags */
	__u32 length; /* of the text in bytes */
	__u32 slot;
	char text[4072]; /* JSON */
	union throttle_constants constants[0]; /* takes no room */
};

#endif
