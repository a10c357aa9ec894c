from __future__ import annotations

import sys

collect_ignore = ["test_verifiers.py"] if sys.version_info < (3, 11) else []  # as verifiers itself
