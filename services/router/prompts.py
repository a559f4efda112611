"""From what clients write to token ids, for every face of the router: which model, how long a text may be, where it is encoded.

Limits come before work: what is too long for the model is refused before the tokenizer is kept busy with it.
"""

import asyncio
from collections.abc import Mapping, Sequence

from protos.baton.v1 import common_pb2
from services.core.errors import InvalidRequest, UnknownModel
from services.core.types import check_token_id
from services.router.members import Members
from services.tokenizer.tokenizer import Tokenizer

# Above this the tokenizer would hold up everybody else's tokens; it releases the interpreter lock.
LONG_TEXT_CHARACTERS = 4_000
LONG_CHAT_MESSAGES = 64


class Prompts:
    """Texts, chats and token ids of the model that the members serve."""

    def __init__(self, members: Members, tokenizer: Tokenizer) -> None:
        self._members = members
        self.tokenizer = tokenizer

    @property
    def model_name(self) -> str:
        return self._members.model_name

    def identity(self, model: str = "") -> common_pb2.ModelIdentity:
        """Of the model of that name; empty: the one that is served. Raises UnknownModel, or PeerUnavailable while there is none."""
        identity = self._members.require_identity()
        if model not in ("", self._members.model_name):
            raise UnknownModel(f"model {model!r} is not served here; {self._members.model_name!r} is")
        return identity

    async def encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        """Raises InvalidRequest naming `field` for a text that is too long for the model."""
        return (await self.encode_all([text], field, add_special_tokens=add_special_tokens))[0]

    async def encode_all(self, texts: Sequence[str], field: str, *, add_special_tokens: bool) -> list[list[int]]:
        """The same for each of several texts."""
        self._check_length(max(map(len, texts)), field)

        def encode() -> list[list[int]]:
            return [self.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        return encode() if sum(map(len, texts)) <= LONG_TEXT_CHARACTERS else await asyncio.to_thread(encode)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        field: str,
        *,
        num_characters: int,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Through the checkpoint's template, which writes the special tokens itself; `num_characters` is about how long it all is.

        Raises InvalidRequest for what the template does not take.
        """

        self.check_num_messages(len(messages), field)
        self._check_length(num_characters, field)

        def render() -> str:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tools=tools, documents=documents, variables=variables
            )

        is_short = num_characters <= LONG_TEXT_CHARACTERS and len(messages) <= LONG_CHAT_MESSAGES
        text = render() if is_short else await asyncio.to_thread(render)
        return await self.encode(text, field, add_special_tokens=add_special_tokens)

    def check_num_messages(self, num_messages: int, field: str) -> None:
        """Raises InvalidRequest naming `field` for more messages than the model takes tokens: the template writes one at least for each."""
        limit = self.identity().max_model_len
        if num_messages > limit:
            raise InvalidRequest(field, f"are {num_messages}; the model takes {limit} tokens", limit=limit)

    async def decode(self, token_ids: Sequence[int], field: str) -> str:
        """Raises InvalidRequest naming `field` for an id that the model does not have, or more of them than its sequences have."""
        identity = self.identity()
        limit, vocab_size = identity.max_model_len, identity.vocab_size
        if len(token_ids) > limit:
            raise InvalidRequest(field, f"has {len(token_ids)} tokens; the model's sequences have no more than {limit}", limit=limit)

        def decode() -> str:
            if token_ids:
                for token_id in (min(token_ids), max(token_ids)):
                    check_token_id(field, token_id, vocab_size)
            return self.tokenizer.decode(token_ids)

        return await asyncio.to_thread(decode)

    def _check_length(self, num_characters: int, field: str) -> None:
        # Before any work: ten megabytes would keep the tokenizer busy for seconds, to be refused for their number of tokens afterwards.
        limit = self.identity().max_model_len * self.tokenizer.max_token_characters
        if num_characters > limit:
            raise InvalidRequest(field, f"has {num_characters} characters; the model takes no text of more than {limit}", limit=limit)
