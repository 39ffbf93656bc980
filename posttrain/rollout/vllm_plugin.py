"""Constrained sampling inside vLLM: a logits processor of the whole batch that decides each token, and where its results are kept.

    python -m vllm.entrypoints.openai.api_server --model ./model --logits-processors posttrain.rollout.vllm_plugin:AWRS
    {"prompt": "...", "vllm_xargs": {"awrs": "{\"constraint\": {\"regex\": \"[0-9]+\"}, \"sampler\": {\"method\": \"awrs\"}}"}}

Once a step, and only where a row asks for it, an order of tokens is drawn for each such row (`posttrain.rollout.orders`), the
checker walks it, and all other tokens of the row get -inf: one forward pass a token for the batch, whatever else is in it. The
processor sees logits before temperature and divides by it itself; what would change the distribution behind its back is refused
at admission. It remembers what it chose, so it needs no token from the device; a row that comes back after preemption, or whose
prompt is computed in parts, is set back to what was really taken.

vLLM has two interfaces for logits processors: of its first model runner (CPU, and `VLLM_USE_V2_MODEL_RUNNER=0`) and of its
second (GPU). One class serves both and tells them apart by what it is constructed with.

Log-weights and the like stay in this process (`STORE`) until they are fetched through the worker extension `Worker`, as plain
numbers. Imported by vLLM only.
"""

from __future__ import annotations

import importlib
import math
import os
import random
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstInterface
from vllm.v1.sample.logits_processor import MoveDirectionality

from posttrain.core.registry import scan_package
from posttrain.errors import PosttrainError, RolloutError
from posttrain.rollout._vllm import Declared
from posttrain.rollout.asked import Asked, built
from posttrain.rollout.awrs import Draw, Order
from posttrain.rollout.constraints import Constraint, TokenChecker, Vocabulary
from posttrain.rollout.orders import RowNoise, draw_token, row_orders
from posttrain.rollout.stopping import end_ids

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondInterface
except ImportError:  # older vLLM has the first only
    SecondInterface = object  # type: ignore[assignment,misc]

for _package in filter(None, os.environ.get("POSTTRAIN_PLUGINS", "").split(",")):
    importlib.import_module(_package)
    scan_package(_package)

KEPT = 16_384
"""Requests whose results are kept for fetching; the oldest are dropped."""
GREEDY = 1e-5
"""vLLM takes lower temperatures for 0."""
SPOILERS: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "presence_penalty": (0.0,), "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,), "min_tokens": (0,), "logit_bias": (None, {}), "bad_words": (None, []), "allowed_token_ids": (None, []),
    "structured_outputs": (None,),
}  # fmt: skip
"""Parameters of vLLM that would change the distribution, with the values that do not."""


class Shared:
    """What an engine of the same process hands over, so that nothing is loaded or built twice."""

    vocabularies: dict[str, Vocabulary] = {}
    constraints: dict[str, Constraint] = {}


