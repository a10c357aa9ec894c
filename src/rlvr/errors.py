"""Every exception that rlvr raises on purpose.

    RlvrError
    ├── ConfigError (ValueError)               settings that are impossible, all problems at once
    ├── PluginError
    │   ├── UnknownPluginError (LookupError)   no plugin of that name is installed
    │   ├── DuplicatePluginError (LookupError) two distributions claim one name
    │   └── PluginLoadError (ImportError)      the plugin is there and broken
    ├── BackendError
    │   ├── BackendUnavailableError (ImportError)  a package or device it needs is missing
    │   ├── UnsupportedSettingError (ValueError)   a setting that this backend cannot honour
    │   └── PatchedProcessError (RuntimeError)     another backend has patched this process
    ├── ModelError (ValueError)                model or tokenizer files that cannot be used
    ├── AdapterError (ValueError)              a PEFT state that cannot train correctly
    ├── DataError (ValueError)                 a dataset or a column that cannot be used
    ├── EnvironmentDefinitionError (ValueError)  an environment or a tool that is not well formed
    ├── InfrastructureError (RuntimeError)     a service failed: that rollout is excluded from training and counted
    ├── EndpointError (RuntimeError)           a model's API refused a request, or does not answer any more
    ├── RewardError (RuntimeError)             a reward function failed; the run is saved first
    ├── FrozenTrainingError (RuntimeError)     an optimizer step changed no trained parameter
    ├── SamplerDriftError (RuntimeError)       rollout and training disagree on log-probabilities
    ├── TrainingProcessError (RuntimeError)    the child process of an isolated run crashed
    ├── ExportError (RuntimeError)             an export that cannot be made, or is not what was trained
    └── RunFolderError (OSError)               an output folder that cannot be used

A message says what happened, the value received, what is allowed, and the fix. The command line prints it without a
traceback and exits with 2.
"""

from __future__ import annotations

from collections.abc import Sequence


class RlvrError(Exception):
    """Base of all of them."""


class ConfigError(RlvrError, ValueError):
    """Settings that are impossible. `problems` holds one sentence for each."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} settings cannot be used:\n{lines}")


class PluginError(RlvrError):
    """Something about an installed or missing plugin."""


class UnknownPluginError(PluginError, LookupError):
    """No installed plugin has that name."""


class DuplicatePluginError(PluginError, LookupError):
    """Two installed distributions claim the same name."""


class PluginLoadError(PluginError, ImportError):
    """The plugin is installed, and cannot be loaded or is not well formed."""


class BackendError(RlvrError):
    """Something about a model backend."""


class BackendUnavailableError(BackendError, ImportError):
    """The backend needs a package or a device that is not there."""


class UnsupportedSettingError(BackendError, ConfigError):
    """A setting that the backend cannot honour; nothing is ignored in silence."""


class PatchedProcessError(BackendError, RuntimeError):
    """Another backend has changed this process in a way that would train on the wrong class."""


class ModelError(RlvrError, ValueError):
    """Model or tokenizer files that are missing, broken or incomplete."""


class AdapterError(RlvrError, ValueError):
    """A model whose PEFT state would train nothing, or the wrong thing."""


class DataError(RlvrError, ValueError):
    """A dataset that cannot be loaded, is empty, or lacks a column."""


class EnvironmentDefinitionError(RlvrError, ValueError):
    """An environment, a tool or a rubric that is not well formed."""


class InfrastructureError(RlvrError, RuntimeError):
    """Raised by a tool or by `Environment.respond`: something outside failed, and the model is not to blame."""


class EndpointError(RlvrError, RuntimeError):
    """The API of a model refused a request in a way that trying again cannot mend, or no longer answers."""


class RewardError(RlvrError, RuntimeError):
    """A reward function raised, or returned something that is no reward."""


class FrozenTrainingError(RlvrError, RuntimeError):
    """An optimizer step with non-zero advantages changed no trained parameter."""


class SamplerDriftError(RlvrError, RuntimeError):
    """The rollout's log-probabilities are not those of the policy being trained."""


class TrainingProcessError(RlvrError, RuntimeError):
    """The child process of `rlvr.train(..., isolate=True)` crashed or was killed."""


class ExportError(RlvrError, RuntimeError):
    """An export that cannot be written or loaded back, or that is not the policy that was trained."""


class RunFolderError(RlvrError, OSError):
    """An output folder that is not writable, holds another run, or has nothing to resume from."""

    def __str__(self) -> str:  # OSError would print the arguments as a tuple when there are two
        return str(self.args[0]) if self.args else ""
