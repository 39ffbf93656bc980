"""Published settings of Stable-SPAM and of what it became; no torch here.

`stable_spam`: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam" (arXiv 2502.17055 v1), the
defaults of the authors' optimizer. Their 4-bit runs reset every 500 steps; their bfloat16 run has norm decays 0.85, 0.99999.
`gradient_stabilizer`: the later versions of the same paper, called GradientStabilizer: norms alone, with a long memory.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "stable_spam": {"clip_decay": 0.999, "norm_decays": (0.7, 0.9), "norm_eps": 1e-8, "reset_every": 1000},
    "gradient_stabilizer": {"clip_decay": None, "norm_decays": (0.6, 0.999), "norm_eps": 1e-12, "reset_every": 0},
}
"""Preset -> keyword arguments of `StableSPAM`."""