class Spec(Asked):
    """`extra_args["awrs"]` of a request; its sampler has one particle, since several are made of several requests."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """Of the distribution; None is the request's own."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of the noise; None is the request's own."""
    uid: str = ""
    """Name under which the result is kept."""
    key: str | None = None
    """Name of a constraint that an engine of this process has handed over."""
    before: list[Annotated[int, Field(ge=0)]] = []
    """Tokens of the completion that stand at the end of the prompt."""

    @model_validator(mode="after")
    def _usable(self) -> Spec:
        if self.constraint is None and self.key not in Shared.constraints:
            raise ValueError("`constraint` is missing")
        if self.sampler.particles > 1:
            raise ValueError("several particles need posttrain's own engine; send 1, or n requests")
        return self

    def built(self) -> Constraint:
        """The constraint, built once for all requests with the same one."""
        if self.key in Shared.constraints:
            return Shared.constraints[self.key]
        assert self.constraint is not None
        return built(self.constraint)


class Row:
    """One request: its checker, and what was drawn for it.

    Args:
        spec: see Spec.
        temperature: of its distribution; 0 is greedy.
        key: name and seed of the request, under which it is kept.
        vocabulary: of the model.

    Attributes:
        chosen: tokens given to vLLM.
        draws: how they were drawn; fewer, where the text could not go on and an end token was given.
        reason: why it could not.
    """

    def __init__(self, spec: Spec, temperature: float, key: tuple[str, int], vocabulary: Vocabulary) -> None:
        self.spec, self.temperature, self.key, self.vocabulary = spec, temperature, key, vocabulary
        self.constraint = spec.built()
        self.chosen: list[int] = []
        self.draws: list[Draw] = []
        self.reason = self.error = ""
        self.checker: TokenChecker | None = None
        self._replay()

    def _replay(self) -> None:
        self.reason = self.error = ""
        try:
            self.checker = TokenChecker(self.constraint.start(), self.vocabulary)
            for token in (*self.spec.before, *self.chosen):
                self.checker.advance(token)
        except RolloutError as error:
            self.reason, self.error = "checker_error", error.message

    def set_back(self, count: int, tokens: Sequence[int] = ()) -> None:
        """Drops what was drawn but not taken: vLLM has `count` tokens, which are `tokens` where this process has forgotten them."""
        if len(self.chosen) == count:
            return
        if len(self.chosen) < count:
            self.draws += [Draw(None, math.nan, 0.0, 0, False)] * (count - len(self.chosen))
            self.chosen = list(tokens[:count])
        else:
            del self.chosen[count:]
            if self.reason and len(self.draws) <= count:
                return
            del self.draws[count:]
        self._replay()

    @property
    def noise(self) -> RowNoise:
        """Of the next token."""
        return RowNoise(self.key[1], len(self.spec.before) + len(self.chosen), self.temperature)

    def draw(self, order: Order) -> int:
        """The next token, from the row's order; an end token where the text cannot go on."""
        token = min(self.vocabulary.ends, default=0)
        if not self.reason:
            try:
                assert self.checker is not None
                found = draw_token(order, self.checker, self.spec.sampler)
                self.draws.append(found if found.token is None else replace(found, token=None))
                if found.token is None:
                    self.reason = "dead_end"
                else:
                    self.checker.advance(found.token)
                    self.draws[-1], token = found, found.token
            except RolloutError as error:
                self.reason, self.error = "checker_error", error.message
        self.chosen.append(token)
        return token

    def result(self, count: int) -> dict[str, Any]:
        """What was drawn, of the `count` tokens that vLLM took, in plain numbers."""
        self.set_back(count)
        whole = False
        try:
            whole = not self.reason and self.checker is not None and bool(self.checker.state.complete())
        except RolloutError as error:
            self.reason, self.error = "checker_error", error.message
        taken = [draw for draw in self.draws if draw.token is not None]
        return {
            "tokens": [int(draw.token) for draw in taken if draw.token is not None],
            "logprobs": [float(draw.logprob) if self.temperature else 0.0 for draw in taken],
            "log_weight": math.fsum(draw.log_weight for draw in taken),
            "calls": sum(int(draw.calls) for draw in self.draws),
            "first": sum(int(draw.first) for draw in self.draws),
            "masked": sum(int(draw.masked) for draw in self.draws),
            "drawn": len(self.draws),
            "reason": self.reason,
            "error": self.error,
            "whole": whole,
        }


STORE: OrderedDict[tuple[str, int], Row] = OrderedDict()
"""Rows by (uid, seed): those of running requests, and those not yet fetched."""


def parsed(params: Any) -> Spec | None:
    """`extra_args["awrs"]` of a request; a string is JSON, since servers take flat values only.

    Raises:
        ValueError: it is not a Spec.
    """
    given = (params.extra_args or {}).get("awrs")
    if given is None:
        return None
    try:
        return Spec.model_validate_json(given) if isinstance(given, str) else Spec.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("awrs", *map(str, first["loc"])))
        raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None


