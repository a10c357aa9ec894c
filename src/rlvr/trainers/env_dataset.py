"""An environment's rows as TRL wants them, without sending the rows themselves through Arrow."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlvr.environments.base import Environment, Rows
from rlvr.trainers.checked_rewards import TRL_KEYWORDS
from rlvr.types import Example

ROW = "rlvr_row"
_OURS = ("prompt", "trajectory", ROW)
_TRLS = (*TRL_KEYWORDS, "completion", "image", "images")  # an image column makes TRL send text as vision input

logger = logging.getLogger(__name__)


class ExampleStore:
    """Hands TRL a dataset of prompts, and finds the example behind each row of a batch.

    A row's own columns stay as the environment gave them: Arrow would add empty keys to nested values and refuse
    mixed types.
    """

    def __init__(self, environment: Environment):
        self._environment = environment
        self._sources: list[Rows] = []
        self._columns: dict[str, None] = {}

    def prompts(self, rows: Any) -> Any:
        """The dataset for TRL: `prompt` (messages) and a pointer to the row. Streams are mapped, not stored."""
        import datasets

        if isinstance(rows, datasets.IterableDataset):
            return rows.map(lambda row: {"prompt": self._environment.messages(row)})
        if isinstance(rows, Mapping):
            return {name: self.prompts(split) for name, split in rows.items()}
        source = len(self._sources)
        self._sources.append(rows)
        prompts = []
        for index in range(len(rows)):
            example = rows[index]
            self._columns.update(dict.fromkeys(example))
            prompts.append({"prompt": self._environment.messages(example), ROW: [source, index]})
        return datasets.Dataset.from_list(prompts)

    def example(self, row: Mapping[str, Any]) -> Example:
        if ROW not in row:
            return row
        source, index = row[ROW]
        return self._sources[source][index]

    def with_columns(self, rows: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> list[dict[str, Any]]:
        """The rows of a batch with the columns of their examples, for reward functions that take them as keywords.

        Every row has the columns of all examples, None where its own has none: TRL reads their names from the first
        row. Those with a name that means something to TRL are left out.
        """
        self._columns.update(dict.fromkeys(name for example in examples for name in example))
        names = [name for name in self._columns if name not in _OURS]
        _say_left_out(tuple(name for name in names if name in _TRLS))
        kept = [name for name in names if name not in _TRLS]
        return [
            {**{name: example.get(name) for name in kept}, **row} for row, example in zip(rows, examples, strict=True)
        ]


@functools.cache  # said once
def _say_left_out(names: tuple[str, ...]) -> None:
    if names:
        logger.warning(
            "reward_funcs are not given the column%s %s as keywords: TRL has another use for the name. Rename it, or "
            "read trajectory[i].example.",
            "s" if len(names) > 1 else "",
            ", ".join(names),
        )
