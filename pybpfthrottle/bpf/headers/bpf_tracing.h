/* SPDX-License-Identifier: MIT */
/* The arguments of what is traced: by registers, and as parameters of the program. */
#ifndef __BPF_TRACING_H__
#define __BPF_TRACING_H__

#include "bpf_helpers.h"

/* struct pt_regs, and its fields by the calling conventions. */
#if defined(__TARGET_ARCH_x86)
#define __PT_REGS struct pt_regs
#if defined(__VMLINUX_H__) || defined(__KERNEL__)
#define __PT_PARM1 di
#define __PT_PARM2 si
#define __PT_PARM3 dx
#define __PT_PARM4 cx
#define __PT_RC ax
#define __PT_SP sp
#define __PT_IP ip
#else
#define __PT_PARM1 rdi
#define __PT_PARM2 rsi
#define __PT_PARM3 rdx
#define __PT_PARM4 rcx
#define __PT_RC rax
#define __PT_SP rsp
#define __PT_IP rip
#endif
#define __PT_PARM5 r8
#define __PT_PARM6 r9
#elif defined(__TARGET_ARCH_arm64)
#define __PT_REGS struct user_pt_regs
#define __PT_PARM1 regs[0]
#define __PT_PARM2 regs[1]
#define __PT_PARM3 regs[2]
#define __PT_PARM4 regs[3]
#define __PT_PARM5 regs[4]
#define __PT_PARM6 regs[5]
#define __PT_RC regs[0]
#define __PT_SP sp
#define __PT_IP pc
#elif defined(__TARGET_ARCH_riscv)
#define __PT_REGS struct user_regs_struct
#define __PT_PARM1 a0
#define __PT_PARM2 a1
#define __PT_PARM3 a2
#define __PT_PARM4 a3
#define __PT_PARM5 a4
#define __PT_PARM6 a5
#define __PT_RC a0
#define __PT_SP sp
#define __PT_IP pc
#elif defined(__TARGET_ARCH_s390)
#define __PT_REGS user_pt_regs
#define __PT_PARM1 gprs[2]
#define __PT_PARM2 gprs[3]
#define __PT_PARM3 gprs[4]
#define __PT_PARM4 gprs[5]
#define __PT_PARM5 gprs[6]
#define __PT_PARM6 gprs[7]
#define __PT_RC gprs[2]
#define __PT_SP gprs[15]
#define __PT_IP psw.addr
#endif

#ifdef __PT_REGS
#define __PT_OF(context, field) (((const __PT_REGS *)(context))->field)
#define PT_REGS_PARM1(context) __PT_OF(context, __PT_PARM1)
#define PT_REGS_PARM2(context) __PT_OF(context, __PT_PARM2)
#define PT_REGS_PARM3(context) __PT_OF(context, __PT_PARM3)
#define PT_REGS_PARM4(context) __PT_OF(context, __PT_PARM4)
#define PT_REGS_PARM5(context) __PT_OF(context, __PT_PARM5)
#define PT_REGS_PARM6(context) __PT_OF(context, __PT_PARM6)
#define PT_REGS_RC(context) __PT_OF(context, __PT_RC)
#define PT_REGS_SP(context) __PT_OF(context, __PT_SP)
#define PT_REGS_IP(context) __PT_OF(context, __PT_IP)
#endif

#define __bpf_nth(_0, _1, _2, _3, _4, _5, _6, macro, ...) macro
#define __bpf_count(macro, ...)                                                              \
	__bpf_nth(_, ##__VA_ARGS__, macro##6, macro##5, macro##4, macro##3, macro##2, macro##1, \
		  macro##0)

/* int BPF_PROG(name, type parameter, ...): the context is an array of numbers, one for each. */
#define __bpf_ctx0()
#define __bpf_ctx1(a) , (void *)ctx[0]
#define __bpf_ctx2(a, b) __bpf_ctx1(a), (void *)ctx[1]
#define __bpf_ctx3(a, b, c) __bpf_ctx2(a, b), (void *)ctx[2]
#define __bpf_ctx4(a, b, c, d) __bpf_ctx3(a, b, c), (void *)ctx[3]
#define __bpf_ctx5(a, b, c, d, e) __bpf_ctx4(a, b, c, d), (void *)ctx[4]
#define __bpf_ctx6(a, b, c, d, e, f) __bpf_ctx5(a, b, c, d, e), (void *)ctx[5]
#define __bpf_ctx(...) __bpf_count(__bpf_ctx, ##__VA_ARGS__)(__VA_ARGS__)

#define __bpf_wrap(name, type, values, ...)                                        \
	name(type *ctx);                                                           \
	static __always_inline typeof(name((type *)0)) __of_##name(type *ctx, ##__VA_ARGS__); \
	typeof(name((type *)0)) name(type *ctx)                                    \
	{                                                                          \
		_Pragma("GCC diagnostic push")                                     \
		_Pragma("GCC diagnostic ignored \"-Wint-conversion\"")             \
		return __of_##name(ctx values);                                     \
		_Pragma("GCC diagnostic pop")                                      \
	}                                                                          \
	static __always_inline typeof(name((type *)0)) __of_##name(type *ctx, ##__VA_ARGS__)

#define BPF_PROG(name, ...) \
	__bpf_wrap(name, unsigned long long, __bpf_ctx(__VA_ARGS__), ##__VA_ARGS__)

/* int BPF_KPROBE(name, ...), int BPF_KRETPROBE(name, result): of functions with registers. */
#define __bpf_reg0()
#define __bpf_reg1(a) , (void *)PT_REGS_PARM1(ctx)
#define __bpf_reg2(a, b) __bpf_reg1(a), (void *)PT_REGS_PARM2(ctx)
#define __bpf_reg3(a, b, c) __bpf_reg2(a, b), (void *)PT_REGS_PARM3(ctx)
#define __bpf_reg4(a, b, c, d) __bpf_reg3(a, b, c), (void *)PT_REGS_PARM4(ctx)
#define __bpf_reg5(a, b, c, d, e) __bpf_reg4(a, b, c, d), (void *)PT_REGS_PARM5(ctx)
#define __bpf_reg6(a, b, c, d, e, f) __bpf_reg5(a, b, c, d, e), (void *)PT_REGS_PARM6(ctx)
#define __bpf_reg(...) __bpf_count(__bpf_reg, ##__VA_ARGS__)(__VA_ARGS__)
#define BPF_KPROBE(name, ...) \
	__bpf_wrap(name, struct pt_regs, __bpf_reg(__VA_ARGS__), ##__VA_ARGS__)
#define BPF_UPROBE BPF_KPROBE

#define __bpf_ret0()
#define __bpf_ret1(a) , (void *)PT_REGS_RC(ctx)
#define __bpf_ret(...) __bpf_count(__bpf_ret, ##__VA_ARGS__)(__VA_ARGS__)
#define BPF_KRETPROBE(name, ...) \
	__bpf_wrap(name, struct pt_regs, __bpf_ret(__VA_ARGS__), ##__VA_ARGS__)
#define BPF_URETPROBE BPF_KRETPROBE

/* A line that an iterator writes. */
#define BPF_SEQ_PRINTF(seq, format, ...)                                       \
	({                                                                     \
		static const char __format[] = format;                       \
		unsigned long long __values[] = { 0, ##__VA_ARGS__ };        \
		bpf_seq_printf(seq, __format, sizeof(__format), __values + 1, \
			       sizeof(__values) - sizeof(__values[0]));    \
	})

#endif
