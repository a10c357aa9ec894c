"""What importing and listing load, read from `sys.modules` of a fresh process."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "accelerate",
    "datasets",
    "numpy",
    "pandas",
    "peft",
    "torch",
    "transformers",
    "trl",
    "unsloth",
    "vllm",
    "wandb",
)

STATEMENTS = {
    "the package": "import rlvr",
    "the listings": "import rlvr; rlvr.list_backends(); rlvr.list_environments()",
    "settings and protocol": "from rlvr import LoraSettings, ModelBackend; LoraSettings()",
    "the public helpers of backends": "from rlvr import load_policy; import rlvr.backends.checks",
    "what is known of the process": (
        "from rlvr.backends.process_state import replaced_trainer; assert replaced_trainer() is None"
    ),
    "an unknown backend": "import rlvr\ntry: rlvr.load_backend('unslot')\nexcept rlvr.RlvrError: pass",
    "the plugin modules": "import rlvr.backends.hf.plugin, rlvr_unsloth.plugin, rlvr_unsloth.process",
}


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("what", STATEMENTS)
def test_nothing_heavy_is_loaded_by(what):
    loaded = f"import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(run(f"{STATEMENTS[what]}\n{loaded}")) == []


def test_the_package_itself_loads_the_standard_library_only():
    code = (
        "import json, sys; before = set(sys.modules); import rlvr\n"
        "names = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(names - set(sys.stdlib_module_names) - {'rlvr'})))"
    )
    assert json.loads(run(code)) == []


def test_environments_whose_extra_is_missing_are_listed_with_it():
    packages = {"verifiers": "verifiers", "reasoning-gym": "reasoning_gym", "math": "math_verify"}
    code = (
        "import json, sys, rlvr\n"
        f"sys.modules.update(dict.fromkeys({list(packages.values())}))\n"
        "print(json.dumps({row.name: row.reason for row in rlvr.list_environments()}))"
    )
    reasons = json.loads(run(code))
    assert {name for name in reasons if reasons[name] is not None} == set(packages)
    for name in packages:
        assert reasons[name].endswith(f'Install it with: pip install "rlvr[{name}]"')
