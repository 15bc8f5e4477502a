"""The line: a network namespace of a command's own, whose packets pass a process of ours both ways.

So what it sends is late, lost or damaged as well as what it receives, without a qdisc or a module.
"""
