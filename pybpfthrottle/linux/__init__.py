"""Processes, cgroups, sockets and networks as Linux shows them, without BPF."""
