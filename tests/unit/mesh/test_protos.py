"""The wire's files: stubs are what the pinned tool makes of them, and they keep the rules by which others can rely on them."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[3]
PROTOS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "protos" / "baton" / "v1").glob("*.proto"))
STUBS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
# Numbers of fields in descriptor.proto, of which the paths in source info are made.
SERVICE_OF_FILE, METHOD_OF_SERVICE = 6, 2


def protoc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *arguments, *PROTOS], cwd=ROOT, check=True, timeout=60)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """Every .proto as protoc reads it, comments included."""
    path = tmp_path_factory.mktemp("protos") / "all"
    protoc("--include_source_info", f"--descriptor_set_out={path}")
    return list(descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file)


def test_stubs_when_made_anew_by_the_pinned_tool_are_those_checked_in(tmp_path: Path) -> None:
    assert version("grpcio-tools") == "1.76.0", "stubs are made by the oldest tool whose stubs every later runtime takes"
    protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")
    made = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "protos").rglob("*") if path.name.endswith(STUBS)}
    assert len(made) == len(STUBS) * len(PROTOS)
    assert sorted(made) == sorted(kept)
    changed = [name for name, stub in made.items() if kept[name] != stub]
    assert not changed, "make protos"


def test_services_and_rpcs_when_read_have_prose_above_them(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    bare, num_rpcs = [], 0
    for file in files:
        prose = {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}
        for number, service in enumerate(file.service):
            paths: dict[str, tuple[int, ...]] = {service.name: (SERVICE_OF_FILE, number)}
            for position, method in enumerate(service.method):
                paths[f"{service.name}.{method.name}"] = (SERVICE_OF_FILE, number, METHOD_OF_SERVICE, position)
            bare += [name for name, path in paths.items() if not prose.get(path)]
            num_rpcs += len(service.method)
    assert not bare
    assert num_rpcs >= 9


def test_files_when_read_are_proto3_of_package_baton_v1(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    assert len(files) == len(PROTOS) >= 6
    assert {(file.package, file.syntax) for file in files} == {("baton.v1", "proto3")}


def test_services_when_read_have_names_that_end_in_service(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    names = [service.name for file in files for service in file.service]
    assert len(names) >= 4
    assert [name for name in names if not name.endswith("Service")] == []


def test_rpcs_when_read_have_messages_of_their_own(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    # A message that two rpcs share cannot grow for one of them alone.
    methods = [method for file in files for service in file.service for method in service.method]
    used = [name for method in methods for name in (method.input_type, method.output_type)]
    assert sorted(name for name in set(used) if used.count(name) > 1) == []
    named_for_the_rpc = [(method.input_type == f".baton.v1.{method.name}Request") for method in methods if not method.client_streaming]
    assert all(named_for_the_rpc)


def enums_of(
    message: descriptor_pb2.FileDescriptorProto | descriptor_pb2.DescriptorProto,
) -> list[descriptor_pb2.EnumDescriptorProto]:
    nested = message.message_type if isinstance(message, descriptor_pb2.FileDescriptorProto) else message.nested_type
    return [*message.enum_type, *(enum for inner in nested for enum in enums_of(inner))]


def test_enums_when_read_start_at_unspecified_and_prefix_their_values(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    enums = [enum for file in files for enum in enums_of(file)]
    assert "FinishReason" in [enum.name for enum in enums]
    for enum in enums:
        prefix = "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in enum.name).lstrip("_").upper()
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0)
        assert all(value.name.startswith(f"{prefix}_") for value in enum.value)
