"""What the conductor and its sender processes say to each other: a job on the way in, then lines of JSON both ways."""

import msgspec

from loadtest.records import RequestRecord


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """
    url           grpc://host:port, or http(s)://host:port/v1
    model         as clients call it; empty: the one that is served
    endpoint      of HTTP: completions or chat
    first_token   prompts are made of token ids from here below vocab_size
    is_baton      it may be asked where a request's time went
    headers       of HTTP, sent with every request
    """

    url: str
    model: str = ""
    endpoint: str = "completions"
    first_token: int = 0
    vocab_size: int = 0
    is_baton: bool = False
    headers: dict[str, str] = {}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A sender's share: every `num_senders`-th of the requests that come by themselves, with the turns that follow them."""

    schedule: str
    target: Target
    sender: int
    num_senders: int
    timeout_s: float
    prompt_seed: int


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """When the run begins, on time.monotonic()'s clock."""

    start_s: float


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What a sender tells several times a second: requests that have ended since the last time. The first time: it is ready to start.

    error   it cannot do its job
    """

    is_done: bool = False
    error: str = ""
    num_sent: int = 0
    num_open: int = 0
    records: list[RequestRecord] = []
