"""Plugins of backends to compare with `hf`: one that doubles alpha, and one that negates all gradients."""

OTHER_BACKEND = """
from dataclasses import replace
from rlvr import hookimpl

@hookimpl
def rlvr_backend():
    from rlvr.backends.hf.backend import HFBackend

    class Doubling(HFBackend):
        name = "other"

        def apply_lora(self, policy, lora):
            return super().apply_lora(policy, lora.applied(2))

    return Doubling()
"""
NEGATING_BACKEND = OTHER_BACKEND.replace("other", "negating").replace(
    "return super().apply_lora(policy, lora.applied(2))",
    """policy = super().apply_lora(policy, lora)
            for weight in policy.model.parameters():
                if weight.requires_grad:
                    weight.register_hook(lambda gradient: -gradient)
            return policy""",
)
