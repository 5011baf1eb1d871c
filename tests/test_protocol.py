"""The link protocol without I/O: frames, the machine of states, proofs."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from _tcprelay.protocol import (
    ABORT, AUTH, BYE, CHALLENGE, CLIENT, DATA, END, FAIL, FRAME_NAMES, HELLO, IDLE, MAX_CONTROL, MAX_DATA, OPENING,
    PING, PONG, READY, REFUSED, SERVER, SPLICED, START, WELCOME, Frame, LinkFault, LinkMachine, decode_fields,
    encode_frame, encode_header, guess_protocol, is_proof, prove,
)  # fmt: skip
from _tcprelay.text import shown

HANDSHAKE = [(CLIENT, HELLO), (SERVER, WELCOME)]
TO_SPLICED = [*HANDSHAKE, (SERVER, START), (CLIENT, READY)]


def machine_after(steps: list[tuple[str, int]], role: str = SERVER) -> LinkMachine:
    """A machine that has seen these frames, given as (sender, kind)."""
    machine = LinkMachine(role)
    for sender, kind in steps:
        (machine.send if sender == role else machine.receive)(kind)
    return machine


@pytest.mark.parametrize("role", [CLIENT, SERVER])
@pytest.mark.parametrize(
    ("steps", "state"),
    [
        (HANDSHAKE, IDLE),
        ([(CLIENT, HELLO), (SERVER, CHALLENGE), (CLIENT, AUTH), (SERVER, WELCOME)], IDLE),
        ([*HANDSHAKE, (SERVER, PING), (CLIENT, PONG)], IDLE),
        ([*HANDSHAKE, (SERVER, START), (SERVER, DATA)], OPENING),
        ([*TO_SPLICED, (CLIENT, DATA), (SERVER, DATA)], SPLICED),
        ([*TO_SPLICED, (CLIENT, END)], SPLICED),
        ([*TO_SPLICED, (CLIENT, END), (SERVER, DATA), (SERVER, END)], IDLE),
        ([*TO_SPLICED, (SERVER, ABORT), (CLIENT, ABORT)], IDLE),
        ([*HANDSHAKE, (SERVER, START), (SERVER, END), (CLIENT, READY), (CLIENT, END)], IDLE),
        ([*HANDSHAKE, (SERVER, START), (CLIENT, FAIL), (SERVER, DATA), (SERVER, END)], IDLE),
        ([*HANDSHAKE, (SERVER, START), (SERVER, END), (CLIENT, FAIL)], IDLE),
    ],
)
def test_both_ends_agree_on_the_state(role: str, steps: list[tuple[str, int]], state: str) -> None:
    """The same frames lead client and server to the same state."""
    assert machine_after(steps, role).state == state


def test_a_link_is_idle_again_and_can_carry_another_connection() -> None:
    """After END both ways everything begins anew."""
    once = [(SERVER, START), (CLIENT, READY), (SERVER, END), (CLIENT, END)]
    machine = machine_after([*HANDSHAKE, *once, *once, (SERVER, PING)])
    assert machine.state == IDLE


def test_an_end_is_final() -> None:
    """No DATA, END or ABORT comes after a direction's END."""
    for kind in (DATA, END, ABORT):
        with pytest.raises(LinkFault, match=f"{FRAME_NAMES[kind]} from the client where the link is spliced"):
            machine_after([*TO_SPLICED, (CLIENT, END), (CLIENT, kind)])


def test_a_start_that_crossed_bye_is_still_served() -> None:
    """BYE from the client does not end a connection that was started meanwhile; afterwards it is leaving."""
    machine = machine_after([*HANDSHAKE, (SERVER, START), (CLIENT, BYE), (CLIENT, READY), (CLIENT, END), (SERVER, END)])
    assert (machine.state, machine.leaving) == (IDLE, True)


def test_whatever_the_table_does_not_allow_is_a_fault() -> None:
    """In each state every other frame of the peer raises `LinkFault` and changes nothing."""
    allowed = {
        (): {HELLO},
        ((CLIENT, HELLO),): set[int](),
        ((CLIENT, HELLO), (SERVER, CHALLENGE)): {AUTH},
        tuple(HANDSHAKE): {PONG, BYE},
        (*HANDSHAKE, (SERVER, START)): {PONG, BYE, READY, FAIL},
        tuple(TO_SPLICED): {DATA, END, ABORT},
    }
    for steps, kinds in allowed.items():
        for kind in set(FRAME_NAMES) - kinds - {REFUSED}:
            machine = machine_after(list(steps))
            before = machine.state
            with pytest.raises(LinkFault):
                machine.check(kind, 0)
            with pytest.raises(LinkFault):
                machine.receive(kind)
            assert machine.state == before


