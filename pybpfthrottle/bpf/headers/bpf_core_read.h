/* SPDX-License-Identifier: MIT */
/* Questions about the kernel's types that the loader answers (CO-RE), and reads by their answers. */
#ifndef __BPF_CORE_READ_H__
#define __BPF_CORE_READ_H__

#include "bpf_helpers.h"

/* The numbers are those of enum bpf_core_relo_kind. */
#define __core_field(access, what) __builtin_preserve_field_info(access, what)
#define __core_type(type, what) __builtin_preserve_type_info(*(typeof(type) *)0, what)
#define __core_enum(type, value, what) \
	__builtin_preserve_enum_value(*(typeof(type) *)value, what)

#define bpf_core_field_offset(access) __core_field(access, 0)
#define bpf_core_field_size(access) __core_field(access, 1)
#define bpf_core_field_exists(access) __core_field(access, 2)
#define bpf_core_type_exists(type) __core_type(type, 0)
#define bpf_core_type_size(type) __core_type(type, 1)
#define bpf_core_type_matches(type) __core_type(type, 2)
#define bpf_core_type_id_local(type) __builtin_btf_type_id(*(typeof(type) *)0, 0)
#define bpf_core_type_id_kernel(type) __builtin_btf_type_id(*(typeof(type) *)0, 1)
#define bpf_core_enum_value_exists(type, value) __core_enum(type, value, 0)
#define bpf_core_enum_value(type, value) __core_enum(type, value, 1)
#define bpf_core_cast(pointer, type) \
	((typeof(type) *)bpf_rdonly_cast((pointer), bpf_core_type_id_kernel(type)))

/* Copy what a pointer into a kernel's struct is of, such as &task->comm. */
#define bpf_core_read(to, size, from) \
	bpf_probe_read_kernel(to, size, (const void *)__builtin_preserve_access_index(from))
#define bpf_core_read_str(to, size, from) \
	bpf_probe_read_kernel_str(to, size, (const void *)__builtin_preserve_access_index(from))

/* BPF_CORE_READ(task, parent, comm) is task->parent->comm, read pointer by pointer. */
#define __core_one(from, field)                                                 \
	({                                                                      \
		__auto_type __pointer = (from);                                 \
		typeof(__pointer->field) __value;                               \
		bpf_core_read(&__value, sizeof(__value), &__pointer->field);    \
		__value;                                                        \
	})
#define __core_1(from, a) __core_one(from, a)
#define __core_2(from, a, b) __core_one(__core_one(from, a), b)
#define __core_3(from, a, b, c) __core_one(__core_2(from, a, b), c)
#define __core_4(from, a, b, c, d) __core_one(__core_3(from, a, b, c), d)
#define __core_5(from, a, b, c, d, e) __core_one(__core_4(from, a, b, c, d), e)
#define __core_6(from, a, b, c, d, e, f) __core_one(__core_5(from, a, b, c, d, e), f)
#define __core_nth(_1, _2, _3, _4, _5, _6, macro, ...) macro
#define BPF_CORE_READ(from, ...)                                                       \
	__core_nth(__VA_ARGS__, __core_6, __core_5, __core_4, __core_3, __core_2, __core_1) \
	(from, __VA_ARGS__)

/* The same, into memory: BPF_CORE_READ_INTO(&to, task, parent, comm). */
#define BPF_CORE_READ_INTO(to, from, ...)                             \
	({                                                            \
		*(typeof(BPF_CORE_READ(from, __VA_ARGS__)) *)(to) =   \
			BPF_CORE_READ(from, __VA_ARGS__);             \
		0;                                                    \
	})

#endif
