"""Settings from an environment: every type, every problem at once, and back."""

import re
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from services.core.errors import CheckpointError, ConfigurationError, InvalidRequest
from services.kv_index.settings import KVIndexSettings
from services.mesh.config import environment_of, load_settings, printable
from services.mesh.server import ProcessSettings
from services.router.settings import RouterSettings
from services.worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    listen: str = "127.0.0.1:0"
    drain_timeout_s: float = 30.0

    def validate(self) -> None:
        if self.drain_timeout_s < 0:
            raise InvalidRequest("drain_timeout_s", f"{self.drain_timeout_s} is negative", limit=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Base):
    block_size: int
    checkpoint: Path | None = None
    cache: Path = Path("/var/cache")
    name: str | None = None
    max_model_len: int | None = None
    threshold: float | None = None
    verbose: bool = False
    strict: bool | None = None
    workers: tuple[str, ...] = ()
    transports: tuple[str, ...] | None = None

    def validate(self) -> None:
        Base.validate(self)
        if self.block_size < 1:
            raise InvalidRequest("block_size", f"{self.block_size} is outside [1, ∞)", limit=1)


def problems_of(environ: dict[str, str], kind: type[Base] = Settings) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(kind, environ)
    return caught.value.problems


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("listen", "[::1]:80", "[::1]:80"),
        ("listen", " a, b ", "a, b"),
        ("name", "demo", "demo"),
        ("block_size", " 16 ", 16),
        ("block_size", "1_024", 1024),
        ("max_model_len", "4096", 4096),
        ("drain_timeout_s", "2", 2.0),
        ("drain_timeout_s", "1e-3", 0.001),
        ("threshold", "-0.5", -0.5),
        ("checkpoint", "~/models/demo", Path("~/models/demo")),
        ("cache", "relative", Path("relative")),
        ("workers", "a:1, b:2 ,,c:3,", ("a:1", "b:2", "c:3")),
        ("workers", "a:1", ("a:1",)),
        ("transports", "shm,tcp", ("shm", "tcp")),
        *[("verbose", text, True) for text in ("1", "true", "Yes", "ON")],
        *[("strict", text, False) for text in ("0", "False", "no", "off")],
    ],
)
def test_load_settings_when_a_variable_is_given_reads_it_as_the_field_is_typed(field: str, text: str, value: object) -> None:
    settings = load_settings(Settings, {"BATON_BLOCK_SIZE": "16", f"BATON_{field.upper()}": text})
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(value)


def test_load_settings_when_variables_are_absent_or_blank_keeps_the_defaults() -> None:
    blank = {f"BATON_{name.upper()}": "  " for name in ("listen", "checkpoint", "max_model_len", "verbose", "workers")}
    assert load_settings(Settings, {"BATON_BLOCK_SIZE": "16", "PATH": "/bin", "baton_x": "", **blank}) == Settings(block_size=16)


@pytest.mark.parametrize(
    ("field", "text", "problem"),
    [
        ("block_size", "16.0", "BATON_BLOCK_SIZE: '16.0' is not an integer"),
        ("max_model_len", "all", "BATON_MAX_MODEL_LEN: 'all' is not an integer"),
        ("drain_timeout_s", "30s", "BATON_DRAIN_TIMEOUT_S: '30s' is not a number"),
        ("threshold", "nan", "BATON_THRESHOLD: 'nan' is not a finite number"),
        ("threshold", "-inf", "BATON_THRESHOLD: '-inf' is not a finite number"),
        ("verbose", "si", "BATON_VERBOSE: 'si' is not one of 1, true, yes, on, 0, false, no, off"),
    ],
)
def test_load_settings_when_a_value_cannot_be_read_says_what_it_is_not(field: str, text: str, problem: str) -> None:
    assert problems_of({"BATON_BLOCK_SIZE": "16"} | {f"BATON_{field.upper()}": text}) == (problem,)


def test_load_settings_when_several_things_are_wrong_lists_them_all() -> None:
    problems = problems_of({"BATON_BLOCKSIZE": "16", "BATON_VERBOSE": "maybe", "BATON_": "", "BATON_DRAIN_TIMEOUT_S": "soon"})
    assert [problem.partition(":")[0] for problem in problems] == [
        "BATON_",
        "BATON_BLOCKSIZE",
        "BATON_DRAIN_TIMEOUT_S",
        "BATON_BLOCK_SIZE",
        "BATON_VERBOSE",
    ]
    assert "no such setting" in problems[1] and "BATON_BLOCK_SIZE, BATON_CACHE" in problems[1]
    assert problems[3] == "BATON_BLOCK_SIZE: is not set and has no default"


