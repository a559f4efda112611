"""The calls that the README shows, as they stand there, against a mesh on the demo model."""

import asyncio
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.mesh import Mesh

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:50051"


def block(language: str, containing: str) -> str:
    """The README's code block in a language that contains a word."""
    blocks = [text for kind, text in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL) if kind == language and containing in text]
    assert len(blocks) == 1
    return str(blocks[0])


def run(client: Any) -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            router = await mesh.router([await mesh.prefill("p0"), await mesh.decode("d0")])
            await client(router)

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
