"""`baton demo`: a whole mesh on this machine for as long as four prompts take, with a timeline of each.

The prompts begin with the same few hundred tokens of Python, so that only the first one is computed from its start.
"""

import asyncio
import json
import os
import shutil
import time
import urllib.request
from dataclasses import dataclass, field

from rich.console import Console

from protos.baton.v1 import common_pb2, inference_pb2
from services.cli.mesh_plan import MeshOptions, plan_mesh
from services.cli.mesh_run import run_mesh
from services.cli.ports import ReservedPorts
from services.cli.remote import Ended, RouterClient
from services.cli.start_board import StartBoard
from services.cli.timeline import size, timeline
from services.cli.up import curl_line, make_log_dir
from services.core.errors import BatonError, PeerUnavailable

MAX_TOKENS = 48
TIMEOUT_S = 60.0

SHARED_PREFIX = '''"""A small store of records in JSON files: one file for each record, written in one step, read when it is asked for."""

import json
import os
import tempfile


class StoreError(Exception):
    """Base class of all errors of this module."""


class RecordNotFound(StoreError):
    """There is no record of that name."""

    def __init__(self, name):
        super().__init__("no such record: %r" % name)
        self.name = name


class Store:
    """Records below one directory. Not safe for use by several processes."""

    def __init__(self, directory, *, encoding="utf-8"):
        self.directory = directory
        self.encoding = encoding
        os.makedirs(directory, exist_ok=True)

    def path(self, name):
        """Return the path of the file that holds the record."""
        if not name or name.startswith(".") or os.sep in name:
            raise ValueError("bad record name: %r" % name)
        return os.path.join(self.directory, name + ".json")

    def read(self, name):
        """Return the record, or raise RecordNotFound."""
        try:
            with open(self.path(name), encoding=self.encoding) as file:
                return json.load(file)
        except FileNotFoundError:
            raise RecordNotFound(name) from None

    def write(self, name, record):
        """Write the record to a temporary file, then put that in the place of the old one."""
        handle, path = tempfile.mkstemp(dir=self.directory)
        with os.fdopen(handle, "w", encoding=self.encoding) as file:
            json.dump(record, file, indent=4)
        os.replace(path, self.path(name))

'''
PROMPTS = ("    def delete(self, name):\n", "    def names(self):\n", "    def __contains__(self, name):\n", "\ndef main(args):\n")


@dataclass(slots=True)
class _Totals:
    kv_blocks: int = 0
    kv_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    transports: set[str] = field(default_factory=set)

    def add(self, ended: Ended) -> None:
        self.kv_blocks += ended.timing.kv_blocks
        self.kv_bytes += ended.timing.kv_bytes
        self.prompt_tokens += ended.usage.prompt_tokens
        self.cached_tokens += ended.usage.cached_tokens
        self.output_tokens += ended.usage.completion_tokens
        self.transports |= {ended.timing.kv_transport} - {""}

    def __str__(self) -> str:
        over = f" over {', '.join(sorted(self.transports))}" if self.transports else ""
        share = self.cached_tokens / max(1, self.prompt_tokens)
        return (
            f"{self.kv_blocks} KV blocks ({size(self.kv_bytes)}) moved{over}; {self.cached_tokens:,} of {self.prompt_tokens:,}"
            f" prompt tokens ({share:.0%}) were in a cache; {self.output_tokens} tokens made"
        )


def demo() -> None:
    """Starts a mesh on the demo model, sends it a few prompts that share a prefix, shows where the time went, stops it."""
    console = Console(highlight=False)
    began = time.monotonic()
    with ReservedPorts() as ports:
        # A model this small computes a prompt faster than the blocks can be sent for; the demo is there to show them travel.
        plan = plan_mesh(MeshOptions(settings=("router.max_local_tokens=0",)), ports, os.environ)
        logs = make_log_dir(None)

        async def work() -> None:
            await _send_prompts(console, plan.routers[0])
            await _call_http(console, plan.http[0])

        try:
            run_mesh(plan, log_dir=logs, board=StartBoard([spec.name for spec in plan.specs], console), work=work)
        except BatonError as error:
            raise PeerUnavailable(f"{error.message}\nlogs: {logs}") from error
    shutil.rmtree(logs)
    console.print(f"everything has stopped; {time.monotonic() - began:.1f} s from start to end")


async def _send_prompts(console: Console, router: str) -> None:
    totals = _Totals()
    began = time.monotonic()
    console.print("\nEach prompt goes by way of a prefill worker here, even where decode would be faster by itself.")
    async with RouterClient(router) as client:
        for number, prompt in enumerate(PROMPTS, start=1):
            request = inference_pb2.GenerateRequest(
                prompt=inference_pb2.Prompt(text=SHARED_PREFIX + prompt),
                sampling=common_pb2.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.6, seed=number, ignore_eos=True),
                include_timing=True,
            )
            console.rule(f"prompt {number} of {len(PROMPTS)}: the shared prefix, and")
            console.print(prompt, end="", style="bold", markup=False)

            def show(response: inference_pb2.GenerateResponse) -> None:
                console.print(response.text, end="", markup=False, soft_wrap=True)

            ended = await client.generate(request, timeout_s=TIMEOUT_S, show=show)
            console.print("\n")
            for line in timeline(ended.timing, ended.usage):
                console.print(line, no_wrap=True, crop=False)
            totals.add(ended)
    console.rule()
    console.print(f"{len(PROMPTS)} requests in {time.monotonic() - began:.1f} s: {totals}", markup=False)


async def _call_http(console: Console, http: str) -> None:
    """The same mesh as OpenAI's clients see it."""
    request = {"prompt": "def main(", "max_tokens": 16, "temperature": 0}
    console.print(f"\nAnd over HTTP:\n  {curl_line(http, request)}", markup=False, soft_wrap=True)
    console.print(await asyncio.to_thread(_post, f"http://{http}/v1/completions", request), markup=False, soft_wrap=True)


def _post(url: str, body: object) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        text: str = response.read().decode()
        return text
