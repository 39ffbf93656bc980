"""Second moments of a linear layer's inputs: all that its output error depends on.

For inputs X (float model) and X^ (quantized prefix), each [tokens, in]:  G = X^^T X^,  C = X^T X^. Products are float32, sums
over chunks float64. The energy || X W^T ||^2 of each layer that shares the inputs is counted beside them, since an error
means nothing without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Moments:
    """Moments of one set of tokens.

    Args:
        gram: G, float64 [in, in].
        cross: C, float64 [in, in].
        energy: layer name -> || X W^T ||^2.
        tokens: how many were counted.
    """

    gram: Tensor
    cross: Tensor
    energy: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int, device: str | torch.device = "cpu") -> Moments:
        """Of no tokens."""
        zeros = [torch.zeros(columns, columns, dtype=torch.float64, device=device) for _ in range(2)]
        return cls(zeros[0], zeros[1])

    def add(self, quantized: Tensor, plain: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Counts tokens.

        Args:
            quantized, plain: [..., in], inputs of the same tokens in the two models.
            weights: layer name -> W [out, in] of the float model.
        """
        x, y = (value.reshape(-1, value.shape[-1]).float() for value in (quantized, plain))
        self.gram += x.T @ x
        self.cross += y.T @ x
        self.tokens += len(x)
        plain_gram = y.T @ y if len(weights) * y.shape[1] <= sum(len(weight) for weight in weights.values()) else None
        for name, weight in weights.items():
            w = weight.float()
            made = (y @ w.T).square() if plain_gram is None else (w @ plain_gram) * w
            self.energy[name] = self.energy.get(name, 0.0) + float(made.sum(dtype=torch.float64))

    def error(self, name: str, weight: Tensor, effective: Tensor) -> float:
        """|| X W^T - X^ V^T ||^2 / || X W^T ||^2.

        Args:
            name: of the layer.
            weight: W of the float model, [out, in].
            effective: V of the quantized one, [out, in].
        """
        w, v = weight.double(), effective.double()
        total = self.energy[name]
        error = float((v @ self.gram * v).sum() - 2 * ((w @ self.cross) * v).sum()) + total
        return max(error, 0.0) / max(total, 1e-30)
