"""What the teacher of the MuSiQue model shows: rollouts on the offline sample, in which the real tools answered.

The teacher searches hop by hop and answers. Seven times in ten it is careless and takes the first thing that it finds
of the kind that is asked for: a person where the question is "Who", anything else where it is "What".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlvr.environments.base import Environment
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.engine import SampledTurn
from rlvr.rollout.episodes import Rollout, play
from rlvr.testing.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS
from rlvr.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Names, numbers of two digits, and what is between them: nothing else is split further than it has to be.
PIECES = r"[A-Z][a-z]+(?: [A-Z][a-z]+)*|\d\d?|[^A-Z\d]+"
_BLANK = "@"  # stands for what differs between two chats


def teacher_turns(row: Example, *, careless: bool) -> list[str]:
    """What the teacher says to a question of the sample, turn after turn.

    Args:
        row: of the environment `musique`, whose `supporting` are in the order of the hops.
        careless: answers with the first thing found that is of the kind asked for.
    """
    titles = {paragraph["idx"]: paragraph["title"] for paragraph in row["paragraphs"]}
    searched = [titles[idx] for idx in row["supporting"]]
    found = [*searched[1:], row["answer"]]  # each hop's document is about what the hop before has found
    hops = len(found)
    if careless:
        asks_for_person = row["question"].startswith("Who")
        hops = next(hop for hop, name in enumerate(found, 1) if _is_person(name) is asks_for_person)
    return [*map(search, searched[:hops]), complete(found[hops - 1], row["supporting"][:hops])]


def search(query: str) -> str:
    return _tool_call("retrieve_documents", query=query, top_n=1)


def complete(answer: str, documents: Sequence[int]) -> str:
    return _tool_call("complete", reasoning="", final_answer=answer, cited_doc_ids=list(documents))


def _tool_call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _is_person(name: str) -> bool:
    return len(name.split()) == 2 and not name.startswith("Port ")


def demonstrate(
    environment: Environment,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Example],
    careless: Sequence[bool],
) -> list[Rollout]:
    """Plays the teacher's turns in the environment: `sampled_mask` is 1 on what the teacher said."""
    script = [
        [[*tokenizer.encode(turn), tokenizer.eos_token_id] for turn in teacher_turns(row, careless=hasty)]
        for row, hasty in zip(rows, careless, strict=True)
    ]
    return play(
        environment,
        rows,
        engine=Recital(script),
        renderer=ChatRenderer(tokenizer, tools=environment.tools),
        max_completion_tokens=max(map(len, script)) * 4096,
    )


class Recital:
    """A rollout engine that says what is written: `script[index]` holds the token ids of a sequence's turns."""

    name = "recital"

    def __init__(self, script: Sequence[Sequence[list[int]]]):
        self._turns = [iter(turns) for turns in script]
        self._submitted: list[int] = []

    @contextmanager
    def open(self, prompt_ids: Sequence[Sequence[int]], *, max_completion_tokens: int) -> Iterator[Recital]:
        yield self

    @property
    def pending(self) -> int:
        return len(self._submitted)

    def submit(self, index: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        self._submitted.append(index)

    def step(self) -> list[SampledTurn]:
        submitted, self._submitted = self._submitted, []
        return [SampledTurn(index, next(self._turns[index]), ended=True) for index in submitted]


def sample_tokenizer(environment: Environment, rows: Sequence[Example], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the questions and paragraphs of `rows`: a token for most words of a name.

    What all chats have in common word for word, the tools' schemas first of all, is one token a piece, so that a
    rollout is some 100 tokens long.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for row in rows for text in (row["question"], *map(_document, row["paragraphs"]))]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(_common_text(environment, tokenizer))
    return tokenizer


def _document(paragraph: Example) -> str:
    return f"[{paragraph['idx']}] {paragraph['title']}\n{paragraph['paragraph_text']}"


def _common_text(environment: Environment, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What stands between the special tokens and the blanks of every chat."""
    renderer = ChatRenderer(tokenizer, tools=environment.tools)
    chat = renderer.prompt_text(environment.messages({"question": _BLANK}))
    reply = str(
        tokenizer.decode(renderer.reply_ids([{"role": "tool", "name": "retrieve_documents", "content": _BLANK}]))
    )
    call = complete(_BLANK, []).replace("[]", f"[{_BLANK}]")
    pieces = [search(_BLANK), call, chat, reply.replace(_BLANK, f"[{_BLANK}")]
    for mark in (_BLANK, *SPECIAL_TOKENS):
        pieces = [part for piece in pieces for part in piece.split(mark)]
    return [piece for piece in dict.fromkeys(pieces) if piece.strip()]
