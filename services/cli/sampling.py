"""What the command line says about sampling: the same options for an engine in this process and for a mesh."""

from dataclasses import dataclass

from protos.baton.v1 import common_pb2
from services.core.errors import InvalidRequest
from services.core.noise import draw_seed
from services.core.types import SamplingParams
from services.engine.model_config import GenerationDefaults

DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """What the command line says of SamplingParams; None where it is silent and the checkpoint may speak."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int = 1
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def resolve(self, defaults: GenerationDefaults, *, room: int) -> SamplingParams:
        """The option, else the checkpoint's default, else OpenAI's; `room` tokens are left in the model's context."""
        return SamplingParams(
            temperature=_first(self.temperature, defaults.temperature, 1.0),
            top_k=int(_first(self.top_k, defaults.top_k, 0)),
            top_p=_first(self.top_p, defaults.top_p, 1.0),
            min_p=_first(self.min_p, defaults.min_p, 0.0),
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            seed=draw_seed() if self.seed is None else self.seed,
            n=self.n,
            min_tokens=self.min_tokens,
            max_tokens=default_max_tokens(room) if self.max_tokens is None else self.max_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
        )

    def to_proto(self) -> common_pb2.SamplingParams:
        """The message, with only what was said: the mesh knows the checkpoint's defaults.

        Raises InvalidRequest for a number that its field cannot hold; all other limits are the router's to check.
        """
        message = common_pb2.SamplingParams(ignore_eos=self.ignore_eos)
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "seed",
            "n",
            "min_tokens",
            "max_tokens",
        ):
            value = getattr(self, name)
            if value is not None:
                _set(message, name, value)
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < 1 << 32:
                raise InvalidRequest("stop_token_ids", f"{token_id} is no token id", limit=(1 << 32) - 1)
            message.stop_token_ids.append(token_id)
        return message


def default_max_tokens(room: int) -> int:
    """How many new tokens are asked for when nobody says: enough to see something, and no more than fits."""
    return max(1, min(DEFAULT_MAX_TOKENS, room))


def _set(message: common_pb2.SamplingParams, name: str, value: float) -> None:
    try:
        setattr(message, name, value)
    except ValueError:
        highest = (1 << 64 if name == "seed" else 1 << 32) - 1
        raise InvalidRequest(name, f"{value} is outside [0, {highest}]", limit=highest) from None


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
