"""The tools of MuSiQue: search, read, answer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from rlvr.environments.musique.retrieval import Retriever
from rlvr.types import Example

State = MutableMapping[str, Any]
MAX_TOP_N = 10


def new_state(example: Example) -> dict[str, Any]:
    """`paragraphs` are the question's; `seen` the documents that the policy was shown, by id, in order, once
    each.

    `complete` adds `answer`, `citations` and `done`.
    """
    return {"paragraphs": list(example["paragraphs"]), "seen": []}


class MusiqueTools:
    """The three tools over one retriever."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever

    @property
    def functions(self) -> list[Any]:
        return [self.retrieve_documents, self.get_document, self.complete]

    def retrieve_documents(self, query: str, state: State, top_n: int = 3) -> str:
        """Finds the documents that match a query best.

        Args:
            query: what to search for.
            top_n: how many documents, 1 to 10.
        """
        if not 1 <= top_n <= MAX_TOP_N:
            raise ValueError(f"top_n must be from 1 to {MAX_TOP_N}, got {top_n}")
        positions = self.retriever.search(state["paragraphs"], query, top_n=top_n)
        if not positions:
            return "No document matches."
        return "\n\n".join(_show(state["paragraphs"][position], state) for position in positions)

    def get_document(self, doc_id: int, state: State) -> str:
        """Gives one document.

        Args:
            doc_id: the document's number.
        """
        for paragraph in state["paragraphs"]:
            if paragraph["idx"] == doc_id:
                return _show(paragraph, state)
        raise ValueError(f"there is no document {doc_id}")

    def complete(self, reasoning: str, final_answer: str, cited_doc_ids: list[int], state: State) -> str:
        """Gives the final answer and ends the search.

        Args:
            reasoning: how the answer follows from the documents, in short.
            final_answer: the answer alone, as short as possible.
            cited_doc_ids: numbers of the documents that the answer rests on.
        """
        citations = list(dict.fromkeys(int(doc_id) for doc_id in cited_doc_ids))
        state.update(answer=final_answer, reasoning=reasoning, citations=citations, done=True)
        return "Done."


def _show(paragraph: Mapping[str, Any], state: State) -> str:
    if paragraph["idx"] not in state["seen"]:
        state["seen"].append(paragraph["idx"])
    return f"[{paragraph['idx']}] {paragraph['title']}\n{paragraph['paragraph_text']}"
