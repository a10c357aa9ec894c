"""An environment's rows as TRL wants them, without sending the rows themselves through Arrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlvr.environments.base import Environment, Rows
from rlvr.types import Example

ROW = "rlvr_row"


class ExampleStore:
    """Hands TRL a dataset of prompts, and finds the example behind each row of a batch.

    A row's own columns stay as the environment gave them: Arrow would add empty keys to nested values and refuse
    mixed types.
    """

    def __init__(self, environment: Environment):
        self._environment = environment
        self._sources: list[Rows] = []

    def prompts(self, rows: Any) -> Any:
        """The dataset for TRL: `prompt` (messages) and a pointer to the row. Streams are mapped, not stored."""
        import datasets

        if isinstance(rows, datasets.IterableDataset):
            return rows.map(lambda row: {"prompt": self._environment.messages(row)})
        if isinstance(rows, Mapping):
            return {name: self.prompts(split) for name, split in rows.items()}
        source = len(self._sources)
        self._sources.append(rows)
        return datasets.Dataset.from_list(
            [{"prompt": self._environment.messages(rows[index]), ROW: [source, index]} for index in range(len(rows))]
        )

    def example(self, row: Mapping[str, Any]) -> Example:
        if ROW not in row:
            return row
        source, index = row[ROW]
        return self._sources[source][index]
