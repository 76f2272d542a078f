"""Connections that do not wait for ever."""

import socket

from moestro.parallel.agent import LOOK_S, keep_limiting, limit_waiting


def pair() -> tuple[socket.socket, socket.socket, socket.socket]:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    return server, client, server.accept()[0]


def limit(connection: socket.socket) -> int:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_connections_get_a_limit_once_and_go_on_working() -> None:
    server, client, other = pair()
    mine, theirs = socket.socketpair()
    assert limit(client) == 0
    assert limit_waiting(7) >= 2
    assert limit(client) == limit(other) == 7000
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
    assert limit_waiting(9) == 0 and limit(client) == 7000
    client.sendall(b"still there")
    assert other.recv(20) == b"still there"
    for each in (server, client, other, mine, theirs):
        each.close()


def test_later_connections_get_it_too() -> None:
    over = keep_limiting(5)
    server, client, other = pair()
    client.settimeout(10)
    try:
        for _ in range(100):
            if limit(client):
                break
            over.wait(LOOK_S / 5)
        assert limit(client) == 5000
    finally:
        over.set()
        for each in (server, client, other):
            each.close()
