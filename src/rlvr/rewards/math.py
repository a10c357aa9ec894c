"""Whether two mathematical answers are equal, by math-verify (extra `math`)."""

from __future__ import annotations

import importlib.util
import threading

from rlvr.rewards.text import normalize_answer, tagged

TIMEOUT_S = 5
MISSING = 'it needs math-verify, which is not installed. Install it with: pip install "rlvr[math]"'


def has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def math_equal(prediction: str, answer: str) -> bool:
    """Whether the final answer in `prediction` equals `answer`.

    The final answer is what stands in the last `<answer>` tags, or else what math-verify finds: the last `\\boxed`,
    or the last expression. 1/2, 0.5, 50\\% and \\frac{1}{2} are equal. An answer that is no mathematics ("(C)",
    "Evelyn") must be the same text.

    Args:
        prediction: the text of a completion.
        answer: an answer alone, as text or LaTeX.
    """
    from math_verify import parse, verify

    # math-verify's time limit is an alarm signal, which only the main thread may set
    timeout = TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    found = tagged(prediction)
    text = prediction if found is None else f"\\boxed{{{found}}}"
    expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=timeout)
    given = parse(text, parsing_timeout=timeout)
    if expected and given and verify(expected, given, timeout_seconds=timeout):
        return True
    written = boxed(text)
    return written is not None and normalize_answer(written) == normalize_answer(answer) != ""


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, braces matched; None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position].strip()
    return None
