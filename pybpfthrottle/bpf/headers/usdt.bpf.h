/* SPDX-License-Identifier: MIT */
/* Arguments of USDT probes. Who attaches says in the first map where they are. */
#ifndef __USDT_BPF_H__
#define __USDT_BPF_H__

#include "bpf_helpers.h"
#include "bpf_tracing.h"

#ifndef BPF_USDT_MAX_SPEC_CNT
#define BPF_USDT_MAX_SPEC_CNT 256
#endif
#define BPF_USDT_MAX_ARG_CNT 12

enum __bpf_usdt_place {
	__BPF_USDT_NUMBER,
	__BPF_USDT_REGISTER,
	__BPF_USDT_MEMORY, /* behind a register */
};

/* The layout is libbpf's, so that each side may be another one's. */
struct __bpf_usdt_arg_spec {
	__u64 val_off;
	enum __bpf_usdt_place arg_type;
	short reg_off;
	_Bool arg_signed;
	char arg_bitshift; /* so many bits are not the argument's */
};

struct __bpf_usdt_spec {
	struct __bpf_usdt_arg_spec args[BPF_USDT_MAX_ARG_CNT];
	__u64 usdt_cookie;
	short arg_cnt;
};

struct {
	__uint(type, 2 /* BPF_MAP_TYPE_ARRAY */);
	__uint(max_entries, BPF_USDT_MAX_SPEC_CNT);
	__type(key, int);
	__type(value, struct __bpf_usdt_spec);
} __bpf_usdt_specs SEC(".maps") __weak;

struct pt_regs;

static __always_inline struct __bpf_usdt_spec *__bpf_usdt_spec(struct pt_regs *ctx)
{
	int number = bpf_get_attach_cookie(ctx);

	return bpf_map_lookup_elem(&__bpf_usdt_specs, &number);
}

/* How many arguments the probe has; negative where it is not known. */
static __always_inline int bpf_usdt_arg_cnt(struct pt_regs *ctx)
{
	struct __bpf_usdt_spec *spec = __bpf_usdt_spec(ctx);

	return spec ? spec->arg_cnt : -3 /* ESRCH */;
}

/* An argument by its number; the result is 0, or negative where there is none. */
static __always_inline int bpf_usdt_arg(struct pt_regs *ctx, __u64 number, long *value)
{
	struct __bpf_usdt_spec *spec = __bpf_usdt_spec(ctx);
	struct __bpf_usdt_arg_spec *arg;
	unsigned long found;
	int error;

	*value = 0;
	if (!spec)
		return -3; /* ESRCH */
	if (number >= BPF_USDT_MAX_ARG_CNT || number >= spec->arg_cnt)
		return -2; /* ENOENT */
	arg = &spec->args[number];
	if (arg->arg_type == __BPF_USDT_NUMBER) {
		found = arg->val_off;
	} else {
		error = bpf_probe_read_kernel(&found, sizeof(found), (void *)ctx + arg->reg_off);
		if (!error && arg->arg_type == __BPF_USDT_MEMORY)
			error = bpf_probe_read_user(&found, sizeof(found),
						    (void *)found + arg->val_off);
		if (error)
			return error;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
		if (arg->arg_type == __BPF_USDT_MEMORY)
			found >>= arg->arg_bitshift;
#endif
	}
	found <<= arg->arg_bitshift;
	*value = arg->arg_signed ? (long)found >> arg->arg_bitshift : found >> arg->arg_bitshift;
	return 0;
}

/* The cookie that the program was attached with. */
static __always_inline long bpf_usdt_cookie(struct pt_regs *ctx)
{
	struct __bpf_usdt_spec *spec = __bpf_usdt_spec(ctx);

	return spec ? spec->usdt_cookie : 0;
}

/* int BPF_USDT(name, type argument, ...) */
#define __bpf_usdt_value(number)                         \
	({                                               \
		long __value;                            \
		bpf_usdt_arg(ctx, number, &__value);     \
		(void *)__value;                         \
	})
#define __bpf_usdt0()
#define __bpf_usdt1(a) , __bpf_usdt_value(0)
#define __bpf_usdt2(a, b) __bpf_usdt1(a), __bpf_usdt_value(1)
#define __bpf_usdt3(a, b, c) __bpf_usdt2(a, b), __bpf_usdt_value(2)
#define __bpf_usdt4(a, b, c, d) __bpf_usdt3(a, b, c), __bpf_usdt_value(3)
#define __bpf_usdt5(a, b, c, d, e) __bpf_usdt4(a, b, c, d), __bpf_usdt_value(4)
#define __bpf_usdt6(a, b, c, d, e, f) __bpf_usdt5(a, b, c, d, e), __bpf_usdt_value(5)
#define __bpf_usdt(...) __bpf_count(__bpf_usdt, ##__VA_ARGS__)(__VA_ARGS__)
#define BPF_USDT(name, ...) \
	__bpf_wrap(name, struct pt_regs, __bpf_usdt(__VA_ARGS__), ##__VA_ARGS__)

#endif