def test_load_settings_when_validate_refuses_names_the_variable() -> None:
    assert problems_of({"BATON_BLOCK_SIZE": "0"}) == ("BATON_BLOCK_SIZE: 0 is outside [1, ∞)",)
    assert problems_of({"BATON_BLOCK_SIZE": "1", "BATON_DRAIN_TIMEOUT_S": "-1"}) == ("BATON_DRAIN_TIMEOUT_S: -1.0 is negative",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd(Base):
    def validate(self) -> None:
        if self.listen == "several":
            raise ConfigurationError(["one", "two"])
        if self.listen == "other field":
            raise InvalidRequest("kv_memory", "1 is too little")
        raise CheckpointError("no such file", path=self.listen)


@pytest.mark.parametrize(
    ("listen", "problems"),
    [("several", ("one", "two")), ("other field", ("kv_memory: 1 is too little",)), ("model", ("model: no such file",))],
)
def test_load_settings_when_validate_raises_any_error_of_the_tree_tells_it(listen: str, problems: tuple[str, ...]) -> None:
    assert problems_of({"BATON_LISTEN": listen}, Odd) == problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    numbers: tuple[int, ...] = ()


def test_load_settings_when_a_type_cannot_be_read_from_text_fails_the_programmer() -> None:
    with pytest.raises(AssertionError, match="no way to read"):
        load_settings(Numbers, {"BATON_NUMBERS": "1,2"})


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).map(str.strip).filter(bool)
ITEMS = st.lists(TEXT.map(lambda text: text.replace(",", ";")), max_size=3).map(tuple)
SETTINGS = st.builds(
    Settings,
    listen=TEXT,
    drain_timeout_s=st.floats(0, allow_infinity=False),
    block_size=st.integers(1, 2**70),
    checkpoint=st.none() | TEXT.map(Path),
    cache=TEXT.map(Path),
    name=st.none() | TEXT,
    max_model_len=st.none() | st.integers(),
    threshold=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    verbose=st.booleans(),
    strict=st.none() | st.booleans(),
    workers=ITEMS,
    transports=st.none() | ITEMS.filter(bool),
)


@given(SETTINGS)
def test_environment_of_when_loaded_again_gives_equal_settings(settings: Settings) -> None:
    assert load_settings(Settings, environment_of(settings)) == settings


# What an operator's slip, or a template that was not filled in, may leave in a variable.
ODD = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12) | st.sampled_from(
    ["0", "-1", "1e999", "nan", "9" * 5000, "host:" + "9" * 5000, "true", "[::1]:80", "10.0.0.1:7000", "decode=10.0.0.1:7000", "{}", ","]
)


@pytest.mark.parametrize("kind", [RouterSettings, WorkerSettings, KVIndexSettings])
@given(data=st.data())
def test_load_settings_when_an_environment_is_anything_gives_settings_or_names_each_variable(
    kind: type[ProcessSettings], data: st.DataObject
) -> None:
    names = [f"BATON_{name.upper()}" for name in kind.__dataclass_fields__]
    environ = data.draw(st.dictionaries(st.sampled_from([*names, "BATON_", "BATON_NOBODY", "PATH"]), ODD, max_size=8))
    unknown = {name for name in environ if name in ("BATON_", "BATON_NOBODY")}
    try:
        assert environment_of(load_settings(kind, environ)).keys() <= set(names)
        problems: tuple[str, ...] = ()
    except ConfigurationError as error:
        problems = error.problems
        assert problems
    assert all(problem.startswith("BATON_") for problem in problems)
    assert unknown <= {problem.partition(":")[0] for problem in problems}


def test_worker_settings_when_the_block_size_is_zero_are_refused_and_not_taken_for_unset() -> None:
    with pytest.raises(ConfigurationError, match="BATON_BLOCK_SIZE: 0 is less than 1"):
        load_settings(WorkerSettings, {"BATON_BLOCK_SIZE": "0"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    limit: int | None = 5
    transports: tuple[str, ...] = ("shm",)
    rate: float = 1.0
    name: str = "x"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (Defaults(limit=None), "BATON_LIMIT"),
        (Defaults(transports=()), "BATON_TRANSPORTS"),
        (Defaults(transports=("a,b",)), "BATON_TRANSPORTS"),
        (Defaults(rate=float("inf")), "BATON_RATE"),
        (Defaults(name=" x"), "BATON_NAME"),
        (Settings(block_size=0), "BATON_BLOCK_SIZE"),
    ],
)
def test_environment_of_when_no_text_means_a_value_raises_configuration_error(settings: object, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        environment_of(settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    redis_url: str | None = None
    block_size: int = 16
    model: str = "owner/name@main"
    workers: tuple[str, ...] = ("a:1",)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@cache:6379/0", "redis://***@cache:6379/0"),
        ("rediss://user:se@cret@cache/0", "rediss://***@cache/0"),
        ("redis://cache:6379/0", "redis://cache:6379/0"),
        ("redis://cache:6379/0?password=secret&db=1", "redis://cache:6379/0?password=***&db=1"),
        ("unix:///run/redis.sock?db=1&USERNAME=secret&Password=se@cret", "unix:///run/redis.sock?db=1&USERNAME=***&Password=***"),
        (None, None),
    ],
)
def test_printable_when_an_address_has_a_password_hides_it_and_nothing_else(url: str | None, shown: str | None) -> None:
    settings = Addresses(redis_url=url)
    assert printable(settings) == {"redis_url": shown, "block_size": 16, "model": "owner/name@main", "workers": ("a:1",)}
    assert not re.search("se@?cret", str(printable(settings)))
