"""What Linux says of processes, cgroups, sockets and networks, without BPF."""
