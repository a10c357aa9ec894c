"""The export format merged-4bit, of a backend that loads in 4 bits and merges to 16."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rlvr.backends.protocol import LoadedPolicy, ModelBackend


def save_merged_in_4_bits(backend: ModelBackend, policy: LoadedPolicy, folder: Path) -> None:
    """Merges to 16 bits, has the backend load that in 4, and saves what it loaded: for a while both are in memory."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merged-", dir=folder) as merged:
        backend.save(policy, Path(merged), "merged-16bit")
        settings = replace(
            policy.settings,
            model=merged,
            revision=None,
            quantization="4bit",
            full_finetuning=False,
            fast_inference="off",
        )
        quantized = backend.load_policy(settings)
        model, tokenizer = quantized.model, policy.tokenizer
        model.config._name_or_path = policy.settings.model
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
