"""What the three doors, tcprelay.py, tcprelay_server.py and tcprelay_client.py, stand on: see docs/internals.md.

Each room imports only rooms that stand above it in this list (tests/test_house.py reads it):

    system          what systems and Pythons differ in; modules that are imported when they are used
    text            what is said to people: strings made safe, errors in words, ids
    waiting         waiting for a descriptor, with a deadline, until somebody asks to stop
    addresses       endpoints and socket addresses: parsed, shown, grouped
    names           host names looked up, with a thread of their own
    tcp             what is set on TCP sockets, and what Linux tells of them
    sockets         listening and dialling
    protocol        the link protocol: frames, which may come when, proofs; no I/O
    streams         a byte stream over one socket
    tls             the same over TLS
    link            a link that carries one connection at a time
    threads         a cache of parked threads
    tuning          processors, the interpreter lock, descriptors
    splice          a stream and a link that carry one connection
    watch           what looks after all of them
    events          what happens, told once
    logs            a log that nobody waits for
    values          what an option is, and what its value may be
    options         the options of both roles
    command_line    where they come from
    openssl         TLS contexts, and the openssl command
    pem             what files of certificates and keys hold
    state           files that this user alone can read
    certificates    TLS contexts with certificates, made or given
    signals         signals, children, the service manager
    messages        messages between a parent and its worker processes
    role            what both roles share: how they begin and end
    processes       several processes for one role
    command         how a command begins and ends
    server.limits   what one address may take; handshakes under way
    server.clients  a service client until its service has answered
    server.gauges   what workers and their parent show each other
    server.pool     idle links and waiting service clients
    client.pace     how many links there should be, and when
"""

__version__ = "0.1.0"
