"""Faults of installed plugins, planted for the conformance kit's checks that start processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FaultyPlugin:
    """A fault of an installed plugin, as lines of its module, for the checks that start processes of their own."""

    check: str
    findings: tuple[str, ...]  # parts of what the check has to say
    load: str = ""  # in `rlvr_backend`
    top: str = ""  # at import


PATCHES_ONLY_WHEN_FIRST = """
import sys
if "trl" not in sys.modules:
    import trl
    class PatchedTrainer(trl.GRPOTrainer):
        pass
    trl.GRPOTrainer = PatchedTrainer
else:
    import logging, warnings
"""

WITH_A_BANNER = """
from rlvr.backends.hf.backend import HFBackend

class WithABanner(HFBackend):
    def load_policy(self, settings):
        print("Welcome!")
        return super().load_policy(settings)

return WithABanner()
"""

LEAVES_A_FILE = """
from rlvr.backends.hf.backend import HFBackend

class LeavesAFile(HFBackend):
    def apply_lora(self, policy, lora):
        open("compiled_cache.tmp", "w").close()
        return super().apply_lora(policy, lora)

return LeavesAFile()
"""

REFUSES_AUTO = """
from dataclasses import replace
from rlvr.backends.hf.backend import HFBackend
from rlvr.errors import UnsupportedSettingError

class RefusesAuto(HFBackend):
    def capabilities(self):
        return replace(super().capabilities(), fast_inference=True)

    def load_policy(self, settings):
        if settings.fast_inference == "auto":
            raise UnsupportedSettingError("no engine of its own accord")
        return super().load_policy(settings)

return RefusesAuto()
"""

FAULTY_PLUGINS = {
    "imports what is heavy": FaultyPlugin("lazy-plugin", ("listing it imports datasets",), top="import datasets"),
    "prints and writes": FaultyPlugin(
        "loads-first", ("Welcome!", "cache.txt"), load="print('Welcome!'); open('cache.txt', 'w').close()"
    ),
    "prints with each policy": FaultyPlugin("loads-first", ("Welcome!",), load=WITH_A_BANNER),
    "leaves a file with the first adapter": FaultyPlugin(
        "loads-first", ("writes to the working directory: compiled_cache.tmp",), load=LEAVES_A_FILE
    ),
    "leaves a file in a check": FaultyPlugin(
        "lora-r", ("writes to the working directory: compiled_cache.tmp",), load=LEAVES_A_FILE
    ),
    "refuses the default of a setting": FaultyPlugin(
        "setting-fast-inference", ("no engine of its own accord",), load=REFUSES_AUTO
    ),
    "patches only when first": FaultyPlugin(
        "loads-late",
        (
            "it leaves trl.trainer.grpo_trainer.GRPOTrainer as trl.GRPOTrainer",
            "loaded first, stranger_plugin.rlvr_backend.<locals>.PatchedTrainer",
        ),
        load=f"{PATCHES_ONLY_WHEN_FIRST}    warnings.warn('my cache is old')",  # which is not about the patch
    ),
}
