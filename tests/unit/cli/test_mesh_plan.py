"""From options to processes: the settings that each gets are those that its own loader reads, and nothing else of ours."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.cli.mesh_plan import SETTINGS, STAGES, MeshOptions, MeshPlan, plan_mesh
from services.cli.ports import ReservedPorts
from services.core.errors import CheckpointError, ConfigurationError, InvalidRequest
from services.engine.demo import TARGET_DIR
from services.mesh.config import load_settings

ENVIRON = {"PATH": "/bin", "HOME": "/home", "BATON_LISTEN": "elsewhere:1", "BATON_ROUTER": "elsewhere:2"}


@pytest.fixture
def ports() -> Iterator[ReservedPorts]:
    with ReservedPorts() as reserved:
        yield reserved


def settings_of(plan: MeshPlan, name: str) -> Any:
    """What the process itself would read."""
    spec = next(spec for spec in plan.specs if spec.name == name)
    return load_settings(SETTINGS[spec.role], spec.environment)


def test_plan_when_nothing_is_said_has_two_of_each_worker_one_router_one_index_and_a_redis(ports: ReservedPorts) -> None:
    plan = plan_mesh(MeshOptions(), ports, ENVIRON)
    names = [spec.name for spec in plan.specs]
    assert names == ["redis", "kv_index", "prefill-0", "prefill-1", "decode-0", "decode-1", "router-0"]
    assert list(plan.worker_ids) == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert {spec.role for spec in plan.specs} == {role for stage in STAGES for role in stage}
    router, decode, index = (settings_of(plan, name) for name in ("router-0", "decode-1", "kv_index"))
    redis_port = plan.specs[0].command[plan.specs[0].command.index("--port") + 1]
    assert router.redis_url == decode.redis_url == index.redis_url == f"redis://127.0.0.1:{redis_port}/0"
    assert router.kv_index == decode.kv_index == (index.listen,)
    assert (router.model, router.served_model_name, router.router_id) == ("demo", "demo", "router-0")
    assert (decode.model, decode.served_model_name, decode.worker_id) == ("demo", "demo", "decode-1")
    assert plan.model_name == "demo" and list(plan.routers) == [router.listen]
    assert len({settings_of(plan, name).listen for name in names[1:]}) == len(names) - 1


def test_plan_when_it_inherits_an_environment_passes_everything_on_but_our_own_variables(ports: ReservedPorts) -> None:
    plan = plan_mesh(MeshOptions(), ports, {**ENVIRON, "PYTHONPATH": "/mine"})
    for spec in plan.specs:
        assert spec.environment["HOME"] == "/home"
        assert "BATON_ROUTER" not in spec.environment
        assert spec.environment.get("BATON_LISTEN") != "elsewhere:1"
        # A process finds our code wherever the command was given, and nothing of that place.
        assert spec.environment["PYTHONPATH"] == f"{Path(__file__).parents[3]}:/mine"
        assert spec.name == "redis" or spec.command == (sys.executable, "-P", "-m", f"services.{spec.role}")


def test_plan_when_options_are_given_sets_them_on_the_workers(ports: ReservedPorts) -> None:
    options = MeshOptions(
        served_model_name="mine",
        prefill=1,
        decode=3,
        batch_invariant=True,
        dtype="float32",
        max_model_len=512,
        block_size=32,
        kv_memory_mib=64,
        kv_transport="tcp",
        threads=2,
    )
    plan = plan_mesh(options, ports, ENVIRON)
    assert list(plan.worker_ids) == ["prefill-0", "decode-0", "decode-1", "decode-2"]
    for name in plan.worker_ids:
        worker = settings_of(plan, name)
        assert worker.batch_invariant
        assert (worker.dtype, worker.max_model_len, worker.block_size, worker.kv_memory_bytes) == ("float32", 512, 32, 64 << 20)
        assert (worker.kv_transports, worker.num_threads, worker.served_model_name) == (("tcp",), 2, "mine")
    assert settings_of(plan, "router-0").served_model_name == "mine"


def test_plan_when_there_are_no_prefill_workers_has_decode_workers_alone(ports: ReservedPorts) -> None:
    assert list(plan_mesh(MeshOptions(prefill=0, decode=1), ports, ENVIRON).worker_ids) == ["decode-0"]


def test_plan_when_a_redis_is_given_starts_none(ports: ReservedPorts) -> None:
    plan = plan_mesh(MeshOptions(redis_url="redis://elsewhere:6379/3"), ports, ENVIRON)
    assert "redis" not in [spec.name for spec in plan.specs]
    assert {settings_of(plan, spec.name).redis_url for spec in plan.specs} == {"redis://elsewhere:6379/3"}


def test_plan_when_routers_are_several_gives_them_ports_in_a_row() -> None:
    with ReservedPorts() as free:
        port = free.take()
    with ReservedPorts() as ports:
        plan = plan_mesh(MeshOptions(routers=2, port=port, http_port=port + 2), ports, ENVIRON)
        assert list(plan.routers) == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
        assert list(plan.http) == [f"127.0.0.1:{port + 2}", f"127.0.0.1:{port + 3}"]
        assert [settings_of(plan, name).http_listen for name in ("router-0", "router-1")] == list(plan.http)
        assert settings_of(plan, "router-1").router_id == "router-1"


def test_plan_when_the_model_is_a_directory_passes_its_absolute_path_and_name(
    ports: ReservedPorts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").symlink_to(TARGET_DIR)
    monkeypatch.chdir(tmp_path)
    plan = plan_mesh(MeshOptions(model="tiny"), ports, ENVIRON)
    assert settings_of(plan, "decode-0").model == str(TARGET_DIR.resolve())
    assert plan.model_name == TARGET_DIR.name


def test_plan_when_settings_have_a_role_goes_to_that_role_else_to_all_that_know_them(ports: ReservedPorts) -> None:
    plan = plan_mesh(MeshOptions(settings=("decode.max_num_seqs=8", "MAX_NUM_REQUESTS=9", "log_level=DEBUG")), ports, ENVIRON)
    decode, prefill, router, index = (settings_of(plan, name) for name in ("decode-0", "prefill-0", "router-0", "kv_index"))
    assert (decode.max_num_seqs, prefill.max_num_seqs) == (8, type(prefill)().max_num_seqs)
    assert decode.max_num_requests == prefill.max_num_requests == 9
    assert {each.log_level for each in (decode, prefill, router, index)} == {"DEBUG"}


def test_plan_when_a_setting_says_otherwise_than_an_option_the_setting_wins(ports: ReservedPorts) -> None:
    plan = plan_mesh(MeshOptions(threads=1, settings=("prefill.num_threads=2",)), ports, ENVIRON)
    assert (settings_of(plan, "prefill-0").num_threads, settings_of(plan, "decode-0").num_threads) == (2, 1)


def test_plan_when_drains_may_take_long_waits_longer_than_the_longest(ports: ReservedPorts) -> None:
    plan = plan_mesh(MeshOptions(settings=("drain_timeout_s=2", "router.drain_timeout_s=70")), ports, ENVIRON)
    assert plan.stop_timeout_s > 70


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (MeshOptions(prefill=-1), "--prefill: -1 is outside [0, 64]"),
        (MeshOptions(decode=0), "--decode: 0 is outside [1, 64]"),
        (MeshOptions(routers=65), "--routers: 65 is outside [1, 64]"),
        (MeshOptions(kv_transport="udp"), "--kv-transport: 'udp' is not one of auto, shm, tcp, grpc"),
    ],
)
def test_plan_when_an_option_is_out_of_its_limits_names_it(options: MeshOptions, words: str, ports: ReservedPorts) -> None:
    with pytest.raises(InvalidRequest) as raised:
        plan_mesh(options, ports, ENVIRON)
    assert raised.value.message == words


def test_plan_when_settings_are_wrong_names_all_of_them_once(ports: ReservedPorts) -> None:
    with pytest.raises(ConfigurationError) as raised:
        plan_mesh(MeshOptions(dtype="int8", settings=("router.max_in_flight=many",)), ports, ENVIRON)
    assert raised.value.problems == (
        "prefill: BATON_DTYPE: 'int8' is not one of auto, float32, bfloat16, float16",
        "decode: BATON_DTYPE: 'int8' is not one of auto, float32, bfloat16, float16",
        "router: BATON_MAX_IN_FLIGHT: 'many' is not an integer",
    )
    with pytest.raises(ConfigurationError) as raised:
        plan_mesh(
            MeshOptions(settings=("decode.max_seqs=8", "judge.x=1", "nothing", "nobody=1", "router.listen=h:1", "decode.namespace=a")),
            ports,
            ENVIRON,
        )
    assert raised.value.problems == (
        "--set decode.max_seqs=8: no such setting of decode",
        "--set judge.x=1: 'judge' is not one of router, decode, prefill, kv_index",
        "--set nothing: is not name=value or role.name=value",
        "--set nobody=1: no such setting of any process",
        "--set router.listen=h:1: listen is set by `baton up` itself",
        "--set decode.namespace=a: all of a mesh have one namespace",
    )


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "a/b/c"])
def test_plan_when_the_model_is_not_there_says_so(model: str, ports: ReservedPorts) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        plan_mesh(MeshOptions(model=model), ports, ENVIRON)


def test_plan_when_the_directory_holds_no_model_says_so(ports: ReservedPorts, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        plan_mesh(MeshOptions(model=str(tmp_path)), ports, ENVIRON)
