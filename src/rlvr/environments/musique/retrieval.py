"""Retrievers over a question's paragraphs, in this process: lexical, semantic, hybrid, golden."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlvr.errors import EnvironmentDefinitionError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
RETRIEVERS = ("auto", "lexical", "semantic", "hybrid", "golden")
RRF_K = 60  # Cormack, Clarke and Büttcher 2009


class Retriever(Protocol):
    """Ranks paragraphs for a query."""

    def search(self, paragraphs: Sequence[dict[str, Any]], query: str, *, top_n: int) -> list[int]:
        """Positions in `paragraphs`, best first, `top_n` at most."""
        ...


def make_retriever(name: str, *, cache_folder: str | Path | None = None) -> Retriever:
    """The retriever of that name.

    Args:
        name: lexical, semantic, hybrid or golden; `semantic/MODEL` and `hybrid/MODEL` take a
            sentence-transformers model by id or folder; auto is hybrid where sentence-transformers is
            installed, else lexical.
        cache_folder: of embeddings; by default under the user's cache folder.

    Raises:
        EnvironmentDefinitionError: there is no such retriever, sentence-transformers is missing, or the model cannot
            be loaded.
    """
    kind, _, model = name.partition("/")
    if kind not in RETRIEVERS or (model and kind not in ("semantic", "hybrid")):
        raise EnvironmentDefinitionError(
            f"unknown retriever {name!r}; allowed: {', '.join(RETRIEVERS)}, semantic/MODEL and hybrid/MODEL."
        )
    if kind == "auto":
        kind = _automatic()
    if kind == "lexical":
        return Lexical()
    if kind == "golden":
        return Golden()
    if not _has_sentence_transformers():
        raise EnvironmentDefinitionError(
            f"the retriever {name!r} needs sentence-transformers, which is not installed. "
            'Install it with: pip install "rlvr[retrieval]", or use the retriever lexical.'
        )
    semantic = Semantic(Embedder(model or DEFAULT_MODEL), cache_folder=cache_folder)
    return semantic if kind == "semantic" else Hybrid(Lexical(), semantic)


def _has_sentence_transformers() -> bool:
    return importlib.util.find_spec("sentence_transformers") is not None


@cache
def _automatic() -> str:
    """Said once a process."""
    if _has_sentence_transformers():
        logger.info("retriever: hybrid (lexical and semantic).")
        return "hybrid"
    logger.warning('retriever: lexical. For hybrid retrieval: pip install "rlvr[retrieval]".')
    return "lexical"


class LexicalIndex:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over texts, through bm25s.

    Args:
        texts: N texts.
    """

    def __init__(self, texts: Sequence[str]):
        import bm25s

        self._size = len(texts)
        self._bm25 = bm25s.BM25()
        tokens = self._tokenize(texts)
        self._empty = not any(tokens)
        if not self._empty:
            self._bm25.index(tokens, show_progress=False)

    def search(self, queries: Sequence[str], *, top_n: int) -> list[list[int]]:
        """For each query the positions of texts that share a word with it, best first, `top_n` at most."""
        if self._empty or not queries:
            return [[] for _ in queries]
        import numpy as np

        found: list[list[int]] = []
        vocabulary = self._bm25.vocab_dict
        for words in self._tokenize(queries):
            ids = [vocabulary[word] for word in words if word in vocabulary]
            if not ids:
                found.append([])
                continue
            scores = self._bm25.get_scores_from_ids(ids)
            best = np.argpartition(-scores, min(top_n, self._size) - 1)[: min(top_n, self._size)]
            best = best[np.lexsort((best, -scores[best]))]  # ties in the order of the texts
            found.append([int(position) for position in best if scores[position] > 0])
        return found

    @staticmethod
    def _tokenize(texts: Sequence[str]) -> list[list[str]]:
        import bm25s

        return bm25s.tokenize(
            list(texts), token_pattern=r"(?u)\b\w+\b", stopwords="en", return_ids=False, show_progress=False
        )


class Lexical:
    """BM25 over a question's paragraphs. A question's index is made once and kept for a while."""

    def __init__(self, kept: int = 1024):
        self._indices = _Recent(kept)

    def search(self, paragraphs: Sequence[dict[str, Any]], query: str, *, top_n: int) -> list[int]:
        texts = paragraph_texts(paragraphs)
        index: LexicalIndex = self._indices.get(_digest(texts), lambda: LexicalIndex(texts))
        return index.search([query], top_n=top_n)[0]


