"""Layers of transformers and PEFT in fewer kernels, for training forwards and for prompts of rollouts.

`layers`: norms, rotations and gated activations; `lora`: LoRA's linear layers; `flash`: attention of packed sequences.
All have the mathematics of what they replace; `kernels` are their Triton kernels on CUDA.
"""
