"""A first look at speed and memory: ``python -m tests.bench``, on Linux, everything on loopback.

Another relay beside tcprelay is one more `Subject` in `subjects`, another question one more `Case` in `cases`.
"""
