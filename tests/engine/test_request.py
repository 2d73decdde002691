"""What the caller of a request gets to see."""

from __future__ import annotations

from smolrun.engine.sequence import Ending
from tests.engine.fakes import TokenOutput, collect, fake_engine, fake_of, parameters


def test_who_skips_to_the_end_gets_only_that() -> None:
    engine = fake_engine()
    runner = fake_of(engine)
    runner.hold(2)
    try:
        request = engine.submit([1, 2, 3], parameters(max_tokens=9), TokenOutput())
        first = next(request)  # told before
        request.skip_to_end()
        runner.go_on()
        *told, ending = request
        assert isinstance(ending, Ending)
        assert ending.completion_tokens == 9
        assert len(told) <= 1  # of the step that may have been over
        whole, _ = collect(engine.submit([1, 2, 3], parameters(max_tokens=9), TokenOutput()))
        assert [first, *told] == whole[: 1 + len(told)]
    finally:
        runner.go_on()
        engine.close()
