"""The account of what a relay server's parent has handed to its workers, and what became of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from _tcprelay.server.account import HANDED, IDLE, LEFT, LINKS, RETURNED, SETTLED, WAITING, Account, WorkerAccount
from _tcprelay.server.intake import ParentIntake
from _tcprelay.server.limits import Shares
from _tcprelay.server.pool import Pool
from _tcprelay.server.workers import ServerWorkers
from _tcprelay.tls import TLSStream
from tcprelay import RelayServer

from .conftest import PATIENCE, echo, read_exactly, replace, wait_until
from .peers import HOST, Peers, RelayProcess, free_port, workers_of


def test_what_is_under_way_and_what_is_there() -> None:
    """From being handed over to being gone, and for somebody who is sent back."""
    account = Account(2, ["web", "ssh"])
    worker = WorkerAccount(account, 1)
    for _ in range(3):
        account.add(1, "web", HANDED)
    worker.show("web", 2, 0)
    assert (account.under_way(1, "web"), account.present(1, "web"), account.idle(1, "web")) == (3, 3, -1)
    worker.show("web", 1, 0)
    worker.settle("web")
    assert (account.under_way(1, "web"), account.present(1, "web"), account.idle(1, "web")) == (2, 3, -1)
    worker.settle("web")
    account.add(1, "web", RETURNED)
    worker.leave("web")
    assert (account.under_way(1, "web"), account.present(1, "web"), account.idle(1, "web")) == (1, 1, 0)
    account.add(1, LINKS, HANDED)
    assert account.clients(1) == 1
    assert [account.present(0, kind) for kind in ("web", "ssh", LINKS)] == [0, 0, 0]


def test_who_waits_elsewhere() -> None:
    """In the parent and in other workers; each shows its own number."""
    account = Account(3, ["web"])
    workers = [WorkerAccount(account, number) for number in range(3)]
    for number, worker in enumerate(workers):
        worker.show("web", 0, 10**number)
    account.show_queue("web", 1000)
    assert account.count_waiting("web") == 1111
    assert [worker.count_waiting_elsewhere("web") for worker in workers] == [1110, 1101, 1011]


def test_a_dead_worker_is_struck_out() -> None:
    """With its share of what each address may have; the other's row stays."""
    account, shares = Account(2, ["web"]), Shares(2)
    for worker in (0, 1):
        assert shares.enter("192.0.2.1")
        account.hold(worker, shares, "192.0.2.1", 1)
        account.add(worker, "web", HANDED)
        WorkerAccount(account, worker).show("web", 5, 6)
    assert not shares.enter("192.0.2.1")
    account.strike(0)
    assert [account.read(0, "web", figure) for figure in (HANDED, RETURNED, SETTLED, LEFT, IDLE, WAITING)] == [0] * 6
    assert (account.present(1, "web"), account.read(1, "web", IDLE)) == (1, 5)
    assert shares.enter("192.0.2.1")
    assert not shares.enter("192.0.2.1")
    account.strike(0)
    assert not shares.enter("192.0.2.1"), "once"


