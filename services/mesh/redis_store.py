"""Redis as Baton uses it: small scripts that Redis runs whole, many in one round trip. The only file that imports redis-py.

Everything that can go wrong there, from a refused connection to a server that may not write, is PeerUnavailable: Redis is optional at
run time, and callers go on without it. Nothing is retried here; who calls knows whether a second try means the same.
Knows nothing of what the scripts do.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from services.core.errors import ConfigurationError, PeerUnavailable

TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the name under which Redis keeps it."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptCall:
    """One run of a script. All keys must live in one slot of a cluster: give them a common {tag}."""

    script: Script
    keys: Sequence[str]
    args: Sequence[str | bytes | int] = ()


class RedisStore:
    """Connections to the Redis at `url`. `async with` closes them; they are opened when first used."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """Raises ConfigurationError when `url` is none (redis://, rediss:// or unix://)."""
        try:
            self._client = redis.asyncio.Redis.from_url(
                url,
                protocol=2,
                # With a socket_timeout redis-py sends through asyncio.wait_for, which in Python 3.11 may swallow a cancellation:
                # a task that cannot be ended. Time is kept below instead.
                socket_timeout=None,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigurationError([f"redis_url: {error}"]) from error
        self._timeout_s = timeout_s

    async def __aenter__(self) -> "RedisStore":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.aclose()

    async def run(self, calls: Sequence[ScriptCall], *, timeout_s: float | None = None) -> list[Any]:
        """Runs the calls in order, in one round trip, each by itself atomic; returns what each returned.

        timeout_s   for all of it; None: the store's own
        Raises PeerUnavailable when one of them failed; others may have run then.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                results = await self._execute(calls)
                missing = [index for index, result in enumerate(results) if isinstance(result, NoScriptError)]
                if missing:  # a Redis that was restarted has forgotten its scripts
                    for script in {calls[index].script for index in missing}:
                        await self._client.script_load(script.text)
                    again = await self._execute([calls[index] for index in missing])
                    for index, result in zip(missing, again, strict=True):
                        results[index] = result
        except TimeoutError as error:
            raise PeerUnavailable(f"redis: no answer within {timeout_s} s") from error
        except (RedisError, OSError, RuntimeError) as error:  # uvloop says the last when the connection was reset since it was last used
            raise PeerUnavailable(f"redis: {error}") from error
        for result in results:
            if isinstance(result, RedisError):
                raise PeerUnavailable(f"redis: {result}") from result
        return results

    async def _execute(self, calls: Sequence[ScriptCall]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for call in calls:
                pipeline.execute_command("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.args)
            return await pipeline.execute(raise_on_error=False)
