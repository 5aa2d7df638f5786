"""Next-token accuracy and bits per byte of a model on the shipped documents.

The second half of every document is scored; the first half is the prompt. Shapes: N documents, S = 1,024
tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from moe.lm.model import LanguageModel
from moe.lm.text import DOMAINS, Documents, bytes_per_token

TOP_KS = (1, 2, 4, 8)
_TOGETHER = 8
"""Documents of one forward pass."""


@torch.no_grad()
def score(model: LanguageModel, text: Documents, top_k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Predict every token from those before it.

    Args:
        model: in serving types.
        text: documents.
        top_k: experts per token; None means those of the training.

    Returns:
        Whether the likeliest token is the right one, bool, [N, S], and -log of the right one's probability,
        float32, [N, S].
    """
    right, nats = [], []
    pieces = torch.from_numpy(text.tokens.astype(np.int64)).split(_TOGETHER)
    for piece in tqdm(pieces, desc=f"scoring at top_k {top_k or model.config.top_k}", delay=2.0):
        tokens = piece.to(model.embed.device)
        target = tokens[:, 1:]
        stream, _ = model(tokens[:, :-1], top_k)
        logits = model.logits(stream).float()  # [B, S, V]
        right.append((logits.argmax(dim=-1) == target).cpu())
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        nats.append(loss.view_as(target).cpu())
    return torch.cat(right).numpy(), torch.cat(nats).numpy()


def measures(right: np.ndarray, nats: np.ndarray, text: Documents) -> dict[str, float]:
    """Accuracy and bits per byte of the second halves of documents, from what `score` returns for them."""
    half = right.shape[1] // 2
    n_bytes = bytes_per_token()[text.tokens[:, 1 + half :]].sum()
    return {
        "accuracy": round(float(right[:, half:].mean()), 5),
        "bits_per_byte": round(float(nats[:, half:].sum() / math.log(2) / n_bytes), 4),
    }


def measure_quality(model: LanguageModel, text: Documents) -> tuple[dict[str, Any], np.ndarray]:
    """Score a model over the experts per token; a dense one has no choice.

    Returns:
        `by_top_k`: measures by top_k, and `by_domain`: those at the training's top_k by domain; and whether
        each token is right at the training's top_k, bool, [N, S].
    """
    trained = model.config.top_k
    n = model.config.n_experts
    top_ks = sorted(k for k in {*TOP_KS, trained} if k <= n) if n else (trained,)
    by_top_k, by_domain = {}, {}
    reference = np.empty(0, bool)
    for top_k in top_ks:
        right, nats = score(model, text, top_k)
        by_top_k[str(top_k)] = measures(right, nats, text)
        if top_k == trained:
            reference = right
            for number, name in enumerate(DOMAINS):
                some = text.domain == number
                if some.any():
                    of_domain = Documents(text.tokens[some], text.domain[some])
                    by_domain[name] = measures(right[some], nats[some], of_domain)
    return {"by_top_k": by_top_k, "by_domain": by_domain}, reference
