"""The tree of errors: every one is caught by its base, has a machine-readable reason of its own and a message for people."""

import pytest

from services.core.errors import (
    BatonError,
    CheckpointError,
    ChecksumMismatch,
    ConfigurationError,
    DeadlineExceeded,
    Draining,
    EngineStopped,
    Incompatible,
    InvalidRequest,
    OutOfBlocks,
    Overloaded,
    PeerUnavailable,
    QueueFull,
    ResourceExhausted,
    SlowReader,
    TransferFenced,
    Unavailable,
    UnknownModel,
    UnknownRequest,
)

MADE_OF_A_MESSAGE = [
    BatonError,
    UnknownRequest,
    UnknownModel,
    ResourceExhausted,
    QueueFull,
    OutOfBlocks,
    Overloaded,
    Unavailable,
    Draining,
    PeerUnavailable,
    EngineStopped,
    DeadlineExceeded,
    SlowReader,
    Incompatible,
    TransferFenced,
    ChecksumMismatch,
]
MAY_BE_RETRIED = [ResourceExhausted, QueueFull, OutOfBlocks, Overloaded, Unavailable, Draining, PeerUnavailable, EngineStopped]


def _tree(error: type[BatonError]) -> list[type[BatonError]]:
    return [error] + [below for child in error.__subclasses__() for below in _tree(child)]


def test_error_tree_when_walked_has_the_parents_drawn_in_the_module() -> None:
    assert {error: error.__base__ for error in _tree(BatonError)} == {
        BatonError: Exception,
        InvalidRequest: BatonError,
        UnknownRequest: BatonError,
        UnknownModel: BatonError,
        ResourceExhausted: BatonError,
        QueueFull: ResourceExhausted,
        OutOfBlocks: ResourceExhausted,
        Overloaded: ResourceExhausted,
        Unavailable: BatonError,
        Draining: Unavailable,
        PeerUnavailable: Unavailable,
        EngineStopped: Unavailable,
        DeadlineExceeded: BatonError,
        SlowReader: BatonError,
        Incompatible: BatonError,
        TransferFenced: BatonError,
        ChecksumMismatch: BatonError,
        CheckpointError: BatonError,
        ConfigurationError: BatonError,
    }


def test_error_reasons_when_compared_are_all_different() -> None:
    reasons = [error.reason for error in _tree(BatonError)]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("error", MADE_OF_A_MESSAGE)
def test_error_when_made_of_a_message_shows_it(error: type[BatonError]) -> None:
    assert str(error("need 7 KV blocks, 3 free")) == error("need 7 KV blocks, 3 free").message == "need 7 KV blocks, 3 free"


def test_invalid_request_when_raised_names_field_and_limit() -> None:
    error = InvalidRequest("top_p", "2 is outside (0, 1]", limit=1)
    assert (error.message, error.field, error.limit) == ("top_p: 2 is outside (0, 1]", "top_p", 1)
    assert InvalidRequest("prompt", "is empty").limit is None


def test_checkpoint_error_when_raised_names_the_path() -> None:
    error = CheckpointError("no such file", path="models/config.json")
    assert (str(error), error.path) == ("models/config.json: no such file", "models/config.json")


def test_configuration_error_when_several_settings_are_wrong_names_them_all() -> None:
    error = ConfigurationError(["port: 0 is less than 1", "BATON_PROT is unknown"])
    assert str(error) == error.message == "port: 0 is less than 1; BATON_PROT is unknown"
    assert error.problems == ("port: 0 is less than 1", "BATON_PROT is unknown")


@pytest.mark.parametrize("error", MAY_BE_RETRIED)
def test_error_when_another_attempt_may_succeed_carries_a_retry_delay(error: type[ResourceExhausted] | type[Unavailable]) -> None:
    assert error("full").retry_after_s > 0
    assert error("full", retry_after_s=2.5).retry_after_s == 2.5
