"""What the three doors, tcprelay.py, tcprelay_server.py and tcprelay_client.py, stand on: see docs/internals.md.

Each room imports only rooms that stand above it in this list (tests/test_house.py reads it):

    system          what systems and Pythons differ in; how this process uses the machine
    text            what is said to people: strings made safe, errors in words, ids
    waiting         waiting for a descriptor, with a deadline, and cut short by a stop
    addresses       endpoints and socket addresses: parsed, shown, grouped
    proxy_header    PROXY protocol headers, made and parsed; no I/O
    tunnel          what is said to a proxy on the way to a relay server; no I/O
    names           host names looked up, with a thread of their own
    tcp             what is set on TCP sockets, and what Linux tells of them
    sockets         listening and dialling
    protocol        the link protocol: frames, which may come when, proofs; no I/O
    streams         a byte stream over one socket
    hello           what a TLS client asks for first, and which certificate is for it; no I/O
    tls             the same over TLS
    link            a link that carries one connection at a time
    threads         a cache of parked threads
    pace            how fast one direction of a connection may be
    ahead           how much is taken ahead of a slow sink
    pump            one direction of a connection
    splice          a stream and a link that carry one connection
    events          what happens
    tally           what has happened so far, counted
    telling         who is told of it
    carried         what connections have carried
    watch           what looks after all of them
    logs            a log that keeps no thread waiting
    state           files that this user alone can read
    values          what an option is, and what its value may be
    options         the options that both roles have
    server_options  those of the relay server
    client_options  those of the relay client
    arguments       the words of a command line, each taken for what it is meant to be
    rights          who may do what: a relay server's clients file
    parser          what reads the command line and the configuration files
    command_line    the options of a command, wherever they come from
    openssl         TLS contexts, the openssl command, and what is wrong with files
    certificates    TLS contexts with certificates, made or given
    signals         signals, children, the service manager
    messages        messages between a parent and its worker processes
    runtime         what the parts of a role stand on
    status.report     the status of a relay as one object
    status.survey     what a process knows for it
    status.page       the page for people
    status.metrics    the metrics for machines
    status.web        what is answered over HTTP, and to whom
    status.places     where its Unix sockets are
    status.table      it as a table for a terminal
    status.looking    the commands that ask for it
    status.desk       where the status is asked for
    status.asking     the status of a role with workers
    role            what both roles share: how they begin and end
    life            the life of a role in a process
    processes       several processes for one role
    command         how a command begins and ends
    server.limits     what one address may take; handshakes under way
    server.access     which addresses may connect
    server.clients    a service client until its service has answered
    server.nonces     nonces that are handed out ahead
    server.account    what was handed to workers, and what became of it
    server.pooled     a link and what is known of it
    server.withdrawals  services whose relay clients have all withdrawn them
    server.pool       idle links and waiting service clients
    server.listeners  the ports, and what each address may have of them
    server.survey     what a relay server knows for its status
    server.leases     ports on demand: who has which, and for how long
    server.intake     where connections come from: the ports, or a parent process
    server.faces      which certificates the service ports show
    server.trust      certificates, token, the line to paste
    server.enrolling  a new relay client: its section, and its line to paste
    server.greeting   how a connection to the relay port becomes a link
    server.proxies    connections that come through a proxy, and where they come from really
    server.links      links while they carry no connection
    server.pairing    a service client from accept to its closing record
    server.workers    the parent of worker processes
    client.refill     when links are wanted: after losses, after sleep, and of a service that is down
    client.stock      links by their state, and how many are missing
    client.wandering  whether this host has slept or moved, and which links are in doubt then
    client.offers     TLS with services, and which protocol each is offered
    client.wayout     the way to a relay server: straight, or through a proxy
    client.greeting   how a link is opened
    client.loops      connections that come back to their relay client
    client.links      links, each in a thread of its own
    client.branches   the relay servers, and what is missing at each
    client.checks     whether services can be reached
    client.workers    the parent of worker processes
"""

__version__ = "0.1.0"
