/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The records and constants that divert.bpf.c shares with Python.
 *
 * pybpfthrottle/diversion/records.py declares the same structures and enums; a test compares them.
 */
#ifndef DIVERT_H
#define DIVERT_H

enum divert_bounds {
	DIVERT_NAMESPACES = 16, /* network namespaces that one keeper serves */
	DIVERT_RING_BYTES = 1 << 23,
	DIVERT_STALE_NS = 200 * 1000 * 1000, /* what waits longer for the keeper waits for nobody */
	DIVERT_ASK_NS = 100 * 1000 * 1000,  /* how often the keeper is told of a namespace at most */
	DIVERT_DEVICES = 1 << 24,	    /* indexes of devices below this fit into a tag */
};

/*
 * What a packet carries in its tc_index when it comes back: this, and a bit of each diversion. All
 * queues have the same bit: a packet waits in one of them at most.
 */
enum divert_tag {
	DIVERT_TAG = 0xd000,
	DIVERT_TAG_MASK = 0xf000,
	DIVERT_QUEUED = 0x800,
	DIVERT_LOST = 0x400, /* and the queue has chosen it to get lost: it is counted, and dropped */
};

/* The mark of a packet that a diversion has taken: programs after it must not count it. */
enum divert_mark {
	DIVERT_TAKEN = 0x70594454,
};

/*
 * One diversion. User space writes the first five, the programs the counts. Both write `waits`: the
 * programs 1 with each packet that they take, and the keeper what is so.
 */
struct divert_state {
	__u32 id;
	__u32 on;
	__u32 bit; /* of the tag */
	__u32 loopback;
	__u32 slot; /* of the throttle that a queue is for */
	__u32 waits; /* whether packets are in the queue */
	__u64 taken;
	__u64 stale;	/* passed, since the keeper did not keep up or has ended */
	__u64 unserved; /* passed, since the keeper does not serve their namespace */
	__u64 full;	/* dropped, since the ring was full */
	__u64 translations;
	__u64 returned; /* of a queue: records that came back */
};

/* How a packet that is translated (NAT) looked on the wire. IPv4 addresses are in the first word. */
struct divert_translation {
	__u32 remote[4];
	__u32 local[4];
	__u16 remote_port;
	__u16 local_port;
};

/* By what the packet is found that a translated one is answered with. */
struct divert_flow {
	__u32 remote[4];
	__u32 network;
	__u16 remote_port;
	__u16 local_port;
	__u32 protocol;
};

/* A packet on its way to the keeper; without a length, the namespace that it is asked to serve. */
struct divert_packet {
	__u64 at_ns;
	__u32 diversion;
	__u32 length;
	__u32 device;
	__u32 segment; /* the payload of each packet that this was put together of, or 0 */
	__u32 network;
	__u16 tag;
	__u16 translated;
	struct divert_translation wire;
	__u32 unused;
	__u8 packet[];
};

/* Nothing has this type. It has what no map's value tells in the object's BTF. */
union divert_constants {
	struct divert_packet packet;
	enum divert_bounds bounds;
	enum divert_tag tag;
	enum divert_mark mark;
};

/* What the keeper and the programs of all its diversions share. */
struct divert_keeper {
	__u32 alive;
	__u32 ring_bytes;
	__u64 oldest_ns;   /* when the first packet was taken that the keeper has not seen, or 0 */
	__u64 next_due_ns; /* when the keeper has to give back the next one, or 0 */
	__u64 asked_ns;
	__u32 namespaces[DIVERT_NAMESPACES];
	union divert_constants constants[0]; /* takes no room */
};

#endif
