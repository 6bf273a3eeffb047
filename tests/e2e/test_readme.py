"""The README's first hour, as written: the benchmark that replays it, in this virtual environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


@pytest.mark.usefixtures("benchmarks")
class TestFirstHour:
    def test_every_block_says_where_it_is_typed(self) -> None:
        import replay

        steps = replay.steps((REPOSITORY / "README.md").read_text())
        assert {step.where for step in steps} == {"laptop", "server", "board"}
        assert len(steps) <= 8
        assert any(replay.JOIN_LINE in step.text for step in steps)

    def test_a_block_without_a_place_is_refused(self) -> None:
        import replay

        with pytest.raises(ValueError, match="where"):
            replay.steps(f"\n{replay.HEADING}\n\n```sh\nshoal up\n```\n")
        with pytest.raises(ValueError, match="section"):
            replay.steps("# Nothing\n")

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    @pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="it would install a system unit here")
    @pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs a virtual environment")
    def test_as_written(self) -> None:
        import first_hour

        hour = first_hour.play(quick=True)
        answers = dict(line.split("\t") for line in hour.answers.splitlines() if "\t" in line)
        right = sum(answer.split()[0] == Path(name).stem for name, answer in answers.items())
        assert len(answers) == 10 and right >= 8
        assert hour.figures["first_variant_s"][0] < 600