@pytest.mark.parametrize("error", [MemoryError("no"), OSError("no")])
def test_what_cannot_be_handed_over_does_not_count(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error is, and wherever it strikes on the way."""
    server = RelayServer(0, 0, max_per_address=1)
    parent = ServerWorkers(server, 1, server._listeners, lambda account, intake: None)
    [worker] = parent.workers
    for place in ("send_message", "encode_message"):
        with monkeypatch.context() as patch, socket.socket() as sock:
            replace(patch, place, Mock(side_effect=error))
            worker.intake = sock
            with suppress(MemoryError, OSError):
                assert not parent._hand(worker, {"service": "default", "address": ("192.0.2.1", 5)}, sock)
        assert (parent._account.read(0, "default", HANDED), parent._account._held[0]) == (0, Counter())
    parent.selector.close()


AUDIT = """
import json, os, sys, tcprelay
from _tcprelay.server.account import HANDED, IDLE, LEFT, RETURNED, SETTLED
from _tcprelay.server.workers import ServerWorkers

real, path, wrong = ServerWorkers.look_at_time, sys.argv[1], []

def look_at_time(workers):
    account, rows = workers._account, []
    for worker in range(account.workers):
        for kind in ("default", ""):
            settled, left = account.read(worker, kind, SETTLED), account.read(worker, kind, LEFT)
            handed, returned = account.read(worker, kind, HANDED), account.read(worker, kind, RETURNED)
            row = {"worker": worker, "kind": kind, "handed": handed, "returned": returned, "settled": settled,
                   "left": left, "idle": account.read(worker, kind, IDLE)}
            rows.append(row)
            if not (0 <= settled <= handed and 0 <= left and 0 <= returned and left + returned <= handed):
                wrong.append(row)
    with open(path + ".new", "w") as file:
        json.dump({"rows": rows, "wrong": wrong[:5]}, file)
    os.replace(path + ".new", path)
    return real(workers)

ServerWorkers.look_at_time = look_at_time
sys.exit(tcprelay.main(sys.argv[5:]))
"""
"""What runs ``python -m tcprelay …``, behind it in the command line, and compares the account at each turn."""


class Audit:
    """A relay server with two workers, whose parent compares its account at each turn, and shows it."""

    def __init__(self, peers: Peers, path: Path) -> None:
        self._path = path / "account.json"
        wrapper = [sys.executable, "-c", AUDIT, str(self._path)]
        options = "--relay-port", "0", "--service-port", "0", "--hostname", HOST, "--workers", "2"
        self.server: RelayProcess = peers.relay_process("server", *options, wrapper=wrapper)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        shown = json.loads(self._path.read_text())
        assert shown["wrong"] == []
        return [row for row in shown["rows"] if row["kind"] == kind]

    def total(self, kind: str, figure: str) -> int:
        return sum(row[figure] for row in self.rows(kind))

    def wait_quiet(self, connections: int) -> None:
        """Until nothing is under way, and there are so many connections, each with a link, and the idle links."""

        def is_quiet() -> bool:
            clients, links = self.rows("default"), self.rows("")
            there = [sum(row["handed"] - row["returned"] - row["left"] for row in rows) for rows in (clients, links)]
            idle = sum(row["idle"] for row in clients)
            is_settled = all(row["settled"] == row["handed"] for row in clients + links)
            return is_settled and there == [connections, connections + idle]

        wait_until(is_quiet)


def talk(peers: Peers, port: int, count: int) -> int:
    """So many connections, one after the other; how many were served."""
    served = 0
    for _ in range(count):
        with suppress(OSError, AssertionError), peers.connect(port) as sock:
            sock.sendall(b"question")
            served += read_exactly(sock, 8) == b"question"
    return served


def test_the_account_is_true_under_load(peers: Peers, tmp_path: Path) -> None:
    """At each turn of the parent, and exactly when all is quiet: with more service clients than links, with some that
    are sent back, since one relay client cannot reach its service, and after the death of a worker."""
    audit = Audit(peers, tmp_path)
    server = audit.server
    peers.client(server.relay_port, peers.service(echo).port, "--num-conn", "4", "--workers", "0")
    dead = peers.client(server.relay_port, free_port(), "--num-conn", "4", "--workers", "0")
    wait_until(lambda: audit.total("default", "idle") == 8)
    with ThreadPoolExecutor(16) as pool, ExitStack() as held:
        served = sum(pool.map(lambda _: talk(peers, server.service_port, 20), range(16)))
        assert served
        assert audit.total("default", "returned") > 0
        dead.signal(signal.SIGTERM)
        assert dead.wait() == 0
        for _ in range(5):
            sock = held.enter_context(peers.connect(server.service_port))
            sock.sendall(b"question")
            assert read_exactly(sock, 8) == b"question"
        audit.wait_quiet(5)
        assert served + 5 <= audit.total("default", "handed") - audit.total("default", "returned") <= 16 * 20 + 5
        load = [pool.submit(talk, peers, server.service_port, 40) for _ in range(8)]
        server.expected_error = "worker "
        os.kill(workers_of(server)[0], signal.SIGKILL)
        assert sum(done.result(6 * PATIENCE) for done in load) > 0
    audit.wait_quiet(0)


@pytest.mark.parametrize("waits", [0, 1])
def test_what_a_worker_tells_its_parent(waits: int) -> None:
    """That a link may be free, where somebody waits elsewhere; that an address has less, where that is counted."""
    runtime, listeners, account = Mock(), Mock(), Account(3, ["web"])
    listeners.share.return_value = Shares(waits)
    pool = Pool(["web"], 1, 1)
    intake = ParentIntake(runtime, pool, listeners, Mock(), WorkerAccount(account, 0))
    account.show_queue("web", waits)
    client = Mock(service="web", unsettled=True)
    for _ in range(2):
        intake.settle(client)
    intake.leave("web", ("192.0.2.1", 5))
    assert (account.read(0, "web", SETTLED), account.read(0, "web", LEFT)) == (1, 1)
    told = [call({"look": "web"}), call({"left": "web", "address": ("192.0.2.1", 5)})]
    assert runtime.tell_parent.mock_calls == told[: 2 * waits]
    assert (intake.own_share(8), intake.count_waiting("web")) == (3, waits)
    pool.selector.close()


def test_who_has_shaken_hands_waits_where_it_is() -> None:
    """TLS cannot be passed on; the parent is told, so that a link comes here."""
    runtime, pool = Mock(), Pool(["web"], 1, 1)
    intake = ParentIntake(runtime, pool, Mock(), Mock(), WorkerAccount(Account(1, ["web"]), 0))
    client = Mock(service="web", stream=Mock(spec=TLSStream))
    intake.pass_on(client)
    assert runtime.mock_calls == [call.tell_parent({"look": "web"})]
    pool.selector.close()


def test_a_service_may_be_gone_before_its_clients() -> None:
    """Then nothing of them is counted, and nothing raises; the row is given out again last."""
    account = Account(1, ["a"], 2)
    one = WorkerAccount(account, 0)
    first = account.open("x@1")
    one.show_members("x@1", 2)
    assert account.has_members("x@1")
    one.show_members("x@1", 0)
    account.close("x@1")
    for act in (one.settle, one.leave, one.count_waiting_elsewhere):
        act("x@1")
    one.show("x@1", 1, 1)
    one.show_members("x@1", 1)
    assert account.open("y@2") != first
    assert account.open("z@3") == first
    assert not account.has_members("z@3")
