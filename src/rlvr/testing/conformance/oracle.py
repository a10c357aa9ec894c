"""The oracle: a checkpoint in float32 by transformers alone, with LoRA added to the weights by hand.

No PEFT and nothing of a backend takes part, but for the values of the adapter's factors.

    W' = W + s · B · A      with s as `LoadedPolicy.lora` states it (alpha / r, or alpha / sqrt(r) for rsLoRA)
    dL/dA = s · Bᵀ · dL/dW'     dL/dB = s · dL/dW' · Aᵀ

`python -m rlvr.testing.conformance.oracle FOLDER` answers the questions that `reference.py` asks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr.testing.conformance.spoken import spoken


def main(folder: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for line in sys.stdin:
        error = None
        try:
            tensors = load_file(folder / "question.safetensors")
            save_file(answer(json.loads(line), tensors), folder / "answer.safetensors")
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps({"error": error}), file=answers, flush=True)


def answer(job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if job["what"] == "readable":
        job = {**job, "weights_dtype": "float32", "adapters": []}
        adapted(job, {})
    if job["what"] in ("readable", "spoken"):
        said = spoken(AutoTokenizer.from_pretrained(job["model"]))
        return {name: torch.tensor(ids) for name, ids in said.items()}
    model, ids, scale = adapted(job, tensors), tensors["ids"], job["scale"]
    with torch.set_grad_enabled(job["what"] == "gradients"):
        log_probabilities = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    if job["what"] == "logprobs":
        return {"logprobs": log_probabilities}
    loss = -log_probabilities.mean()
    loss.backward()
    found = {"loss": loss.detach()}
    for name in job["adapters"]:
        by_weight = model.get_submodule(name).weight.grad
        found[f"{name}.A"] = scale * tensors[f"{name}.B"].T @ by_weight
        found[f"{name}.B"] = scale * by_weight @ tensors[f"{name}.A"].T
    return found


@torch.no_grad()
def adapted(job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """The model in float32 on the CPU, adapter included."""
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="eager")
    model.eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(getattr(torch, job["weights_dtype"])))
    for name in job["adapters"]:
        model.get_submodule(name).weight += job["scale"] * tensors[f"{name}.B"] @ tensors[f"{name}.A"]
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
