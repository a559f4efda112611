"""The calls that the README shows, as they stand there, against a mesh on the demo model."""

import asyncio
import json
import re
import shlex
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.mesh import Mesh

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:50051"
HTTP_ADDRESS = "127.0.0.1:8000"


def block(language: str, containing: str) -> str:
    """The README's code block in a language that contains a word."""
    blocks = [text for kind, text in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL) if kind == language and containing in text]
    assert len(blocks) == 1
    return str(blocks[0])


def run(client: Any, *, http: bool = False) -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            router = await mesh.router([await mesh.prefill("p0"), await mesh.decode("d0")], http=True)
            await client(mesh.http_address(router) if http else router)

    asyncio.run(main())


def test_python_client_when_run_as_it_stands_prints_text_usage_and_time() -> None:
    program = block("python", "Generate(")
    assert len([line for line in program.splitlines() if line.strip()]) <= 20

    async def client(router: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program.replace(ADDRESS, router), cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        assert re.search(r"\n32 tokens, first one after \d+ ms\n$", out.decode()), out.decode()

    run(client)


def test_grpcurl_call_when_made_through_reflection_gives_the_text() -> None:
    """With grpcurl itself where it is installed; else the same call by the same means: reflection, JSON in, JSON out."""
    words = shlex.split(block("sh", "grpcurl"))
    assert words[:3] == ["grpcurl", "-plaintext", "-d"]
    assert words[4] == ADDRESS
    data, method = words[3], words[5]

    async def client(router: str) -> None:
        if shutil.which("grpcurl"):
            command = [router if word == ADDRESS else word for word in words]
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            text = (await process.communicate())[0].decode()
            assert process.returncode == 0
            answers = [json.loads(part) for part in re.split(r"(?<=\n\})\n", text) if part.strip()]
        else:
            answers = await asyncio.to_thread(call_by_reflection, router, method, data)
        assert "".join(answer.get("text", "") for answer in answers)
        assert answers[-1]["usage"]["completionTokens"] == 16

    run(client)


def call_by_reflection(address: str, method: str, data: str) -> list[dict[str, Any]]:
    """What grpcurl does: asks the server for its descriptors, and nobody else."""
    with grpc.insecure_channel(address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service, _, name = method.rpartition("/")
        descriptor = pool.FindServiceByName(service).FindMethodByName(name)
        request = json_format.Parse(data, message_factory.GetMessageClass(descriptor.input_type)())
        call: Any = channel.unary_stream(
            f"/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(descriptor.output_type).FromString,
        )
        return [json_format.MessageToDict(response) for response in call(request)]


def test_openai_client_when_run_as_it_stands_prints_text() -> None:
    program = block("python", "openai")
    assert len([line for line in program.splitlines() if line.strip()]) <= 6

    async def client(address: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program.replace(HTTP_ADDRESS, address), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        assert out.decode().strip()

    run(client, http=True)


def test_curl_lines_when_run_as_they_stand_answer() -> None:
    """With curl itself where it is installed; else the same requests."""
    lines = block("sh", "curl http").strip().splitlines()

    async def client(address: str) -> None:
        models, whole, streamed = [await call(shlex.split(line.replace(HTTP_ADDRESS, address))) for line in lines]
        assert json.loads(models)["data"][0]["id"] == "demo"
        assert json.loads(whole)["choices"][0]["text"]
        chunks = [event.removeprefix("data: ") for event in streamed.strip().split("\n\n")]
        assert chunks.pop() == "[DONE]"
        assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)

    async def call(words: list[str]) -> str:
        assert words[0] == "curl"
        if shutil.which("curl"):
            process = await asyncio.create_subprocess_exec(*words, "-sS", stdout=asyncio.subprocess.PIPE)
            text = (await process.communicate())[0].decode()
            assert process.returncode == 0
            return text
        url = next(word for word in words if word.startswith("http://"))
        header, data = (words[words.index(flag) + 1] if flag in words else "" for flag in ("-H", "-d"))
        return await asyncio.to_thread(call_without_curl, url, header, data)

    run(client, http=True)


def call_without_curl(url: str, header: str, data: str) -> str:
    name, _, value = header.partition(": ")
    request = urllib.request.Request(url, data.encode() or None, {name: value} if name else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.read().decode())
