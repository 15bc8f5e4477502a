"""The mechanism that comes first: a token bucket in the kernel, in BPF programs of cgroups."""
