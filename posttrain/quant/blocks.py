"""The decoder blocks of a causal language model, one at a time.

Nothing here knows a model family: the blocks are the longest list of equal modules under the model, and what a block is
called with (masks, rotary tables, positions) is recorded from the model's own forward pass, in which every block is
replaced by one that hands its input on. So masks of sliding windows and tables per layer type are the model's own.

Blocks are either all in memory (`Blocks(model)`) or read from safetensors when their turn comes (`quant/stream.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import QuantError


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Blocks:
    """Blocks of a model.

    Args:
        model: transformers causal language model, in eval mode; its blocks may be on the meta device where `open_block` fills them.

    Raises:
        QuantError: no list of blocks is found, or what they are called with depends on the tokens.
    """

    streamed = False
    """Whether a block is in memory only while it is open."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefix, self.modules = block_list(model)
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._tuple = False
        self._tuple = not self._takes_tensors()

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def device(self) -> torch.device:
        """Of the embeddings."""
        found: torch.device = self.model.get_input_embeddings().weight.device
        return found

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """The block with its float weights in memory."""
        yield self.modules[index]

    def name(self, index: int) -> str:
        """`model.layers.3`."""
        return f"{self.prefix}.{index}"

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [batch, length, d] that enter the first block, for tokens [batch, length]."""
        seen: list[Tensor] = []
        with self._recording(lambda index, hidden, args, kwargs: seen.append(hidden) if index == 0 else None):
            self._trunk(ids.to(self.device))
        return seen[0]

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after a block, [batch, length, d]."""
        call = self.calls(hidden.shape[0], hidden.shape[1])[index]
        return _states(block(hidden.to(self.device), *call.args, **call.kwargs))

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """float32 logits for hidden states that leave the last block: the model's own end, with all blocks passed over."""
        batch, length = hidden.shape[:2]
        ids = torch.zeros(batch, length, dtype=torch.long, device=self.device)

        def enter(index: int, given: Tensor, args: Any, kwargs: Any) -> Tensor | None:
            return hidden.to(given) if index == 0 else None

        with self._recording(enter):
            return self.model(input_ids=ids, use_cache=False).logits.float()

    def calls(self, batch: int, length: int) -> list[Call]:
        """What each block is called with for inputs [batch, length]."""
        key = (batch, length)
        if key not in self._calls:
            first, second = (self._record(batch, length, token) for token in (0, 1))
            for index, (one, two) in enumerate(zip(first, second, strict=True)):
                if not _same((one.args, one.kwargs), (two.args, two.kwargs)):
                    raise QuantError(
                        "the block is given inputs that depend on the tokens, beside the hidden states",
                        where=self.name(index),
                        fix="quantize this model by round to nearest (quantize.rtn)",
                    )
            self._calls = {key: first}
        return self._calls[key]

    @torch.no_grad()
    def _record(self, batch: int, length: int, token: int) -> list[Call]:
        found: list[Call] = []
        ids = torch.full((batch, length), token, dtype=torch.long, device=self.device)
        with self._recording(lambda index, hidden, args, kwargs: found.append(Call(args, kwargs))):
            self._trunk(ids)
        return found

    def _trunk(self, ids: Tensor) -> Any:
        return self.model.base_model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def _takes_tensors(self) -> bool:
        """Whether the model expects hidden states from a block, rather than a tuple of them: told by the shape that arrives."""
        shapes: list[torch.Size] = []
        try:
            with self._recording(lambda index, hidden, args, kwargs: shapes.append(hidden.shape)):
                out = self._trunk(torch.zeros(2, 3, dtype=torch.long, device=self.device))
        except (RuntimeError, IndexError, ValueError, TypeError, QuantError):
            return False
        return len({*shapes, out[0].shape}) == 1

    @contextmanager
    def _recording(self, tell: Callable[[int, Tensor, Any, Any], Any]) -> Iterator[None]:
        """Every block hands its input on (or what `tell` returns), in the form that the model expects."""
        last: list[Tensor] = []

        def replaced(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                if last and hidden_states is not last[-1]:
                    raise QuantError(
                        "the model changes the hidden states between its blocks",
                        where=self.name(index),
                        fix="quantize this model by round to nearest (quantize.rtn)",
                    )
                given = tell(index, hidden_states, args, {name: value for name, value in kwargs.items() if name != "past_key_values"})
                out = given if isinstance(given, Tensor) else hidden_states
                last.append(out)
                return (out,) if self._tuple else out

            return forward

        for index, module in enumerate(self.modules):
            module.forward = replaced(index)
        try:
            yield
        finally:
            for module in self.modules:
                del module.forward


def block_list(model: Any) -> tuple[str, list[nn.Module]]:
    """(name of the list, blocks): the ModuleList of most parameters that has one member a layer.

    Raises:
        QuantError: there is none.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if not lists:
        raise QuantError(
            f"no list of {layers} decoder blocks is found in {type(model).__name__}",
            where="in.model",
            fix="give a decoder of transformers, or use quantize.rtn",
        )
    name, found = max(lists, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -len(item[0])))
    return name, list(found)


def _states(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise QuantError(f"a block gave {type(found).__name__} instead of hidden states", where="in.model", fix="use quantize.rtn")
    return found


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return isinstance(two, type(one)) and len(one) == len(two) and all(_same(a, b) for a, b in zip(one, two, strict=True))
    return type(one) is type(two)
