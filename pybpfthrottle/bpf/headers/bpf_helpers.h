/* SPDX-License-Identifier: MIT */
/* What programs for BPF begin with: sections, maps, and the kernel's helper functions. */
#ifndef __BPF_HELPERS__
#define __BPF_HELPERS__

#include "bpf_helper_defs.h"

#define SEC(name) __attribute__((section(name), used))
#define __noinline __attribute__((noinline))
#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#ifndef __weak
#define __weak __attribute__((weak))
#endif
/* A global function that is verified with its callers, as static ones are. */
#define __hidden __attribute__((visibility("hidden")))

/* Members of maps in section .maps. */
#define __uint(name, number) int(*name)[number]
#define __type(name, type) typeof(type) *name
#define __array(name, type) typeof(type) *name[]
#define __bpf_paste(a, b) a##b
#define __bpf_unique(a, b) __bpf_paste(a, b)
#define __ulong(name, number) enum { __bpf_unique(__bpf_number_, __COUNTER__) = number } name

enum libbpf_pin_type {
	LIBBPF_PIN_NONE,
	LIBBPF_PIN_BY_NAME,
};

/* What the kernel is to have: settings of its configuration, functions and variables. */
#define __kconfig __attribute__((section(".kconfig")))
#define __ksym __attribute__((section(".ksyms")))

enum libbpf_tristate {
	TRI_NO,
	TRI_YES,
	TRI_MODULE,
};

#define bpf_ksym_exists(symbol) (!!&(symbol))

/* Tags, by which the verifier knows more of pointers and functions. */
#if __has_attribute(btf_type_tag)
#define __kptr __attribute__((btf_type_tag("kptr")))
#define __kptr_untrusted __attribute__((btf_type_tag("kptr_untrusted")))
#define __percpu_kptr __attribute__((btf_type_tag("percpu_kptr")))
#define __uptr __attribute__((btf_type_tag("uptr")))
#endif
#if __has_attribute(btf_decl_tag)
#define __arg_ctx __attribute__((btf_decl_tag("arg:ctx")))
#define __arg_nonnull __attribute__((btf_decl_tag("arg:nonnull")))
#define __arg_nullable __attribute__((btf_decl_tag("arg:nullable")))
#define __arg_trusted __attribute__((btf_decl_tag("arg:trusted")))
#define __arg_arena __attribute__((btf_decl_tag("arg:arena")))
#define __exception_cb(name) __attribute__((btf_decl_tag("exception_callback:" #name)))
#endif

#ifndef offsetof
#define offsetof(type, member) __builtin_offsetof(type, member)
#endif
#ifndef container_of
#define container_of(pointer, type, member) \
	((type *)((void *)(pointer) - offsetof(type, member)))
#endif

/* The compiler must not move loads and stores across it, or know more of a variable. */
#ifndef barrier
#define barrier() asm volatile("" ::: "memory")
#endif
#ifndef barrier_var
#define barrier_var(variable) asm volatile("" : "+r"(variable))
#endif

/* A line in /sys/kernel/tracing/trace_pipe: a format and up to three numbers. */
#define bpf_printk(format, ...)                                            \
	({                                                                 \
		static const char __format[] = format;                     \
		bpf_trace_printk(__format, sizeof(__format), ##__VA_ARGS__); \
	})

#endif
