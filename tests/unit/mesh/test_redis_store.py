"""The store over a real server: scripts in order, and one error for whatever is wrong with Redis."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from services.core.errors import ConfigurationError, PeerUnavailable
from services.mesh.redis_server import RedisServer
from services.mesh.redis_store import RedisStore, Script, ScriptCall

ECHO = Script("return {KEYS[1], ARGV[1]}")
COUNT = Script("return redis.call('INCR', KEYS[1])")
WRONG = Script("return redis.call('INCR', KEYS[1], 'too', 'many')")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def count(key: str) -> ScriptCall:
    return ScriptCall(script=COUNT, keys=[key])


def test_run_when_several_scripts_are_given_then_returns_their_results_in_order(server: RedisServer) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store:
            calls = [count("a"), ScriptCall(script=ECHO, keys=["k"], args=[b"\x00\xff"]), count("a")]
            assert await store.run(calls) == [1, [b"k", b"\x00\xff"], 2]

    asyncio.run(test())


def test_run_when_the_server_has_forgotten_a_script_then_loads_it_again(server: RedisServer) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store:
            assert await store.run([count("b")]) == [1]
            await store.run([ScriptCall(script=Script("return redis.call('DEL', KEYS[1])"), keys=["b"])])
            server.stop()
            server.start()
            with pytest.raises(PeerUnavailable):
                await store.run([count("b")])  # the connection was the old server's
        async with RedisStore(server.url) as store:
            assert await store.run([count("b"), count("b")]) == [1, 2]

    asyncio.run(test())


def test_run_when_a_script_fails_then_raises_peer_unavailable_with_redis_words(server: RedisServer) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store:
            with pytest.raises(PeerUnavailable, match=r"redis: [Ww]rong number of arg"):
                await store.run([count("c"), ScriptCall(script=WRONG, keys=["c"])])
            assert await store.run([count("c")]) == [2]

    asyncio.run(test())


def test_run_when_nobody_listens_then_raises_peer_unavailable() -> None:
    with RedisServer() as gone:
        url = gone.url

    async def test() -> None:
        async with RedisStore(url) as store:
            with pytest.raises(PeerUnavailable, match="redis: "):
                await store.run([count("d")])

    asyncio.run(test())


def test_run_when_the_server_is_frozen_then_gives_up_after_the_timeout() -> None:
    async def test(server: RedisServer) -> None:
        async with RedisStore(server.url, timeout_s=0.2) as store:
            await store.run([count("e")])
            os.kill(server.pid, signal.SIGSTOP)
            started = time.monotonic()
            with pytest.raises(PeerUnavailable, match=r"no answer within 0\.2 s"):
                await store.run([count("e")])
            assert time.monotonic() - started < 5
            os.kill(server.pid, signal.SIGCONT)
            assert await store.run([count("f")]) == [1]

    with RedisServer() as server:
        asyncio.run(test(server))


def test_run_when_cancelled_at_any_moment_then_the_task_ends(server: RedisServer) -> None:
    """redis-py's own timeouts swallowed one cancellation in four; each missed one here is a task that runs for ever."""

    async def run_forever(store: RedisStore) -> None:
        while True:
            await store.run([count("g")])

    async def test() -> None:
        chance = random.Random(0)
        async with RedisStore(server.url) as store:
            for _ in range(100):
                task = asyncio.create_task(run_forever(store))
                await asyncio.sleep(chance.random() * 0.003)
                task.cancel()
                await asyncio.wait((task,), timeout=5)
                assert task.cancelled()

    asyncio.run(test())


def test_store_when_the_url_is_none_then_raises_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="redis_url"):
        RedisStore("http://127.0.0.1")


def test_run_when_the_connection_was_reset_at_this_moment_then_raises_peer_unavailable_once(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop says so with a RuntimeError as it writes, which once ended routers and indexes."""

    def closed(data: object) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True reading=False>; the handler is closed")

    async def test() -> None:
        async with RedisStore(server.url) as store:
            [first] = await store.run([count("reset")])
            [connection] = store._client.connection_pool._available_connections
            monkeypatch.setattr(connection._writer, "writelines", closed)
            with pytest.raises(PeerUnavailable, match="the handler is closed"):
                await store.run([count("reset")])
            assert await store.run([count("reset")]) == [first + 1], "and it is connected again"

    asyncio.run(test())