def test_a_header_is_judged_before_its_body() -> None:
    """An unknown type and a control frame that is too long are faults as soon as the header is there."""
    machine = machine_after(TO_SPLICED)
    machine.check(DATA, MAX_DATA)
    with pytest.raises(LinkFault, match="unknown frame type 71"):
        machine.check(71, 0)
    with pytest.raises(LinkFault, match=f"END of {MAX_CONTROL + 1} bytes is longer than {MAX_CONTROL}"):
        machine.check(END, MAX_CONTROL + 1)


@pytest.mark.parametrize(
    "body",
    [
        b"x", b"[]", b"1", b'"a"', b"{", b"\xff\xfe", b'{"a":}', b"[" * 4096, b'{"a":' * 800, b"1e", b"nul",
        b"9" * 4096,
    ],
)  # fmt: skip
def test_a_body_that_is_no_flat_json_object_is_a_fault(body: bytes) -> None:
    """Whatever the body, the answer is `LinkFault`."""
    with pytest.raises(LinkFault):
        decode_fields(HELLO, body)


def test_mutated_frames_raise_nothing_but_faults() -> None:
    """A good body with random bytes changed is either an object or a fault."""
    rng = random.Random(1)
    good = json.dumps({"version": 1, "service": "web", "idle": 8, "nonce": "00ff"}).encode()
    for _ in range(5000):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        try:
            fields = decode_fields(HELLO, bytes(body))
            frame = Frame(HELLO, len(body), fields)
            frame.text("service")
            frame.number("idle", 1, 100)
        except LinkFault:
            pass


@pytest.mark.parametrize("value", ["1e999", "NaN", "-1", "true", '"8"', "null", "[]", "1" + "0" * 400])
def test_numbers_of_a_peer_are_bounded(value: str) -> None:
    """A number field is a number within its bounds, or a fault."""
    frame = Frame(HELLO, 0, json.loads(f'{{"idle": {value}}}'))
    try:
        assert 0 <= frame.number("idle", 1, 1000) <= 1000
    except LinkFault:
        pass


def test_frames_say_their_type_and_length() -> None:
    """A type byte, three bytes of length, a compact JSON object or nothing."""
    assert encode_frame(PING) == b"\x06\x00\x00\x00"
    assert encode_frame(FAIL, {"reason": "x"}) == b"\x0a\x00\x00\x0e" + b'{"reason":"x"}'
    assert encode_header(DATA, MAX_DATA) == b"\x0b\xff\xff\xff"
    with pytest.raises(ValueError, match="FAIL of 5013 bytes is longer"):
        encode_frame(FAIL, {"reason": "x" * 5000})


def test_a_proof_depends_on_every_part() -> None:
    """Another token, role, nonce, service or client gives another proof, wherever the parts are divided."""
    parts = ("a", "b", "service", "client")
    proofs = {prove(token, role, *parts) for token, role in itertools.product((b"t", b"u"), (CLIENT, SERVER))}
    for i in range(4):
        changed = list(parts)
        changed[i] += "x"
        proofs.add(prove(b"t", CLIENT, *changed))
    proofs.add(prove(b"t", CLIENT, "ab", "", "service", "client"))
    assert len(proofs) == 9


def test_a_proof_is_compared_as_bytes() -> None:
    """Anything that JSON can hold may be compared, and only the right proof passes."""
    expected = prove(b"t", CLIENT, "a", "b", "s", "c")
    assert is_proof(expected, expected)
    assert not any(is_proof(given, expected) for given in ("", "é", "\ud800", expected.upper(), expected[:-1]))


def test_strings_of_a_peer_are_escaped_and_cut() -> None:
    """No newline, escape sequence or endless text reaches the log."""
    assert shown("a\nb\x1b[31m\u202e") == r"a\nb\x1b[31m\u202e"
    assert len(shown("\U0001f600" * 1000)) == 120


@pytest.mark.parametrize(
    ("start", "guess"),
    [(b"GET / HT", "HTTP"), (b"\x16\x03\x01", "TLS"), (b"SSH-2.0", "SSH"), (b"\x00", "something else")],
)
def test_other_protocols_are_recognised(start: bytes, guess: str) -> None:
    """The log can say what somebody speaks on the relay port."""
    assert guess_protocol(start) == guess