class Semantic:
    """Cosine similarity of embeddings. Those of a question's paragraphs are kept in memory and on disk."""

    def __init__(self, embedder: Embedder, *, cache_folder: str | Path | None = None, kept: int = 1024):
        self.embedder = embedder
        model = hashlib.sha256(embedder.version.encode()).hexdigest()[:12]
        self._folder = Path(cache_folder or _user_cache()) / "embeddings" / model
        self._embeddings = _Recent(kept)

    def search(self, paragraphs: Sequence[dict[str, Any]], query: str, *, top_n: int) -> list[int]:
        import numpy as np

        texts = paragraph_texts(paragraphs)
        key = _digest(texts)
        of_paragraphs = self._embeddings.get(key, lambda: self._load_or_embed(key, texts))
        scores = of_paragraphs @ self.embedder.embed([query])[0]
        return [int(position) for position in np.argsort(-scores, kind="stable")[:top_n]]

    def _load_or_embed(self, key: str, texts: Sequence[str]) -> Array:
        import numpy as np

        file = self._folder / f"{key}.npy"
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # not there, or cut short by a crash
            embeddings = self.embedder.embed(texts)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as out:
                np.save(out, embeddings, allow_pickle=False)
            os.replace(out.name, file)  # another process may be reading
        except OSError as error:
            logger.warning("embeddings cannot be kept in %s: %s", self._folder, error)
        return embeddings


class Hybrid:
    """Reciprocal rank fusion of several retrievers: a paragraph scores the sum of 1 / (60 + rank)."""

    def __init__(self, *retrievers: Retriever):
        self.retrievers = retrievers

    def search(self, paragraphs: Sequence[dict[str, Any]], query: str, *, top_n: int) -> list[int]:
        scores: dict[int, float] = {}
        for retriever in self.retrievers:
            for rank, position in enumerate(retriever.search(paragraphs, query, top_n=len(paragraphs)), 1):
                scores[position] = scores.get(position, 0.0) + 1 / (RRF_K + rank)
        return sorted(scores, key=lambda position: (-scores[position], position))[:top_n]


class Golden:
    """The supporting paragraphs, whatever the query: the upper bound of retrieval."""

    def search(self, paragraphs: Sequence[dict[str, Any]], query: str, *, top_n: int) -> list[int]:
        return [i for i, paragraph in enumerate(paragraphs) if paragraph["is_supporting"]][:top_n]


class Embedder:
    """Embeds texts, of unit length. Calls that come while another is computed are computed together after it.

    Args:
        model_name: a sentence-transformers model, by id or folder. It is loaded at once, so that a misspelt one is
            noticed before anything else is loaded.
        encode: used instead of the model: a list of texts → an array of a row for each.

    Attributes:
        version: another one where a text's embedding may be another.

    Raises:
        EnvironmentDefinitionError: the model cannot be loaded.
    """

    def __init__(self, model_name: str, *, encode: Callable[[list[str]], Array] | None = None):
        self.version, self._encode = (model_name, encode) if encode is not None else _load_encoder(model_name)
        self._waiting: list[tuple[list[str], Future[Array]]] = []
        self._list_lock, self._encode_lock = threading.Lock(), threading.Lock()

    def embed(self, texts: Sequence[str]) -> Array:
        """N texts → N x D, float32."""
        future: Future[Array] = Future()
        with self._list_lock:
            self._waiting.append((list(texts), future))
        with self._encode_lock:  # whoever holds it computes for all that wait
            with self._list_lock:
                batch, self._waiting = self._waiting, []
            self._compute(batch)
        return future.result()

    def _compute(self, batch: list[tuple[list[str], Future[Array]]]) -> None:
        if not batch:
            return
        try:
            embeddings = self._encode([text for texts, _ in batch for text in texts])
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        start = 0
        for texts, future in batch:
            future.set_result(embeddings[start : start + len(texts)])
            start += len(texts)


def _load_encoder(model_name: str) -> tuple[str, Callable[[list[str]], Array]]:
    """The version of a model, and what embeds with it."""
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(model_name)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise EnvironmentDefinitionError(
            f"the embedding model {model_name!r} cannot be loaded: {reason}. "
            "Give another with --retriever semantic/MODEL, or use the retriever lexical."
        ) from error
    commit = getattr(model.model_card_data, "base_model_revision", None)

    def encode(texts: list[str]) -> Array:
        return model.encode(texts, normalize_embeddings=True, show_progress_bar=False)

    return _model_version(model_name, commit), encode


def _model_version(model_name: str, commit: str | None) -> str:
    """Of a folder: its files, with their sizes and times. Of a model on the Hub: its commit, where that is known."""
    folder = Path(model_name)
    if not folder.is_dir():
        return f"{model_name} {commit}"
    files = [
        (path.relative_to(folder).as_posix(), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    return f"{folder.resolve()} {[(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]}"


class _Recent:
    """The last `size` values by key; a missing one is made, once even if several threads ask."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._values: OrderedDict[str, Future[Any]] = OrderedDict()

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        with self._lock:
            future = self._values.get(key)
            mine = future is None
            if future is None:
                future = self._values[key] = Future()
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._values.pop(key, None)
                future.set_exception(error)
        return future.result()


def paragraph_texts(paragraphs: Sequence[dict[str, Any]]) -> list[str]:
    """Title and text: what is searched."""
    return [f"{paragraph['title']}\n{paragraph['paragraph_text']}" for paragraph in paragraphs]


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlvr"
