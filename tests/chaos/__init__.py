"""Faults, load and hostile input, for minutes: ``make chaos``, or ``python -m tests.chaos --help``.

Every case starts real relays, does to them what its bar says, and tells each figure beside its bar. Cases are
bounded in time, draw their chances from a seed, and stay on loopback or in network namespaces of their own.
"""
