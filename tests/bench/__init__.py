"""A first look at speed and memory: ``python -m tests.bench``, on Linux, everything on loopback.

    processes    starting, watching and ending real processes; nothing else here starts one
    services     what stands behind the relays, where no other program does: an echo and a small HTTP service
    subjects     what is measured: a direct connection, tcprelay, and other relays beside it
    cases        what is measured about them
    report       the table, the bars and the JSON file

Another peer is one more `Subject`, another question one more `Case`.
"""
