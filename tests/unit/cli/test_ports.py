"""Reserved ports: nobody is given them, and still their owner's server may come, go and come again."""

import socket

import pytest

from services.cli.ports import HOST, ReservedPorts
from services.core.errors import InvalidRequest


def listen(port: int) -> socket.socket:
    """As servers do: with reuse of the address."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((HOST, port))
    server.listen()
    return server


def test_port_when_reserved_can_be_listened_on_again_and_again() -> None:
    with ReservedPorts() as ports:
        port = ports.take()
        for _ in range(2):
            with listen(port), socket.create_connection((HOST, port)):
                pass


def test_port_when_reserved_is_not_given_to_another_reservation() -> None:
    with ReservedPorts() as ports, ReservedPorts() as others:
        taken = ports.take()
        assert not others._hold(taken, exclusively=True)
    with ReservedPorts() as later:
        assert later._hold(taken, exclusively=True)


def test_ports_when_any_are_taken_are_distinct_and_below_those_of_outgoing_connections() -> None:
    with ReservedPorts() as ports:
        taken = [ports.take() for _ in range(50)]
    with socket.socket() as outgoing:
        outgoing.bind((HOST, 0))
        assert max(taken) < outgoing.getsockname()[1]
    assert len(set(taken)) == 50


def test_port_when_a_server_listens_on_it_is_refused_by_name() -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with listen(port), ReservedPorts() as ports, pytest.raises(InvalidRequest, match=f"--port: {port} is in use"):
        ports.take(port)


def test_port_when_connections_of_its_last_server_linger_can_be_taken_again() -> None:
    with ReservedPorts() as ports:
        port = ports.take()
    server = listen(port)
    client = socket.create_connection((HOST, port))
    accepted, _ = server.accept()
    accepted.close()  # the side that closes first keeps the port in TIME_WAIT
    client.close()
    server.close()
    with ReservedPorts() as ports:
        assert not ports._hold(port, exclusively=True), "nothing lingers: the test tests nothing"
        assert ports.take(port) == port


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_when_it_is_none_names_the_limit(port: int) -> None:
    with ReservedPorts() as ports, pytest.raises(InvalidRequest, match=r"--port: -?\d+ is outside \[1, 65535\]"):
        ports.take(port)
