import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from rlvr.tracking.progress import MetricsRows, ProgressDisplay, describe, duration


def play_run(display, steps, *, fail_at=None):
    state = SimpleNamespace(global_step=0, max_steps=steps, is_world_process_zero=True)
    display.on_train_begin(None, state, None)
    for step in range(1, steps + 1):
        display.on_step_begin(None, state, None)
        state.global_step = step
        display.on_step_end(None, state, None)
        display.on_log(None, state, None, logs={"reward": step / 100, "completions/mean_length": 12.4})
        if step == fail_at:
            display.close()
            return
    display.on_log(None, state, None, logs={"train_runtime": 1.0})
    display.on_train_end(None, state, None)


def test_without_a_terminal_there_is_a_line_now_and_then():
    out = io.StringIO()
    play_run(ProgressDisplay(Console(file=out, force_terminal=False)), steps=100)
    lines = out.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("step 5/100 · reward 0.050 · 12 tokens · ")
    assert lines[-1].startswith("step 100/100 · reward 1.000")
    assert lines[-1].endswith("0:00 left")


@pytest.mark.parametrize("fail_at", [None, 2])
def test_on_a_terminal_there_is_a_bar_that_ends_with_the_run(fail_at):
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, force_terminal=True, width=120))
    play_run(display, steps=4, fail_at=fail_at)
    assert "reward 0.0" in out.getvalue()
    assert out.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_rows_carry_their_step():
    rows = []
    callback = MetricsRows(rows.append)
    state = SimpleNamespace(global_step=7, is_world_process_zero=True)
    callback.on_log(None, state, None, logs={"reward": 0.5})
    state.is_world_process_zero = False
    callback.on_log(None, state, None, logs={"reward": 0.6})
    assert rows == [{"step": 7, "reward": 0.5}]


def test_words():
    assert describe({"reward": "0.25"}, 1.26) == "reward 0.250 · 1.3 s a step"
    assert [duration(s) for s in (0, 42.4, 187, 3723)] == ["0:00", "0:42", "3:07", "1:02:03"]
