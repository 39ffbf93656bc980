"""What a client may send, and the requests it becomes."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from posttrain.config.base import Strict
from posttrain.data.spans import render
from posttrain.data.strict_json import RowError
from posttrain.errors import ConfigError, PosttrainError
from posttrain.rollout.asked import Asked, ResponseFormat, built
from posttrain.rollout.base import Request, Sampling
from posttrain.rollout.constraints import Constraint
from posttrain.rollout.group import check_request

CHOICES = 128
"""Completions of one body at most."""
CHAT_TOKENS = 1024
"""Limit of a chat without one, where the model has more room."""
COMPLETION_TOKENS = 16
"""Limit of a completion without one: OpenAI's own default."""
Id = Annotated[int, Field(ge=0)]
Zero = Literal[0] | Annotated[float, Field(ge=0, le=0)] | None


class _StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool = False


class Body(Strict):
    """What both routes take. Fields that are not here are refused; so are values that this engine does not carry out."""

    model: str
    """Name of the model."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 is greedy; default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Default 1."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1 are off."""
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    """Completions of each prompt; completion i has the seed `seed + i`."""
    seed: Annotated[int, Field(ge=0, lt=2**63 - CHOICES)] | None = None
    """Without one, a random one."""
    stop: Annotated[list[str], Field(max_length=16)] | str | None = None
    """Stop strings; not with a constraint."""
    stream: bool | None = None
    """Send tokens as they are drawn; of several particles, the text at the end."""
    stream_options: _StreamOptions | None = None
    """Of a stream."""
    response_format: ResponseFormat | None = None
    """Sampled by `awrs.sampler`, as a constraint."""
    awrs: Asked | None = None
    """Constraint and sampler."""
    vllm_xargs: dict[str, Any] | None = None
    """`awrs` as JSON in a string, as the server on vLLM takes it."""
    return_token_ids: bool | None = None
    """Also send the ids."""
    user: str | None = None
    """Not looked at."""
    presence_penalty: Zero = None
    """0 only."""
    frequency_penalty: Zero = None
    """0 only."""

    @model_validator(mode="before")
    @classmethod
    def _one_awrs(cls, given: Any) -> Any:
        extra = given.get("vllm_xargs") if isinstance(given, dict) else None
        if extra is None:
            return given
        if not isinstance(extra, dict) or set(extra) != {"awrs"} or not isinstance(extra["awrs"], str) or given.get("awrs") is not None:
            raise ValueError("vllm_xargs: expected {'awrs': a JSON text}, and no other `awrs`")
        return {**given, "vllm_xargs": None, "awrs": json.loads(extra["awrs"])}

    @property
    def choices(self) -> int:
        """`n`, or 1."""
        return self.n or 1

    def stops(self) -> tuple[str, ...]:
        """Stop strings.

        Raises:
            ConfigError: an empty one.
        """
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in found:
            raise ConfigError("an empty stop string", where="stop")
        return found

    def bound(self) -> tuple[Constraint | None, Asked]:
        """The constraint, and how it is sampled; building one takes time.

        Raises:
            ConfigError: two constraints, a sampler without one, or one that cannot be built.
        """
        asked = self.awrs or Asked()
        formatted = self.response_format.constraint() if self.response_format else None
        if asked.constraint is not None and formatted is not None:
            raise ConfigError("give one of response_format and awrs.constraint", where="response_format")
        wanted = asked.constraint or formatted
        if wanted is None:
            if self.awrs is not None:
                raise ConfigError("`constraint` is missing", where="awrs")
            return None, asked
        return built(wanted), asked

    def requests(self, prompts: list[list[int]], max_tokens: int, max_batch: int) -> list[Request]:
        """One request a choice, those of the first prompt first.

        Raises:
            ConfigError: too many choices, or what cannot be combined.
        """
        if len(prompts) * self.choices > CHOICES:
            raise ConfigError(f"{len(prompts)} prompts of {self.choices} completions: at most {CHOICES} in all", where="n")
        constraint, asked = self.bound()
        if asked.sampler.particles > max_batch:
            raise ConfigError(f"{asked.sampler.particles} particles, but {max_batch} rows a batch", where="awrs.sampler.particles")
        sampling = Sampling(
            max_tokens,
            1.0 if self.temperature is None else float(self.temperature),
            1.0 if self.top_p is None else float(self.top_p),
            max(0, self.top_k or 0),
            self.stops(),
        )
        seed = secrets.randbits(62) if self.seed is None else self.seed
        found = [Request(ids, seed + i, sampling, "", constraint, asked.sampler) for ids in prompts for i in range(self.choices)]
        if constraint is not None:
            check_request(found[0])
        return found


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Id] | list[list[Id]]
    """Text or token ids, one or several."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default 16."""
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    """0: those of the drawn tokens; others are not kept."""
    echo: Literal[False] | None = None
    """False only."""
    best_of: Literal[1] | None = None
    """1 only."""

    def prompts(self, tokenizer: Any, size: int) -> list[list[int]]:
        """Token ids.

        Args:
            tokenizer: of the model.
            size: of its vocabulary.

        Raises:
            ConfigError: an empty prompt, or an id beyond the vocabulary.
        """
        given: Any = self.prompt
        several = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        found: list[list[int]] = [tokenizer.encode(item) if isinstance(item, str) else item for item in several]
        if not found or not all(found):
            raise ConfigError("a prompt without tokens", where="prompt")
        largest = max(max(ids) for ids in found)
        if largest >= size:
            raise ConfigError(f"token id {largest} is beyond the vocabulary of {size}", where="prompt")
        return found

    def limit(self, room: int | None) -> int:
        """Tokens at most, of a prompt that leaves `room`."""
        return self.max_tokens or min(COMPLETION_TOKENS, max(1, room or COMPLETION_TOKENS))

    @property
    def with_logprobs(self) -> bool:
        """Log-probabilities are asked for."""
        return self.logprobs is not None


