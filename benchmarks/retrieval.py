"""Lexical retrieval: milliseconds for a batch of queries over many paragraphs.

    python benchmarks/retrieval.py [--paragraphs 10000] [--queries 64] [--repeats 20]

The paragraphs are the offline sample's. Goal on 2 cores: 64 queries over 10,000 paragraphs in under 50 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from rlvr.environments.musique.retrieval import LexicalIndex, paragraph_texts
from rlvr.environments.musique.sample import sample_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paragraphs", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()

    rows = sample_questions(max(-(-options.paragraphs // 20), options.queries), seed=0)
    texts = [text for row in rows for text in paragraph_texts(row["paragraphs"])][: options.paragraphs]
    queries = [row["question"] for row in rows[: options.queries]]

    start = time.perf_counter()
    index = LexicalIndex(texts)
    index_s = time.perf_counter() - start
    index.search(queries, top_n=3)  # the first call loads what is loaded lazily
    times_ms = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        index.search(queries, top_n=3)
        times_ms.append(1000 * (time.perf_counter() - start))
    print(
        json.dumps(
            {
                "paragraphs": len(texts),
                "queries": len(queries),
                "index_s": round(index_s, 3),
                "median_ms": round(statistics.median(times_ms), 2),
                "worst_ms": round(max(times_ms), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
