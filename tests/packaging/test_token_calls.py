"""The judge of the campaign `failovers`: which use of a consumed refresh token could have been avoided."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "campaigns"))

from token_calls import Call, Record  # noqa: E402


def judged(calls: list[Call], kill: tuple | None = None, failover: tuple | None = None) -> Record:
    record = Record()
    if kill:
        record.killed(*kill)
    if failover:
        record.failovers.append(failover)
    for call in sorted(calls, key=lambda call: call.processed):
        record.add(dataclasses.replace(call))
    record.judge()
    return record


def heard(pod: str, token: str, at: float, successor: str | None, after: float = 0.2) -> Call:
    return Call(pod, token, at, at + 0.1, at + after, True, successor)


def test_a_token_whose_use_was_heard_is_used_twice_without_need():
    calls = [heard("a", "T", 0, "S"), heard("a", "T", 20, None)]
    assert len(judged(calls).twice) == 1
    assert len(judged(calls, kill=("a", 12, 12.1)).twice) == 1, "what it heard was stored before it was killed"
    assert len(judged(calls, failover=(9, 12)).twice) == 1, "the standby had it"
    assert len(judged(calls, kill=("b", 0.1, 0.2)).twice) == 1, "another process was killed"


def test_a_token_that_another_process_is_using_is_used_twice_without_need():
    calls = [heard("a", "T", 0, "S", after=5), heard("b", "T", 3, None)]
    assert len(judged(calls).twice) == 1
    # Whichever Login with Amazon processed first.
    calls = [Call("a", "T", 0, 4, 5, True, None), Call("b", "T", 3, 3.1, 3.2, True, "S")]
    assert len(judged(calls).twice) == 1


def test_what_nobody_could_know_is_no_use_without_need():
    lost = [Call("a", "T", 0, 0.1, 5, False, "S"), heard("b", "T", 16, None)]
    assert judged(lost, kill=("a", 1, 1.1)).excused == {"a kill": 1}
    undone = [heard("a", "T", 0, "S"), heard("b", "T", 6, None)]
    assert judged(undone, failover=(-1, 2)).excused == {"a failover": 1}
    late = [Call("a", "T", 0, 0.1, 15, False, "S"), heard("a", "T", 10.6, None)]
    assert judged(late).excused == {"an answer that was not heard": 1}
    # Given up after 10 s, and processed after the call that was made instead of it.
    overtaken = [Call("a", "T", 0, 18, 18, False, None), heard("a", "T", 10.6, "S")]
    assert judged(overtaken).excused == {"a call that was given up and processed later": 1}
    for calls in (undone, late, overtaken):
        assert not judged(calls, failover=(-1, 2)).twice


def test_the_token_before_a_refused_one_is_a_last_resort():
    calls = [heard("a", "T", 0, "S"), Call("b", "S", 30, 30.1, 45, False, "U"), heard("a", "S", 50, None)]
    resort = judged([*calls, heard("a", "T", 50.3, None)])
    assert (resort.resorts, resort.twice) == (1, [])
    assert len(judged([*calls, heard("c", "T", 50.3, None)]).twice) == 1, "to this process it was not refused"


def test_a_loss_is_that_of_the_user_whose_token_was_consumed():
    record = Record()
    record.users["T"] = "anna"
    for call in (heard("a", "T", 0, "S"), Call("a", "S", 30, 30.1, 45, False, "U"), heard("b", "S", 60, None)):
        record.add(call)
    assert record.was_lost("anna", 55, 65)
    assert not record.was_lost("anna", 0, 55)
    assert not record.was_lost("berta", 55, 65)
