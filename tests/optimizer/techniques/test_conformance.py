"""What every technique promises, run over every installed one."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
import torch

from shoal_optimizer.task import Task
from shoal_optimizer.techniques import Cancelled, Technique, Work, find
from shoal_protos.errors import InvalidInput, NotFound

NAMES = sorted(entry.name for entry in entry_points(group="shoal.techniques"))
QUICK = {"distillation": {"epochs": 1}}


@pytest.mark.parametrize("name", NAMES)
class TestTechnique:
    @pytest.fixture
    def technique(self, name: str) -> Technique:
        return find(name)

    def test_it_has_its_name_and_complete_defaults(self, technique: Technique, name: str) -> None:
        assert technique.name == name
        assert set(technique.check({})) == set(technique.parameters)

    def test_unknown_wrong_and_out_of_range_parameters_are_refused(self, technique: Technique) -> None:
        with pytest.raises(InvalidInput, match="no parameter"):
            technique.check({"no such thing": 1})
        for parameter, spec in technique.parameters.items():
            with pytest.raises(InvalidInput, match=parameter):
                technique.check({parameter: object()})
            if not spec.choices:
                with pytest.raises(InvalidInput, match=parameter):
                    technique.check({parameter: type(spec.default)(-1)})

    def test_the_result_runs_in_evaluation_mode_with_the_same_outputs(
        self, technique: Technique, name: str, quadrants: Task
    ) -> None:
        done = technique.run(Work.start(quadrants), QUICK.get(name, {}))
        assert done.model is not None
        assert not done.model.training
        assert quadrants.predict(done.model, quadrants.required("evaluation").inputs[:5]).shape == (5, 4)
        assert (done.precision == "int8") == technique.quantizes
        assert (done.quantization is not None) == technique.quantizes

    def test_the_teacher_is_not_changed(self, technique: Technique, name: str, quadrants: Task) -> None:
        before = {k: v.clone() for k, v in quadrants.original.state_dict().items()}
        technique.run(Work.start(quadrants), QUICK.get(name, {}))
        assert all(torch.equal(before[k], v) for k, v in quadrants.original.state_dict().items())

    def test_it_stops_when_asked(self, technique: Technique, name: str, quadrants: Task) -> None:
        with pytest.raises(Cancelled):
            technique.run(Work.start(quadrants, cancelled=lambda: True), QUICK.get(name, {}))

    def test_weights_that_are_no_numbers_are_refused(
        self, technique: Technique, name: str, quadrants: Task
    ) -> None:
        work = Work.start(quadrants)
        assert work.model is not None
        next(work.model.parameters()).data.fill_(float("nan"))
        with pytest.raises(InvalidInput):
            technique.run(work, QUICK.get(name, {}))


def test_an_unknown_technique_lists_the_known_ones() -> None:
    with pytest.raises(NotFound, match="distillation"):
        find("nothing")
