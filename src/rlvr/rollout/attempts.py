"""The file of an evaluation's attempts, so that one that was stopped goes on.

    attempts.jsonl                 a row for each attempt, written when it is scored
    attempts.jsonl.settings.json   what the attempts were made with

A row has `example` (index), `attempt` (from 0), `prompt`, `completion` (messages), `rewards`, `reward`, `passed`,
`stop_reason`, `tokens` (of the completion), `failure` and `adapter`, the hash of the weights that sampled it (None
through an API). Rows are in the order in which attempts ended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlvr.environments.base import Environment
from rlvr.errors import RunFolderError
from rlvr.rollout.api import json_bytes
from rlvr.rollout.evaluation import ScoredTrajectory
from rlvr.secrets import without_secrets
from rlvr.types import Example, Message, StopReason, ToolCall, Trajectory, Turn


class AttemptFile:
    """Attempts on disk. Nothing is written before `begin`.

    Args:
        path: of the JSONL file.
        resume: go on with the file, where there is one.

    Raises:
        RunFolderError: its folder is missing, or the file exists and `resume` is off.
    """

    def __init__(self, path: str | Path, *, resume: bool):
        self.path = Path(path)
        self._settings: dict[str, Any] = {}
        self.settings_path = self.path.with_name(self.path.name + ".settings.json")
        if not self.path.parent.is_dir():
            raise RunFolderError(
                f"there is no folder {str(self.path.parent)!r} for --output; make it, or choose another."
            )
        existing = [file for file in (self.path, self.settings_path) if file.exists()]
        if existing and not resume:
            raise RunFolderError(
                f"the file {str(existing[0])!r} exists, and nothing is written over. Choose another --output, or go "
                "on with it: --resume."
            )

    def done(
        self, environment: Environment, rows: Sequence[Example], made_with: Mapping[str, Any]
    ) -> list[ScoredTrajectory]:
        """The attempts in the file that count. Those that infrastructure failures took out are to be made again.

        Args:
            rows: the examples that are evaluated.
            made_with: what else decides how an attempt turns out. Shown where it is not what the file was made with;
                secrets among its `env_options` are neither kept nor compared.

        Raises:
            RunFolderError: the file was made with other settings, or cannot be read.
        """
        examples = {"environment": environment.name, "examples": len(rows), "prompts": _digest(environment, rows)}
        self._settings = json.loads(json.dumps(without_secrets({**examples, **made_with}), default=str))
        if not self.path.exists() and not self.settings_path.exists():
            return []
        self._check_settings()
        return [_attempt(record, rows) for record in self._records() if record["passed"] is not None]

    def begin(self, done: Sequence[ScoredTrajectory], *, adapter: str | None = None) -> None:
        """Writes the settings, and the file with the attempts that stay in it.

        Args:
            adapter: the hash of the policy's weights, None where it is not known.

        Raises:
            RunFolderError: other weights made the attempts, or nothing can be written.
        """
        others = [item.adapter for item in done if item.adapter != adapter]
        if others:
            raise RunFolderError(
                f"other weights made the attempts in {str(self.path)!r}: their hash was {others[0]}, and that of the "
                f"policy is {adapter}. Bring the weights back, or choose another --output."
            )
        _replace(self.settings_path, json.dumps(self._settings, indent=2, ensure_ascii=False).encode() + b"\n")
        _replace(self.path, b"".join(map(_line, done)))

    def add(self, item: ScoredTrajectory) -> None:
        with open(self.path, "ab") as file:
            file.write(_line(item))

    def _check_settings(self) -> None:
        try:
            before = without_secrets(json.loads(self.settings_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"cannot go on with {str(self.path)!r}: {str(self.settings_path)!r}, which says what it was made "
                f"with, cannot be read ({error}). Choose another --output."
            ) from error
        now = self._settings
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            differences = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
            raise RunFolderError(
                f"{str(self.path)!r} was made with other settings: {differences}. Give the same ones, or choose "
                "another --output."
            )

    def _records(self) -> list[dict[str, Any]]:
        """Without a last line that was not written to its end."""
        *lines, _ = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise RunFolderError(
                    f"line {number} of {str(self.path)!r} is no JSON: {error}. Take it out, and its attempt is made "
                    "again."
                ) from error
        return records


def _digest(environment: Environment, rows: Sequence[Example]) -> str:
    """The same for the same prompts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(environment.messages(row), sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _line(item: ScoredTrajectory) -> bytes:
    trajectory = item.trajectory
    record = {
        "example": item.example,
        "attempt": item.attempt,
        "prompt": list(trajectory.prompt),
        "completion": trajectory.completion,
        "rewards": dict(item.rewards),
        "reward": item.reward,
        "passed": item.passed,
        "stop_reason": str(trajectory.stop_reason),
        "tokens": item.tokens,
        "failure": trajectory.failure,
        "adapter": item.adapter,
    }
    return json_bytes(record) + b"\n"


def _attempt(record: Mapping[str, Any], rows: Sequence[Example]) -> ScoredTrajectory:
    """An attempt from its row. The state is not in it, nor are calls that could not be read."""
    trajectory = Trajectory(
        example=rows[record["example"]],
        prompt=tuple(record["prompt"]),
        turns=_turns(record["completion"]),
        stop_reason=StopReason(record["stop_reason"]),
    )
    values = {
        name: record[name] for name in ("example", "attempt", "rewards", "reward", "passed", "tokens", "adapter")
    }
    return ScoredTrajectory(trajectory=trajectory, **values)


def _turns(completion: Sequence[Message]) -> tuple[Turn, ...]:
    starts = [index for index, message in enumerate(completion) if message["role"] == "assistant"]
    ends = [*starts[1:], len(completion)]
    return tuple(
        Turn(completion[start], _calls(completion[start]), tuple(completion[start + 1 : end]))
        for start, end in zip(starts, ends, strict=True)
    )


def _calls(message: Message) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(call["function"]["name"], call["function"]["arguments"], call_id=call.get("id"))
        for call in message.get("tool_calls") or ()
    )


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, whenever the process is stopped."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise RunFolderError(f"cannot write to {str(path)!r}: {error.strerror}.") from error