class _Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class _Message(Strict):
    """One turn."""

    role: Annotated[str, Field(min_length=1, max_length=32)]
    content: str | list[_Part]
    name: str | None = None


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    """The conversation; text only."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default: what the model has room for, at most 1,024."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The same."""
    logprobs: bool | None = None
    """Those of the drawn tokens."""
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    """0 only."""

    def prompts(self, tokenizer: Any, size: int) -> list[list[int]]:
        """Token ids of the rendered conversation.

        Raises:
            ConfigError: the tokenizer has no chat template, or its template refuses the turns.
        """
        if not tokenizer.chat_template:
            raise ConfigError("the model has no chat template", where="messages", fix="use /v1/completions")
        turns = []
        for item in self.messages:
            text = item.content if isinstance(item.content, str) else "".join(part.text for part in item.content)
            turns.append({"role": item.role, "content": text, **({"name": item.name} if item.name else {})})
        try:
            text = render(tokenizer, turns, None, generation=True)
        except RowError as error:
            raise ConfigError(str(error), where="messages") from None
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise ConfigError("a prompt without tokens", where="messages")
        return [ids]

    def limit(self, room: int | None) -> int:
        """Tokens at most, of a prompt that leaves `room`."""
        return self.max_completion_tokens or self.max_tokens or min(CHAT_TOKENS, max(1, room or CHAT_TOKENS))

    @property
    def with_logprobs(self) -> bool:
        """Log-probabilities are asked for."""
        return bool(self.logprobs)


def read(raw: bytes, kind: type[Body]) -> Any:
    """The body of a request.

    Raises:
        ConfigError: it is no JSON object of this kind; the first problem is named.
    """
    try:
        return kind.model_validate(json.loads(raw.decode("utf-8"), parse_constant=_no_constant))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "literal[", "constrained-")))
        raise ConfigError(str(first["msg"]).removeprefix("Value error, "), where=where or "body") from None
    except PosttrainError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}", where="body") from None


def _no_constant(text: str) -> Any:
    raise ValueError(f"`{text}` is no JSON number")