class AWRS(FirstInterface, SecondInterface):
    """Decides the tokens of requests that carry `extra_args["awrs"]`.

    Args:
        vllm_config: the engine's.
        other: (device, is_pin_memory) of the first interface, or (req_states,) of the second.

    Raises:
        ValueError: speculative decoding, or sampling split over ranks.
    """

    def __init__(self, vllm_config: Any, *other: Any) -> None:
        self._states = other[0] if len(other) == 1 else None
        self._rows: dict[int, Row] = {}
        self._outputs: dict[int, list[int]] = {}
        if vllm_config.speculative_config is not None:
            raise ValueError("constrained sampling does not go with speculative decoding; remove --speculative-config")
        if getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", False):
            raise ValueError("constrained sampling needs every rank to see every row; remove --enable-batch-sharded-sampling")
        self._model_config = vllm_config.model_config

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Checks a request's `awrs` at admission, and gives it a name and a seed where it has none.

        `awrs` is an object, or its JSON as a string; see Spec.

        Raises:
            ValueError: says what is wrong; the server answers 400.
        """
        spec = parsed(sampling_params)
        if spec is None:
            return
        _refuse_spoilers(sampling_params)
        try:
            spec.built()
        except PosttrainError as error:
            raise ValueError(str(error)) from None
        if not spec.uid:
            sampling_params.extra_args.setdefault("awrs_uid", uuid.uuid4().hex)
        if spec.seed is None and sampling_params.seed is None:
            sampling_params.seed = random.SystemRandom().getrandbits(62)

    def is_argmax_invariant(self) -> bool:
        """It decides greedy rows, too."""
        return False

    def _row(self, params: Any) -> Row | None:
        spec = parsed(params)
        if spec is None:
            return None
        seed = next((value for value in (spec.seed, params.seed) if value is not None), 0)
        key = (spec.uid or str(params.extra_args.get("awrs_uid", "")), seed)
        row = STORE.get(key)
        if row is None:
            temperature = params.temperature if spec.temperature is None else spec.temperature
            row = STORE[key] = Row(spec, 0.0 if temperature < GREEDY else temperature, key, _vocabulary(self._model_config))
            while len(STORE) > KEPT:
                STORE.popitem(last=False)
        return row

    # ---- first interface

    def update_state(self, batch_update: Any) -> None:
        """Follows the rows that leave, enter and move."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._drop(index)
        for index, params, _, outputs in batch_update.added:
            self._drop(index)
            row = self._row(params)
            if row is not None:
                self._rows[index], self._outputs[index] = row, outputs
        for one, two, direction in batch_update.moved:
            for held in (self._rows, self._outputs):
                _move(held, one, two, direction == MoveDirectionality.SWAP)

    def _drop(self, index: int) -> None:
        """Forgets who was there; for good, if nobody will fetch the result. What comes back after preemption is replayed."""
        row = self._rows.pop(index, None)
        self._outputs.pop(index, None)
        if row is not None and not row.spec.uid:
            STORE.pop(row.key, None)

    # ---- second interface

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes a slot; True where its logits are changed."""
        self._drop(req_idx)
        row = self._row(sampling_params)
        if row is not None:
            self._rows[req_idx] = row
        return row is not None

    # ---- both

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """(rows, V) logits with -inf everywhere but at the tokens chosen, in the rows that asked for it."""
        if not self._rows:
            return logits
        found = list(self._by_index() if ctx is None else self._by_slot(ctx))
        if not found:
            return logits
        places = [place for place, _ in found]
        orders = row_orders(logits, [row.noise for _, row in found], places if len(places) < len(logits) else None)
        tokens = [row.draw(order) for (_, row), order in zip(found, orders, strict=True)]
        where = torch.tensor(places, device=logits.device)
        logits.index_fill_(0, where, -math.inf)
        logits[where, torch.tensor(tokens, device=logits.device)] = 0.0
        return logits

    def _by_index(self) -> Iterator[tuple[int, Row]]:
        for index, row in sorted(self._rows.items()):
            outputs = self._outputs[index]
            row.set_back(len(outputs), outputs)
            yield index, row

    def _by_slot(self, ctx: Any) -> Iterator[tuple[int, Row]]:
        """Rows whose prompt is done; each slot has one row, since there is no speculative decoding."""
        assert self._states is not None
        for place, slot in enumerate(np.asarray(ctx.idx_mapping_np).tolist()):
            row = self._rows.get(slot)
            length = int(ctx.seq_lens_upper_bound_np[place])
            if row is None or length < int(self._states.prefill_len.np[slot]):
                continue
            count = length - int(self._states.prompt_len.np[slot])
            row.set_back(count, self._taken(slot, count) if count > len(row.chosen) else ())
            yield place, row

    def _taken(self, slot: int, count: int) -> list[int]:
        """Tokens of a slot after its prompt, read from the device; only for a row that this process has forgotten."""
        start = int(self._states.prompt_len.np[slot])  # type: ignore[union-attr]
        found: list[int] = self._states.all_token_ids.gpu[slot, start : start + count].tolist()  # type: ignore[union-attr]
        return found


class Worker:
    """Methods for `collective_rpc`, by `worker_extension_cls`."""

    def awrs_pop(self, wanted: Sequence[tuple[str, int, int]]) -> list[dict[str, Any] | None]:
        """Results of (uid, seed, tokens taken), which are forgotten thereby; None for one that is not known."""
        rows = [(STORE.pop((uid, seed), None), count) for uid, seed, count in wanted]
        return [None if row is None else row.result(count) for row, count in rows]

    def repack_heads(self) -> None:
        """Makes an output layer of a CPU use the weights it holds now.

        There it multiplies by a packed copy, which vLLM's reload leaves as it was where the layer shares the embedding's weights.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            if isinstance(module, ParallelLMHead) and module.weight.device.type == "cpu":
                module.quant_method.process_weights_after_loading(module)


def _move(held: dict[int, Any], one: int, two: int, swap: bool) -> None:
    first, second = held.pop(one, None), held.pop(two, None)
    if first is not None:
        held[two] = first
    if swap and second is not None:
        held[one] = second


def _refuse_spoilers(params: Any) -> None:
    for name, neutral in SPOILERS.items():
        value = getattr(params, name, neutral[0])
        if value not in neutral:
            raise ValueError(
                f"{name}: {value} would change the distribution that constrained sampling weighs; send {neutral[0]}, "
                "also where it comes from the model's generation config"
            )


def _vocabulary(model_config: Any) -> Vocabulary:
    """Of the model's tokenizer; an engine of this process hands its own over."""
    name = str(model_config.tokenizer)
    if name not in Shared.vocabularies:
        from posttrain.models.load import load_tokenizer

        tokenizer = load_tokenizer(name, trust_remote_code=model_config.trust_remote_code)
        Shared.vocabularies[name] = Vocabulary.of(tokenizer, end_ids(Declared(model_config), tokenizer))
    return Shared.vocabularies[name]
