"""Shapes that people train: one layer's attention, on one device, of models by name.

Heads, head dims and windows are those of the models' public configs (config.json on Hugging Face, or
MaxText's configs/models); a comment says where else, or what is not the model's own. Nobody gets soft
caps (Gemma 2), sinks (gpt-oss) or text's padding (the diffusion models): no rival takes them all.
"""

import dataclasses
import re
from typing import Any

from .points import Point

# Documents of fine-tuning, packed into one row of 16,384 tokens.
DOCUMENTS = (309, 4015, 2250, 1800, 3310, 900, 3800)


def _row(
    model: str,
    shape: tuple[int, int],
    heads: int | tuple[int, int],
    head_dim: int,
    *,
    tp: int = 1,
    window: int | None = None,
    is_causal: bool = True,
    **fields: Any,
) -> Point:
    """`shape` is batch and length. `heads` are the whole model's, of queries and of keys and values; a
    device has its share of `tp`-way tensor parallelism, and at least one of each. `window` counts a
    row's own key too, as configs do."""
    heads_q, heads_k = (heads, heads) if isinstance(heads, int) else heads
    if heads_q % tp or (heads_k % tp and tp % heads_k):
        raise ValueError(f"{model}: {heads_q}/{heads_k} heads cannot be shared by {tp}")
    return Point(
        suite="models",
        name="",
        model=f"{model}, TP {tp}",
        batch=shape[0],
        seqlen=shape[1],
        num_heads_q=heads_q // tp,
        num_heads_k=max(heads_k // tp, 1),
        head_dim=head_dim,
        window=None if window is None else window - 1,
        is_causal=is_causal,
        contenders=("fa3", "cudnn", "dew"),
        **{"head_dim_v": head_dim, **fields},
    )


def _full(*args: Any, **fields: Any) -> Point:
    return _row(*args, is_causal=False, **fields)


ROWS = (
    _row("Llama 3 8B", (1, 8192), (32, 8), 128),
    _row("Llama 3 8B", (2, 8192), (32, 8), 128),
    _row("Llama 3 8B", (4, 4096), (32, 8), 128, tp=4),
    _row("Llama 3 8B", (1, 8192), (32, 8), 128, tp=8),
    _row("Llama 3 8B", (1, 2048), (32, 8), 128, tp=8),
    _row("Llama 3.1 8B", (1, 131072), (32, 8), 128, tp=8),
    _row("Llama 3 70B", (1, 8192), (64, 8), 128, tp=8),
    _row("Llama 3 70B", (4, 4096), (64, 8), 128, tp=8),
    _row("Llama 3.1 405B", (1, 8192), (128, 8), 128, tp=8),
    _row("Qwen 2.5 0.5B", (16, 2048), (14, 2), 64),
    _row("Qwen 2.5 7B", (2, 4096), (28, 4), 128),
    _row("Qwen 2.5 72B", (1, 32768), (64, 8), 128, tp=4),
    _row("Qwen 3 30B-A3B", (2, 4096), (32, 4), 128),
    _row("Qwen 3 32B", (1, 4096), (64, 8), 128),
    _row("Qwen 3 235B-A22B", (2, 4096), (64, 4), 128, tp=4),
    # Its full layers, one of four.
    _row("Qwen 3.5 397B-A17B", (1, 4096), (32, 2), 256, tp=2),
    _row("Gemma 1 2B", (2, 8192), (8, 1), 256),
    _row("Gemma 2 9B, window layers", (1, 8192), (16, 8), 256, window=4096),
    _row("Gemma 3 4B, window layers", (2, 8192), (8, 4), 256, window=1024),
    _row("Gemma 3 27B, window layers", (2, 8192), (32, 16), 128, tp=2, window=1024),
    _row("Gemma 3 27B, full layers", (1, 32768), (32, 16), 128, tp=4),
    _row("gpt-oss 20B, full layers", (2, 4096), (64, 8), 64),
    _row("gpt-oss 20B, window layers", (16, 4096), (64, 8), 64, window=128),
    _row("gpt-oss 120B, window layers", (1, 65536), (64, 8), 64, tp=8, window=128),
    # Version 0.1; later ones have no window.
    _row("Mistral 7B", (1, 32768), (32, 8), 128, tp=2, window=4096),
    _row("Falcon 7B", (4, 2048), (71, 1), 64),
    _row("Falcon 40B", (4, 2048), (128, 8), 64, tp=4),
    _row("OLMo 2 1B", (8, 2048), 16, 128),
    _row("OLMo 2 1B, packed fine-tuning", (1, 16384), 16, 128, documents=DOCUMENTS),
    _row("OLMo 2 7B", (4, 4096), 32, 128),
    _row("OLMo 3 7B, window layers", (1, 8192), 32, 128, window=4096),
    _row("GPT-2", (32, 1024), 12, 64),
    _row("GPT-2 XL", (8, 1024), 25, 64),
    _row("Phi-2", (8, 2048), 32, 80),
    _row("GPT-NeoX 20B", (8, 2048), 64, 96, tp=4),
    # 96 heads of 18,432 / 96 (arXiv 2406.11704, table 1).
    _row("Nemotron-4 340B", (2, 4096), (96, 8), 192, tp=8),
    # Multi-head latent attention as it is trained: 128 + 64 of query and key, 128 of value.
    _row("DeepSeek V3", (2, 8192), 128, 192, tp=8, head_dim_v=128),
    # No model's: the same head dims without a mask.
    _full("DeepSeek V3, no mask", (2, 8192), 128, 192, tp=8, head_dim_v=128),
    # The FlashAttention-3 paper's heads and tokens, for what the paper's grid leaves out.
    _row("FlashAttention-3 paper", (2, 8192), 16, 128),
    _row("FlashAttention-3 paper, fp16", (2, 8192), 16, 128, dtype="float16"),
    _row("FlashAttention-3 paper, window", (2, 8192), 16, 128, window=1024),
    _full("BERT large", (32, 512), 16, 64),
    # 24² patches and a class token.
    _full("ViT-L/16, 384 px", (32, 577), 16, 64),
    # 32² patches, a class token and four registers (arXiv 2508.10104).
    _full("DINOv3 7B, 512 px", (8, 1029), 32, 128),
    # 1152 / 16; 64² patches: Gemma 3's images.
    _full("SigLIP So400m, 896 px", (4, 4096), 16, 72),
    _full("SigLIP So400m, 384 px", (32, 729), 16, 72),
    # 1152 / 16; 32² patches of latents.
    _full("DiT-XL/2, 512 px", (32, 1024), 16, 72),
    # 64² patches and 154 tokens of text.
    _full("SD3 medium, 1024 px", (4, 4250), 24, 64),
    # 64² patches and 512 tokens of text.
    _full("Flux.1, 1024 px", (2, 4608), 24, 128),
    # 480p, 81 frames: 21 × 30 × 52 patches.
    _full("Wan 2.1 14B, 480p", (1, 32760), 40, 128, tp=4),
    _full("Wan 2.1 14B, 480p, on text", (1, 32760), 40, 128, tp=2, seqlen_k=512),
    _full("Whisper large, encoder", (16, 1500), 20, 64),
    _full("Whisper large, decoder on audio", (32, 448), 20, 64, seqlen_k=1500),
    # At 64² of 128² latents: 640 channels in heads of 64.
    _full("SDXL, 1024 px", (8, 4096), 10, 64),
    _full("SDXL, 1024 px, on text", (8, 4096), 10, 64, seqlen_k=77),
    # OpenFlamingo's heads, with more latents than its 64.
    _full("Perceiver resampler", (8, 512), 8, 64, seqlen_k=16384),
)


def models() -> list[Point]:
    """Forward and backward of each row, one after the other: a run that stops early has whole rows."""
    points = []
    for row in ROWS:
        label = re.sub(r"[^a-z0-9.]+", "-", row.model.lower())
        for pass_name in ("fwd", "bwd"):
            name = f"{pass_name}-{label}-{row.batch}x{row.seqlen}"
            points.append(dataclasses.replace(row, name=name, pass_name=pass_name))
    return points
