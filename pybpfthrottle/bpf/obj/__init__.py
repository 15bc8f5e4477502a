"""Reading an object and making it fit a kernel: from bytes to linked instructions. Pure."""
