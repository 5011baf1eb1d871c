"""Speed and memory, beside a direct connection and other relays: ``python -m tests.bench``, on Linux.

Another relay is one more `Subject` in `subjects`, another question one more `Case` in `cases`, and what is asked of
tcprelay stands in `bars`.
"""
