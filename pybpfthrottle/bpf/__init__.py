"""bpf(2) without libbpf: read a clang-built object, load it, attach it, use its maps.

::

    from pybpfthrottle.bpf import loader
    from pybpfthrottle.bpf.obj import elf

    spec = elf.read_file("filter.o")
    spec.maps["counts"].max_entries = 64
    spec.variables["limit"].set(1000)
    with loader.load(spec) as loaded:
        print(loaded.maps["counts"], loaded.variables["hits"].get())

Knows nothing of throttling.
"""
