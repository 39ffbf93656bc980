"""How a vLLM engine is set up, as it is written in a config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.config.base import Positive, Strict


class VllmConfig(Strict):
    """Options of `engine: vllm`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; `auto` is float32 on a CPU and the checkpoint's own type on a GPU, as everywhere here."""
    max_model_len: Positive | None = None
    """Longest prompt and completion together, in tokens; None is the model's own limit."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory for weights and cache; beside a trainer, leave it room."""
    cpu_cache_gib: Positive | None = None
    """Size of the key-value cache on a CPU; None is `VLLM_CPU_KVCACHE_SPACE`, or 1."""
    tensor_parallel_size: Positive = 1
    """GPUs that share the model."""
    enforce_eager: bool = False
    """No CUDA graphs: starts sooner, runs slower. A CPU never has them."""
    segment: Positive = 16
    """Tokens between two looks at the particles of a request; a multiple of the cache's block size wastes least."""
