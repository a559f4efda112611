"""The network of a simulated mesh: a link at each worker, whose capacity the transfers over it share. KV blocks leave as they are computed.

A transfer runs at the smaller of two equal shares, its sender's outgoing and its receiver's incoming one; both directions are full speed.
What a transfer cannot use of a share is not given to others, as max-min fairness would: links are used a little less than they could be.
Nothing is lost, there is no latency, and what lies between the links is never short.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loadtest.sim.events import Events

ROUNDING_S = 1e-9  # hours of virtual time are kept to within less


@dataclass(slots=True, eq=False)
class _Port:
    """One direction of a worker's link: who is sending over it."""

    transfers: "dict[Transfer, None]"


class Transfer:
    """Bytes from one worker to another; they may be there to be sent one part after the other."""

    def __init__(self, links: "Links", sender: _Port, receiver: _Port, on_done: Callable[[], None]) -> None:
        self.ports = (sender, receiver)
        self.left_bytes = 0.0
        self.rate = 0.0  # bytes/s
        self.since_s = 0.0  # left_bytes and rate hold from then on
        self.plan = 0
        self.is_closed = False
        self._links = links
        self.on_done = on_done

    def feed(self, num_bytes: int) -> None:
        """So many more can be sent."""
        assert not self.is_closed
        if num_bytes:
            self._links.fed(self, num_bytes)

    def close(self) -> None:
        """No more will come; `on_done` is called when the last byte has arrived, at once if it has."""
        self.is_closed = True
        if not self.left_bytes:
            self.on_done()


class Links:
    """`bytes_per_s` of each worker's link, in each direction."""

    def __init__(self, events: Events, *, bytes_per_s: float) -> None:
        assert bytes_per_s > 0.0
        self.bytes_per_s = bytes_per_s
        self.sent_bytes = 0.0
        self._events = events
        self._out: dict[str, _Port] = {}
        self._in: dict[str, _Port] = {}

    def open(self, sender_id: str, receiver_id: str, *, on_done: Callable[[], None]) -> Transfer:
        """A transfer without bytes."""
        sender = self._out.setdefault(sender_id, _Port({}))
        return Transfer(self, sender, self._in.setdefault(receiver_id, _Port({})), on_done)

    def rates(self) -> dict[str, float]:
        """Bytes/s that now flow out of ("> worker") and into ("< worker") each worker."""
        directions = ((">", self._out), ("<", self._in))
        return {f"{sign} {name}": sum(t.rate for t in port.transfers) for sign, ports in directions for name, port in ports.items()}

    def fed(self, transfer: Transfer, num_bytes: int) -> None:
        """Of Transfer.feed."""
        if not transfer.left_bytes:
            for port in transfer.ports:
                port.transfers[transfer] = None
            transfer.since_s = self._events.now_s
            transfer.left_bytes = num_bytes
            self._share(transfer)
        else:
            self._settle(transfer)
            transfer.left_bytes += num_bytes
            self._plan(transfer)

    def _share(self, changed: Transfer) -> None:
        """New rates for all that have a port in common with this one."""
        neighbours = dict.fromkeys(transfer for port in changed.ports for transfer in port.transfers)
        for transfer in neighbours:
            rate = min(self.bytes_per_s / len(port.transfers) for port in transfer.ports)
            if rate != transfer.rate:
                self._settle(transfer)
                transfer.rate = rate
                self._plan(transfer)

    def _settle(self, transfer: Transfer) -> None:
        now_s = self._events.now_s
        sent = min(transfer.left_bytes, transfer.rate * (now_s - transfer.since_s))
        self.sent_bytes += sent
        transfer.left_bytes -= sent
        transfer.since_s = now_s

    def _plan(self, transfer: Transfer) -> None:
        transfer.plan += 1
        self._events.at(self._events.now_s + transfer.left_bytes / transfer.rate, partial(self._drained, transfer, transfer.plan))

    def _drained(self, transfer: Transfer, plan: int) -> None:
        if plan != transfer.plan:
            return
        self._settle(transfer)
        assert transfer.left_bytes <= transfer.rate * ROUNDING_S
        self.sent_bytes += transfer.left_bytes
        transfer.left_bytes = transfer.rate = 0.0
        for port in transfer.ports:
            del port.transfers[transfer]
        self._share(transfer)
        if transfer.is_closed:
            transfer.on_done()
