"""`shoal task new` and `check`, and how `shoal model push` ends, as people type them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shoal_controller.api import schemas
from shoal_controller.cli import pushed
from shoal_controller.cli.task import parse_size
from shoal_protos.errors import InvalidInput
from tests.cli.conftest import Api, Shoal, optimization, version


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["a,b,class"] + [f"{a:.3f},{b:.3f},{'xy'[int(a > 0)]}" for a, b in rng.normal(0, 1, (200, 2))]
    (tmp_path / "points.csv").write_text("\n".join(lines))
    return tmp_path / "points.csv"


def summary(name: str, devices: int) -> schemas.ClassSummary:
    return schemas.ClassSummary(name=name, devices=devices, by_status={})


class TestTask:
    def test_new_check_and_push(self, table: Path, api: Api, shoal: Shoal) -> None:
        made = shoal("task", "new", "points.csv")
        assert made.code == 0, made.err
        assert made.out == "points.py\n"
        assert "200: 160 train, 40 judge" in made.err and "python points.py" in made.err
        text = Path("points.py").read_text()
        Path("points.py").write_text(text.replace("epochs: int = 60", "epochs: int = 3"))
        api.answer("GET", "/classes", [summary("x86_64.avx2.2c+onnxruntime", 2), summary("rp2040", 1)])
        done = shoal("task", "check", "points.py")
        assert done.code == 0, done.err
        rows = [line.split("\t")[:2] for line in done.out.splitlines()[1:]]
        assert ["export", "ok"] in rows and ["metric", "ok"] in rows
        assert "It would serve x86_64.avx2.2c+onnxruntime (2 devices)." in done.err
        assert "Nothing is made for rp2040" in done.err
        again = shoal("task", "new", "points.csv")
        assert again.code == 1 and "--force" in again.err
        sent = shoal("model", "push", "points.py", "--dry-run")
        assert sent.code == 0 and "points.py, points-data.npz" in sent.err

    def test_check_fails_with_one(self, tmp_path: Path, shoal: Shoal) -> None:
        path = tmp_path / "t.py"
        path.write_text("x = 1\n")
        done = shoal("task", "check", str(path), "--json")
        assert done.code == 1
        report = json.loads(done.out)
        assert not report["ok"] and report["checks"][2]["found"] == "t.py has no Task."
        plain = shoal("task", "check", str(path))
        assert plain.code == 1 and "1 thing to mend" in plain.err
        assert shoal("task", "check", str(tmp_path / "gone.py")).code == 2

    def test_new_says_what_is_wrong(self, table: Path, shoal: Shoal) -> None:
        done = shoal("task", "new", "points.csv", "--target", "color")
        assert done.code == 2 and "no column 'color'" in done.err and "a, b, class" in done.err
        assert shoal("task", "new", "points.csv", "--size", "big").code == 2
        assert shoal("task", "new", "points.csv", "--weights", "w.pt").code == 2

    def test_json(self, table: Path, shoal: Shoal) -> None:
        made = json.loads(shoal("task", "new", "points.csv", "--name", "My Points", "--json").out)
        assert made["task"].endswith("my_points.py") and made["files"] == ["my_points-data.npz"]

    def test_sizes(self) -> None:
        assert parse_size("") is None and parse_size("96") == (96, 96) and parse_size("96x128") == (96, 128)
        for wrong in ("0", "1x2x3", "-4", "9999"):
            with pytest.raises(InvalidInput):
                parse_size(wrong)


class TestPushed:
    def variant(self, name: str, **figures: object) -> schemas.Variant:
        return schemas.Variant(
            id="k-1", model="signs", version=1, name="plain", bundle="sha256:0", target="onnxruntime",
            precision="fp32", recipe=[], size_bytes=10, wire_bytes=5, plain=True, created_ms=1,
            classes=[schemas.VariantFigures(profile_class=name, **figures)],  # type: ignore[arg-type]
        )  # fmt: skip

    def test_states(self) -> None:
        probed = schemas.Figure(value=1.0, source="probe")
        found = pushed.plain_states(
            [summary("a", 3), summary("b", 1), summary("c", 2)],
            [self.variant("a", serving=2), self.variant("c", latency_p95_ms=probed), self.variant("d")],
        )
        assert [(s.profile_class, s.devices, s.state) for s in found] == [
            ("a", 3, "serves on 2"),
            ("b", 1, "converting"),
            ("c", 2, "passed its probe"),
            ("d", 0, "not probed yet"),
        ]

    def test_push_ends_with_classes_and_the_next_command(
        self, api: Api, shoal: Shoal, tmp_path: Path
    ) -> None:
        (tmp_path / "signs.py").write_text("")
        ingesting = version("ingesting", model="signs", optimization="o-0001")
        api.answer("POST", "/models/signs/versions", ingesting)
        api.answer("GET", "/optimizations/o-0001", optimization("done"))
        api.answer("GET", "/models/signs/versions/1", version(model="signs"))
        api.answer("GET", "/classes", [summary("a", 3)])
        api.answer("GET", "/variants", [self.variant("a")])
        api.answer("GET", "/endpoints", [])
        done = shoal("model", "push", str(tmp_path / "signs.py"), "--wait")
        assert done.code == 0, done.err
        assert done.out == "class\tdevices\tplain_variant\na\t3\tnot probed yet\n"
        assert "signs v1 is ready, accuracy 0.9920." in done.err
        assert "shoal endpoint create signs --model signs" in done.err

    def test_the_next_command(self) -> None:
        assert "token create --join" in pushed.next_command("m", 1, 0, [])
        endpoint = schemas.Endpoint(
            id="e", name="door", project="default", model="m", objective="", filter="", signature={},
            settings={}, assignment="", release="", version=1, choice={}, devices=1, created_ms=1,
        )  # fmt: skip
        assert pushed.next_command("m", 2, 1, [endpoint]) == "Roll it out: shoal rollout create door -w"
        assert "shoal-agent infer FILE" in pushed.next_command("m", 1, 1, [endpoint])
        other = endpoint.model_copy(update={"name": "other", "model": "o"})
        assert "shoal-agent infer --model door FILE" in pushed.next_command("m", 1, 1, [other, endpoint])
        moving = endpoint.model_copy(update={"rollout": "r-0001"})
        assert "Another version" in pushed.next_command("m", 2, 1, [moving])
        assert pushed.next_command("m", 2, 1, [moving], {"door"}).endswith("shoal rollout get r-0001 -w")
