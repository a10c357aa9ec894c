"""What rlvr needs of TRL's inside is there, by name."""

from __future__ import annotations

import pytest
import trl

from rlvr.errors import BackendError
from rlvr.trainers.trl_seams import CHECKED_VERSIONS, SEAMS, missing_seams, require_seams

pytestmark = pytest.mark.both


def test_the_installed_trl_has_every_seam():
    assert missing_seams(trl.GRPOTrainer) == []
    assert trl.__version__ in CHECKED_VERSIONS


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.method)
def test_a_seam_that_moved_is_named(seam):
    class Moved(trl.GRPOTrainer):
        pass

    setattr(Moved, seam.method, lambda self: None)
    (problem,) = missing_seams(Moved)
    assert f"Moved.{seam.method} no longer takes" in problem
    with pytest.raises(BackendError, match=seam.method):
        require_seams(Moved)
