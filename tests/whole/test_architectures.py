"""A sample of the architectures of transformers, small, outsourced, compared in both passes; ``make zoo`` does all."""

from __future__ import annotations

import architectures
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = ["llama", "gpt_oss", "mamba", "wavlm", "vit", "clip", "t5", "rwkv", "detr", "sam2_vision_model", "siglip2"]


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_small_one_matches(kind: str) -> None:
    found = architectures.look(kind, architectures.architectures()[kind])
    assert found.verdict == "matches", found
    assert found.share is not None
    assert found.share > (0.5 if kind == "rwkv" else 0.7)
    assert ("reads its weight" in found.stays) == (kind in ("mamba", "wavlm", "rwkv"))
