"""devices/channel.py: lines of process 0, and the end of all where one dies."""

import socket
import threading

import pytest
from several_processes import Runs, ended

from neo_jax.devices import channel
from neo_jax.devices.channel import Channel
from neo_jax.errors import NeoError


@pytest.fixture
def pair():
    """Both ends of a channel, and which of them has lost the other."""
    lost = {"near": [], "far": []}
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    ends = [
        Channel([each], lambda found=found: found.append(threading.current_thread().name))
        for each, found in zip((near, far), lost.values(), strict=True)
    ]
    yield *ends, lost
    near.close()
    far.close()


def test_lines_come_in_order_until_the_end(pair):
    near, far, lost = pair
    long = b"x" * 10**6
    sender = threading.Thread(target=lambda: [near.send(b"%d" % i) for i in range(100)])
    sender.start()
    lines = far.lines()
    assert [next(lines) for _ in range(100)] == [b"%d" % i for i in range(100)]
    sender.join()
    near.send(long)
    far.send(b"back")
    near.close()
    assert [*lines] == [long]
    assert next(near.lines()) == b"back"
    far._sockets[0].shutdown(socket.SHUT_RDWR)  # it may leave now
    assert [*near.lines()] == []
    assert lost == {"near": [], "far": []}


@pytest.mark.parametrize("last", [b"", b"half a li"])
def test_a_connection_that_breaks_is_a_loss(pair, last):
    near, far, lost = pair
    near.send(b"whole")
    near._sockets[0].sendall(last)
    near._sockets[0].shutdown(socket.SHUT_WR)
    lines = far.lines()
    assert next(lines) == b"whole"
    with pytest.raises(ConnectionError):
        next(lines)
    assert lost == {"near": [], "far": ["channel"]}


def test_sending_to_nobody_is_a_loss_once(pair):
    near, far, lost = pair
    far._sockets[0].shutdown(socket.SHUT_RDWR)
    for _ in range(3):
        near.send(b"x" * 10**6)
    assert len(lost["near"]) == 1


def test_who_does_not_know_the_secret_is_turned_away(monkeypatch):
    monkeypatch.setattr(channel, "_GREETING", 0.2)
    server = channel._listen()
    port = server.getsockname()[1]
    strangers = [socket.create_connection(("localhost", port)) for _ in range(3)]
    strangers[0].sendall(b"wrong" * 20)
    strangers[1].close()
    known = socket.create_connection(("localhost", port))
    known.sendall(b"0123456789abcdef")
    (found,) = channel._accept(server, b"0123456789abcdef", 1, 10)
    assert found.getpeername()[1] == known.getsockname()[1]
    with pytest.raises(NeoError, match=r"1 of 1 processes did not reach port \d+ of process 0"):
        channel._accept(server, b"0123456789abcdef", 1, 0.1)
    for each in (*strangers, known, found, server):
        each.close()


def test_a_secret_may_come_in_pieces():
    with channel._listen() as server:
        known = socket.create_connection(("localhost", server.getsockname()[1]))
        known.sendall(b"0123")
        threading.Timer(0.1, known.sendall, [b"456789abcdef"]).start()
        (found,) = channel._accept(server, b"0123456789abcdef", 1, 1)
        assert found.getpeername()[1] == known.getsockname()[1]
    found.close()
    known.close()


def test_three_processes(tmp_path):
    """Process 0 hears of all others, all hear it, and one that dies takes the others with it."""
    script = """
import os, signal, sys
import jax
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.devices.channel import connect
_, address, _, count, _, index, *_ = sys.argv[1:]
with ClusterOptions(address, int(count), int(index)).joined(True, then="") as lose:
    channel = connect(lose)
    if index == "0":
        channel.send(b"hello")
        lines = channel.lines()
        print(sorted(next(lines) for _ in range(2)))
        channel.send(b"and now")
        next(lines)
    else:
        channel.send(index.encode())
        lines = channel.lines()
        assert next(lines) == b"hello" and next(lines) == b"and now"
        if index == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        next(lines)
"""
    with Runs(tmp_path) as start:
        first, second, third = start("-c", script, count=3, come=3, devices=1)
        assert ended(third)[0] == -9
        died = "neo-jax: another process of this run died or cannot be reached; start all of them"
        for process, said in ((first, "[b'1', b'2']\n"), (second, "")):
            assert ended(process) == (1, said, [f"{died} again."])
