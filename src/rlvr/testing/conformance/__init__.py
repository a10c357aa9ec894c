"""Whether a model backend trains correctly: checks that any backend, installed or an object, has to pass.

    rlvr backends check mine                       # a table; exit code 1 if a check failed

    from rlvr.testing.conformance import backend_checks, check_backend

    report = check_backend("mine")
    assert report.ok, report

    @pytest.mark.parametrize("check", backend_checks("mine"))
    def test_conformance(check):
        check()

Importing this loads neither torch nor a backend, so that a backend can still choose its import order.
"""

from rlvr.testing.conformance.catalogue import CHECKS, GROUPS, Check
from rlvr.testing.conformance.report import CheckResult, Report
from rlvr.testing.conformance.runner import BackendCheck, backend_checks, check_backend

__all__ = ["CHECKS", "GROUPS", "BackendCheck", "Check", "CheckResult", "Report", "backend_checks", "check_backend"]
