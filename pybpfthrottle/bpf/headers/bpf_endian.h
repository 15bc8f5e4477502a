/* SPDX-License-Identifier: MIT */
/* Numbers in the byte order of networks, and back. */
#ifndef __BPF_ENDIAN__
#define __BPF_ENDIAN__

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define __bpf_big(bits, number) __builtin_bswap##bits(number)
#define __bpf_little(bits, number) (number)
#else
#define __bpf_big(bits, number) (number)
#define __bpf_little(bits, number) __builtin_bswap##bits(number)
#endif

#define bpf_htons(number) __bpf_big(16, number)
#define bpf_ntohs(number) __bpf_big(16, number)
#define bpf_htonl(number) __bpf_big(32, number)
#define bpf_ntohl(number) __bpf_big(32, number)
#define bpf_cpu_to_be64(number) __bpf_big(64, number)
#define bpf_be64_to_cpu(number) __bpf_big(64, number)
#define bpf_cpu_to_le64(number) __bpf_little(64, number)
#define bpf_le64_to_cpu(number) __bpf_little(64, number)

#endif
