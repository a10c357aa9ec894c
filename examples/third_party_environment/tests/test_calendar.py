import pytest
from rlvr_calendar import TIMES, all_free, earliest

import rlvr
from rlvr.testing.scripted import play_script, tool_call

BUSY = {
    "Ana": {"Monday": ["09:00", "10:00", "12:30"], "Tuesday": []},
    "Ben": {"Monday": [*TIMES[3:6], *TIMES[8:]], "Tuesday": ["09:30"]},
}
ROW = {"question": "Book it.", "answer": ("Monday", "12:00"), "busy": BUSY, "minutes": 30, "people": 2}


@pytest.fixture(scope="module")
def env():
    return rlvr.load_environment("calendar", train_size=50, eval_size=20)


@pytest.mark.parametrize(("minutes", "answer"), [(30, ("Monday", "09:30")), (60, ("Tuesday", "10:00")), (500, None)])
def test_the_earliest_time(minutes, answer):
    """By hand: on Monday both are free at 09:30 and at 12:00, never for an hour."""
    assert earliest(BUSY, minutes) == answer


def test_a_meeting_ends_by_the_end_of_the_day():
    assert all_free({"Ana": {"Monday": []}}, 60, "Monday", "16:00")
    assert not all_free({"Ana": {"Monday": []}}, 60, "Monday", "16:30")


def test_a_meeting_that_is_booked_rightly(env):
    row = {**ROW, "answer": ("Monday", "09:30")}
    played = play_script(
        env,
        [
            tool_call("read_calendar", person="Ana", day="Monday")
            + tool_call("read_calendar", person="Ben", day="Monday"),
            tool_call("book", day="Monday", time="09:30"),
        ],
        example=row,
    )
    assert played.turns[0].replies[0]["content"] == "Busy for the half hours that start at: 09:00, 10:00, 12:30."
    assert played.stop_reason == "completed"
    assert env.rubric.score(played) == {"earliest_booked": 1, "everybody_free": 1, "calendars_read": 2}


@pytest.mark.parametrize(("time", "free"), [("12:00", 1), ("10:00", 0)])
def test_other_times(env, time, free):
    played = play_script(
        env, [tool_call("book", day="Monday", time=time)], example={**ROW, "answer": ("Monday", "09:30")}
    )
    assert env.rubric.score(played) == {"earliest_booked": 0, "everybody_free": free, "calendars_read": 0}


def test_no_meeting_is_worth_nothing(env):
    played = play_script(env, ["Tuesday would suit."], example=ROW)
    assert played.stop_reason == "no_tool_call"
    assert env.rubric.total(env.rubric.score(played)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (tool_call("read_calendar", person="Zoe", day="Monday"), "no calendar of 'Zoe'; there are those of Ana, Ben"),
        (tool_call("read_calendar", person="Ana", day="Friday"), "one of the days Monday, Tuesday"),
        (tool_call("read_calendar", person="Ana", day="Sunday"), 'day must be one of ["Monday"'),
        (tool_call("book", day="Monday", time="9.30"), "Monday 9.30 is no time to book"),
    ],
)
def test_mistakes_are_told_to_the_policy(env, call, message):
    played = play_script(env, [call, "Sorry."], example=ROW)
    assert message in played.turns[0].replies[0]["content"]
    assert played.failed_calls == 1


def test_every_row_can_be_solved_and_none_is_in_both_splits(env):
    for row in [*env.train_dataset, *env.eval_dataset]:
        assert row["answer"] == earliest(row["busy"], row["minutes"])
    other_seed = rlvr.load_environment("calendar", train_size=500, eval_size=20, seed=1)
    assert not [row for row in env.eval_dataset if row in other_seed.train_dataset]


@pytest.mark.parametrize("options", [{"people": (1,)}, {"people": ()}, {"days": 6}, {"eval_size": 0}])
def test_options_that_make_no_sense(options):
    with pytest.raises(rlvr.RlvrError, match=next(iter(options))):
        rlvr.load_environment("calendar", **options)
