"""Whether two mathematical answers are equal, by math-verify (extra `math`)."""

from __future__ import annotations

import importlib.util
import re
import threading

from rlvr.rewards.text import tagged

TIMEOUT_S = 5
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
MISSING = 'it needs math-verify, which is not installed. Install it with: pip install "rlvr[math]"'


def has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def math_equal(prediction: str, answer: str) -> bool:
    """Whether the final answer in `prediction` equals `answer`.

    The final answer is what stands in the last `<answer>` tags, or else what math-verify finds: the last `\\boxed`,
    or the last expression. 1/2, 0.5, 50\\% and \\frac{1}{2} are equal. An answer that is no mathematics ("(C)",
    "Evelyn") must be the same text, but for spaces, case and what only dresses it.

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
    return written is not None and _as_written(written) == _as_written(answer) != ""


def _as_written(answer: str) -> str:
    """Without what only dresses an answer: spaces, dollar signs, \\text, a full stop, parentheses around all of it.

    Nothing that changes a value goes: -5 is not 5, and 4.2 is not 42.
    """
    plain = "".join(_TEXT.sub(r"\1", answer.replace("$", "")).split()).removesuffix(".").casefold()
    inner = plain[1:-1]
    return inner if plain == f"({inner})" and not set("()") & set(inner) else plain


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
