"""bpf(2) without libbpf: read a clang-built object, load it, attach it, use its maps.

::

    from pybpfthrottle.bpf import elf, loader

    spec = elf.read_file("filter.o")
    with loader.load(spec) as loaded:
        print(loaded.maps["counts"])

Knows nothing of throttling.
"""
