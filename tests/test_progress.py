"""Lines about how far it is: after three seconds, with what is left, and never at the end."""
from engine import progress


def test_progress_speaks_after_three_seconds_and_again_after_three_more(monkeypatch):
    now, taken, said = [100.0], [], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def slow():
        for part, seconds in (("ab", 1), ("c", 1.5), ("def", 1), ("g", 2), ("hi", 1.5), ("j", 50)):
            now[0] += seconds
            taken.append(part)
            yield part
    for part in progress.progress(slow(), 10, "letters", say=said.append):
        assert taken[-1] == part, "no more than it is asked for"
    # 3.5 s for 6 letters, 4 to come; silent at 5.5 s (2 s later); 7 s for 9; never at the end.
    assert said == ["  6 of 10 letters | eta 2 s", "  9 of 10 letters | eta 1 s"]


def test_times_are_in_units_that_people_use():
    assert [progress.clock(s) for s in (0.4, 80, 90, 5300, 5400)] == [
        "0 s", "80 s", "2 m", "88 m", "1.5 h"]
