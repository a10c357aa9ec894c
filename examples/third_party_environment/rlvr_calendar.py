"""Meetings: the policy reads calendars with a tool, and books the earliest time at which everybody is free."""

import hashlib
import json
import random
from typing import Literal

from rlvr import Environment, Rubric, hookimpl
from rlvr.errors import DataError

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
TIMES = tuple(f"{hour:02d}:{minute}" for hour in range(9, 17) for minute in ("00", "30"))  # half hours of a day
PEOPLE = ("Ana", "Ben", "Chen", "Dora", "Emil", "Fatma", "Goran", "Hana")
HELD_OUT = 5  # one meeting in so many is for evaluation


def make_rows(count, *, people, days, seed, held_out):
    """Meetings for which there is a time. Whether one is held out is decided by a hash of it."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        busy = {
            person: {day: [time for time in TIMES if rng.random() < 0.5] for day in DAYS[:days]}
            for person in rng.sample(PEOPLE, rng.choice(people))
        }
        minutes = rng.choice((30, 60, 90))
        answer = earliest(busy, minutes)
        digest = hashlib.sha256(json.dumps([busy, minutes]).encode()).digest()
        if answer is None or (digest[0] % HELD_OUT == 0) != held_out:
            continue
        names = ", ".join(list(busy)[:-1]) + f" and {list(busy)[-1]}"
        question = f"Book a meeting of {minutes} minutes for {names}, from {DAYS[0]} to {DAYS[days - 1]}."
        rows.append({"question": question, "answer": answer, "busy": busy, "minutes": minutes, "people": len(busy)})
    return rows


def earliest(busy, minutes):
    """The first day and time at which nobody is busy, or None."""
    days = next(iter(busy.values()))
    return next(((day, time) for day in days for time in TIMES if all_free(busy, minutes, day, time)), None)


def all_free(busy, minutes, day, time):
    """Whether nobody is busy from then on for so many minutes, and the day is long enough."""
    first, count = TIMES.index(time), minutes // 30
    needed = TIMES[first : first + count]
    taken = {time for calendar in busy.values() for time in calendar[day]}
    return len(needed) == count and taken.isdisjoint(needed)


def earliest_booked(trajectory):
    return float(trajectory.state["meeting"] == trajectory.example["answer"])


def everybody_free(trajectory):
    example, meeting = trajectory.example, trajectory.state["meeting"]
    return float(meeting is not None and all_free(example["busy"], example["minutes"], *meeting))


def calendars_read(trajectory):
    return float(len(trajectory.state["read"]))


RUBRIC = Rubric(earliest_booked, (everybody_free, 0.2), (calendars_read, 0.0))


Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]


def read_calendar(person: str, day: Day, state: dict) -> str:
    """Tells when somebody is busy on a day.

    Args:
        person: the name.
        day: the day.
    """
    calendar = state["busy"].get(person)
    if calendar is None:
        raise ValueError(f"there is no calendar of {person!r}; there are those of {', '.join(state['busy'])}")
    if day not in calendar:
        raise ValueError(f"the meeting is to be on one of the days {', '.join(calendar)}")
    state["read"].add((person, day))
    return f"Busy for the half hours that start at: {', '.join(calendar[day]) or 'none'}."


def book(day: Day, time: str, state: dict) -> str:
    """Books the meeting, once and for all.

    Args:
        day: the day.
        time: when it starts, for example 09:30.
    """
    if day not in next(iter(state["busy"].values())) or time not in TIMES:
        raise ValueError(
            f"{day} {time} is no time to book; half hours of these days start at {TIMES[0]} to {TIMES[-1]}"
        )
    state.update(meeting=(day, time), done=True)
    return "Booked."


class Meetings(Environment):
    """`state["read"]`: the calendars that were read; `state["meeting"]`: day and time, once it is booked."""

    def new_state(self, example):
        return {"busy": example["busy"], "read": set(), "meeting": None}


SYSTEM_PROMPT = (
    "Arrange the meeting. Read the calendars, then book the earliest time at which everybody is free for all of it. "
    f"Working days are from {TIMES[0]} to 17:00, in half hours."
)


@hookimpl
def rlvr_environment(
    people: tuple[int, ...] = (2, 3),
    days: int = 2,
    train_size: int = 2000,
    eval_size: int = 200,
    seed: int = 0,
) -> Environment:
    """Book the earliest time at which everybody is free.

    Args:
        people: how many take part, 2 to 5; several numbers with commas, one of which is drawn for each meeting.
        days: days to choose from, 1 to 5.
        train_size: meetings to train on.
        eval_size: meetings held out.
        seed: decides which.
    """
    if not people or not all(number in range(2, 6) for number in people) or days not in range(1, 6):
        raise DataError(f"people is {people} and days is {days}; allowed: people from 2 to 5, days from 1 to 5.")
    if min(train_size, eval_size) < 1:
        raise DataError(f"train_size is {train_size} and eval_size is {eval_size}; each must be at least 1.")
    task = {"people": people, "days": days, "seed": seed}
    return Meetings(
        name="calendar",
        train_dataset=make_rows(train_size, **task, held_out=False),
        eval_dataset=make_rows(eval_size, **task, held_out=True),
        rubric=RUBRIC,
        system_prompt=SYSTEM_PROMPT,
        tools=[read_calendar, book],
        max_turns=max(people) * days + 4,
        max_tool_failures=3,
        group_metrics_by="people",
    )
