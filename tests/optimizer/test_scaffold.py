"""`shoal task new`: every kind of source, what it decides, and what it refuses."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shoal_optimizer import scaffold
from shoal_optimizer.scaffolding import tables, write
from shoal_optimizer.scaffolding.found import stable_split
from shoal_optimizer.task import load_task
from shoal_protos.errors import Conflict, InvalidInput

RNG = np.random.default_rng(0)


def write_csv(path: Path, rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ruff(path: Path) -> None:
    """The written file passes the linter and is formatted, with ruff's defaults."""
    for arguments in (["check", "--select", "E,F,W,I,B,UP,RUF,N"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--isolated", str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def small_network(path: Path) -> None:
    """Makes the written task train for one epoch only."""
    import re

    path.write_text(re.sub(r"epochs: int = \d+", "epochs: int = 1", path.read_text()))


def state_rows(count: int = 300) -> list[list[Any]]:
    rows: list[list[Any]] = [["id", "temp", "load", "site", "fixed", "note", "state"]]
    rng = np.random.default_rng(1)
    for i in range(count):
        temp, load = rng.normal(60, 10), rng.random()
        site = ["north", "south", "?"][i % 3]
        state = "hot" if temp + 20 * load > 70 else "ok"
        rows.append([i, "" if i % 17 == 0 else f"{temp:.2f}", f"{load:.3f}", site, 5, f"note {i}", state])
    return rows


class TestTables:
    def test_a_table_with_everything_wrong(self, tmp_path: Path) -> None:
        made = scaffold.new(write_csv(tmp_path / "state.csv", state_rows()))
        said = " ".join(made.decided)
        assert "'id' is left out: it numbers the rows" in said
        assert "'fixed' is left out: it is always 5" in said
        assert "'note' is left out: 300 different texts" in said
        assert "'site' is sent as a number: 0 north, 1 south" in said
        assert dict(made.facts)["missing"] == "temp 18, site 100"
        ruff(made.task)
        small_network(made.task)
        task = load_task(made.task)
        assert task.input.shape == (-1, 3) and tuple(task.labels) == ("hot", "ok")
        raw = np.array([[np.nan, 0.5, 0.0], [60.0, np.nan, -1.0]], np.float32)
        filled = raw.copy()
        module = sys.modules[type(task).__module__]
        filled[np.isnan(raw)] = [module.FILL[0], module.FILL[1]]
        # Applications send NaN; evaluation data were filled before: both give the same.
        np.testing.assert_array_equal(task.pre(torch.from_numpy(raw)), task.pre(torch.from_numpy(filled)))
        assert task.pre(torch.from_numpy(raw))[:, 2:].tolist() == [[1.0, 0.0], [0.0, 0.0]]
        assert not np.isnan(task.required("evaluation").inputs).any()

    def test_rows_that_ask_the_same_are_on_one_side(self, tmp_path: Path) -> None:
        rows = [[["mon", "tue"][i % 2], "" if i % 5 == 0 else f"{i % 30}.5", f"{i}.25"] for i in range(300)]
        task = load_task(scaffold.new(write_csv(tmp_path / "s.csv", [["day", "area", "price"], *rows])).task)
        train, judge = (
            {row.tobytes() for row in np.asarray(data.inputs)}
            for data in (task.required("training"), task.required("evaluation"))
        )
        assert train and judge and not train & judge

    def test_quantities(self, tmp_path: Path) -> None:
        values = RNG.normal(0, 1, (200, 2))
        rows = [["a", "b", "price"], *[[f"{a:.4f}", f"{b:.4f}", f"{5000 + 300 * a:.2f}"] for a, b in values]]
        made = scaffold.new(write_csv(tmp_path / "p.csv", rows))
        ruff(made.task)
        task = load_task(made.task)
        assert task.output_kind == "values" and task.signature.outputs[0].shape == (-1, 1)
        data = task.required("evaluation")
        assert task.measured(task.predict(task.original, data.inputs), data.targets) > 0.8

    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_delimiters_and_decimal_commas(self, tmp_path: Path, delimiter: str) -> None:
        mark = "," if delimiter != "," else "."
        lines = [delimiter.join(("a", "b", "class"))]
        lines += [delimiter.join((f"{i}{mark}5", str(i * i % 7), "xy"[i % 2])) for i in range(30)]
        (tmp_path / "t.csv").write_text("\ufeff" + "\n".join(lines))
        found = tables.read(tmp_path / "t.csv")
        assert found.table is not None and found.table.columns == ("a", "b")
        assert found.inputs[3].tolist() == [3.5, 2.0]

    def test_refusals(self, tmp_path: Path) -> None:
        def refused(text: str, match: str, **options: Any) -> None:
            (tmp_path / "t.csv").write_text(text)
            with pytest.raises(InvalidInput, match=match) as error:
                tables.read(tmp_path / "t.csv", **options)
            assert error.value.remedy or "left out" in error.value.message

        refused("", "empty")
        refused("a\n1\n2\n", "one column")
        refused("a,b\n1,2\n3\n", "line 3: 1 values")
        refused("a,b\n1,x\n2,x\n3,x\n", "one class")
        refused("a,b\n1,x\n2,y\n", "no column 'c'", target="c")
        refused("a,a\n1,x\n2,y\n", "'a' twice")
        refused("a,b\nq,x\nq,y\nq,x\n", "No column is left")
        refused("a,b\n1,x\n2,y\n3,z\n", "holds texts", output_kind="values")
        refused("a,b\n1,\n2,\n", "No row has")

    def test_texts_among_numbers_count_as_missing(self, tmp_path: Path) -> None:
        rows: list[list[Any]] = [
            ["a", "b", "class"],
            *[[i * i % 11, "broken" if i == 7 else i % 5, "xy"[i % 2]] for i in range(60)],
        ]
        found = tables.read(write_csv(tmp_path / "t.csv", rows))
        assert any("'b' holds texts among its numbers, e.g. 'broken'" in w for w in found.warnings)
        assert int(np.isnan(found.inputs).sum()) == 1

    @given(st.lists(st.lists(st.text(max_size=6), min_size=1, max_size=4), max_size=12))
    @settings(max_examples=80, deadline=None)
    def test_any_text_is_read_or_refused(self, rows: list[list[str]]) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as room:
            path = Path(room) / "t.csv"
            path.write_text("\n".join(",".join(row) for row in rows), encoding="utf-8", errors="replace")
            try:
                found = tables.read(path)
            except InvalidInput:
                return
            assert len(found.inputs) == len(found.targets) == len(found.evaluation)


def pictures(folder: Path, names: list[str], count: int = 12, sizes: tuple[int, int] = (20, 28)) -> None:
    from PIL import Image

    rng = np.random.default_rng(2)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            side = int(rng.integers(*sizes))
            pixels = np.full((side, side, 3), 60 * number + 30, np.uint8)
            pixels += rng.integers(0, 20, pixels.shape, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


class TestPictures:
    def test_a_folder(self, tmp_path: Path) -> None:
        pictures(tmp_path / "signs", ["stop", "yield", "go"])
        (tmp_path / "signs" / "stop" / "broken.jpg").write_bytes(b"\xff\xd8no picture")
        (tmp_path / "signs" / "notes").mkdir()
        (tmp_path / "signs" / "go" / "readme.txt").write_text("hello")
        made = scaffold.new(tmp_path / "signs")
        said = " ".join(made.warnings)
        assert "1 picture cannot be read, left out: stop/broken.jpg" in said
        assert "No picture is in notes" in said and "1 file without a picture, left out" in said
        ruff(made.task)
        small_network(made.task)
        task = load_task(made.task)
        assert tuple(task.labels) == ("go", "stop", "yield") and task.color == "rgb"
        assert task.input.shape[1:] == (24, 24, 3)
        assert task.signature.outputs[0].shape == (-1, 3)

    def test_what_judges_is_what_a_client_sends(self, tmp_path: Path) -> None:
        """Packed pictures are bit-equal to what `shoal_agent.imaging` makes of the files."""
        from shoal_agent import imaging

        pictures(tmp_path / "p", ["a", "b"])
        made = scaffold.new(tmp_path / "p")
        small_network(made.task)
        task = load_task(made.task)
        rows = {row.tobytes() for split in ("training", "evaluation") for row in task.required(split).inputs}
        for path in (tmp_path / "p").rglob("*.png"):
            assert imaging.decode(path, task.signature).tobytes() in rows

    def test_folders_for_splits(self, tmp_path: Path) -> None:
        pictures(tmp_path / "p" / "train", ["a", "b"], 10)
        pictures(tmp_path / "p" / "val", ["a"], 4)
        made = scaffold.new(tmp_path / "p")
        assert dict(made.facts)["items"] == "24: 20 train, 4 judge"
        assert any("b never appears in the evaluation data" in w for w in made.warnings)

    def test_gray_small_pictures_keep_their_size(self, tmp_path: Path) -> None:
        from PIL import Image

        for name, value in (("dark", 20), ("light", 200)):
            (tmp_path / "p" / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (16, 12), value + i).save(tmp_path / "p" / name / f"{i}.png")
        made = scaffold.new(tmp_path / "p")
        assert "16x12 pixels, gray" in made.decided[0]

    def test_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(InvalidInput, match="holds no folder with pictures"):
            scaffold.new(tmp_path / "empty")
        pictures(tmp_path / "one", ["only"])
        with pytest.raises(InvalidInput, match="one class, 'only'"):
            scaffold.new(tmp_path / "one")
        for name in ("a", "b"):
            (tmp_path / "bad" / name).mkdir(parents=True)
            (tmp_path / "bad" / name / "x.jpg").write_bytes(b"nothing")
        with pytest.raises(InvalidInput, match="None of the 2 pictures can be read"):
            scaffold.new(tmp_path / "bad")
        assert not list(tmp_path.glob("*.py"))  # nothing is half-written


class TestArrays:
    def test_series_with_names(self, tmp_path: Path) -> None:
        x = RNG.integers(-900, 900, (60, 600)).astype(np.int16)
        np.savez(tmp_path / "hum.npz", x=x, y=np.arange(60) % 3, classes=np.array(["a", "b", "c"]), rate=8000)
        made = scaffold.new(tmp_path / "hum.npz")
        ruff(made.task)
        small_network(made.task)
        task = load_task(made.task)
        assert task.input_kind == "series" and task.sample_rate == 8000 and task.input.datatype == "INT16"
        assert task.signature.outputs[0].shape == (-1, 3)

    def test_splits_by_name(self, tmp_path: Path) -> None:
        arrays = {
            "x_train": RNG.integers(0, 255, (40, 3, 9, 9), np.uint8), "y_train": np.arange(40) % 2,
            "x_test": RNG.integers(0, 255, (10, 3, 9, 9), np.uint8), "y_test": np.arange(10) % 2,
        }  # fmt: skip
        np.savez(tmp_path / "p.npz", **arrays)  # type: ignore[arg-type]
        made = scaffold.new(tmp_path / "p.npz")
        assert dict(made.facts)["items"] == "50: 40 train, 10 judge"
        assert any("Channels are moved last" in sentence for sentence in made.decided)
        ruff(made.task)

    def test_refusals(self, tmp_path: Path) -> None:
        def refused(match: str, **arrays: Any) -> None:
            np.savez(tmp_path / "d.npz", **arrays)
            with pytest.raises(InvalidInput, match=match):
                scaffold.new(tmp_path / "d.npz")

        x = RNG.normal(0, 1, (20, 4)).astype(np.float32)
        y = np.arange(20) % 2
        refused("Name them inputs and targets", a=x)
        refused(r"'inputs' has \[20, 4\] and 'targets' \[5\]", inputs=x, targets=y[:5])
        refused("4 class names|there are 2 class names", inputs=x, targets=y + 1, labels=np.array(["a", "b"]))
        refused("one class", inputs=x, targets=y * 0)
        broken = x.copy()
        broken[3, 1] = np.nan
        refused(r"1 of 20 inputs hold NaN or infinity \(items 3\)", inputs=broken, targets=y)
        refused("below 0", inputs=x, targets=y - 1)
        (tmp_path / "d.npz").write_bytes(b"no zip")
        with pytest.raises(InvalidInput, match="cannot be read as an"):
            scaffold.new(tmp_path / "d.npz")


# ---------------------------------------------------------------------------- own models

NET = """
import torch
from torch import nn

def make(classes=2, width=16):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes))

def wide():
    return make(width=32)

def needs(size):
    return nn.Linear(size, 2)

def nothing():
    return "no module"
"""


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Items whose class depends on their raw size, so only the right scaling answers well."""
    x = RNG.normal(50, 20, (300, 4)).astype(np.float32)
    np.savez(tmp_path / "d.npz", inputs=x, targets=(x[:, 0] > 50).astype(np.int64))
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "d.npz"


def trained_weights(path: Path, **wrapping: str) -> Path:
    """Weights of `net.make()` that are right for inputs scaled to mean 0, spread 1."""
    first, last = nn.Linear(4, 16), nn.Linear(16, 2)
    model = nn.Sequential(first, nn.ReLU(), last)
    with torch.no_grad():
        for part in model.parameters():
            part.zero_()
        first.weight[0, 0] = 1.0
        first.weight[1, 0] = -1.0
        last.weight[1, 0] = 1.0
        last.weight[0, 1] = 1.0
    state = {wrapping.get("prefix", "") + k: v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if "wrapper" in wrapping else state, path)
    return path


class TestOwnModel:
    @pytest.mark.parametrize("wrapping", [{}, {"prefix": "module.", "wrapper": "state_dict"}])
    def test_weights_and_scaling_are_found(
        self, arrays: Path, tmp_path: Path, wrapping: dict[str, str]
    ) -> None:
        weights = trained_weights(tmp_path / "w.pt", **wrapping)
        made = scaffold.new(arrays, model="net.py:make", weights=weights, out=tmp_path / "mine.py")
        assert made.files == ("mine-data.npz", "net.py", "w.pt") and not made.trains
        assert any("It is fed the data's own mean and spread" in s for s in made.decided)
        ruff(made.task)
        task = load_task(made.task)
        data = task.required("evaluation")
        assert task.measured(task.predict(task.original, data.inputs), data.targets) > 0.95

    def test_what_lies_elsewhere_is_copied(self, arrays: Path, tmp_path: Path) -> None:
        out = tmp_path / "out" / "mine.py"
        made = scaffold.new(arrays, model="net.py:make", weights=trained_weights(tmp_path / "w.pt"), out=out)
        assert {p.name for p in out.parent.iterdir() if p.is_file()} == {"mine.py", *made.files}

    def test_an_untrained_one_is_noticed(self, arrays: Path) -> None:
        torch.manual_seed(3)
        made = scaffold.new(arrays, model="net.py:wide", out=Path("mine.py"))
        assert made.warnings == () or "no better than chance" in made.warnings[0]

    @pytest.mark.parametrize(
        ("model", "match"),
        [
            ("net.py:wide", r"another network: .*0.weight is \[16, 4\], the network's is \[32, 4\]"),
            ("net.py:needs", "wants size"),
            ("net.py:nothing", "gives str"),
            ("net.py:gone", "has no 'gone'"),
            ("gone.py:make", "no file 'gone.py'"),
            ("net.py", "names no function"),
            ("shoal_no_such:make", "Importing shoal_no_such raised"),
        ],
    )
    def test_refusals(self, arrays: Path, tmp_path: Path, model: str, match: str) -> None:
        weights = trained_weights(tmp_path / "w.pt")
        with pytest.raises(InvalidInput, match=match) as refused:
            scaffold.new(arrays, model=model, weights=weights, out=tmp_path / "mine.py")
        assert refused.value.remedy
        assert not (tmp_path / "mine.py").exists()

    def test_weights_that_hold_code_are_refused(self, arrays: Path, tmp_path: Path) -> None:
        torch.save(nn.Linear(4, 2), tmp_path / "whole.pt")
        with pytest.raises(InvalidInput, match="plain weights") as refused:
            scaffold.new(arrays, model="net.py:make", weights=tmp_path / "whole.pt", out=tmp_path / "m.py")
        assert "model.state_dict()" in refused.value.remedy


# ---------------------------------------------------------------------------- ONNX


def onnx_model(path: Path, *, fixed: int | None, reshape: bool = False) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    batch: Any = fixed if fixed else "n"
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y0" if reshape else "y"])]
    constants = [numpy_helper.from_array(np.ones((4, 2), np.float32), "w")]
    if reshape:
        nodes.append(helper.make_node("Reshape", ["y0", "s"], ["y"]))
        constants.append(numpy_helper.from_array(np.array([fixed or 1, 2], np.int64), "s"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, str(path))
    return path


class TestOnnx:
    def test_a_fixed_batch_is_freed(self, tmp_path: Path) -> None:
        source = onnx_model(tmp_path / "m.onnx", fixed=1)
        np.savez(tmp_path / "d.npz", inputs=np.ones((20, 4), np.float32), targets=np.arange(20) % 2)
        made = scaffold.new(source, data=tmp_path / "d.npz", out=tmp_path / "mine.onnx")
        assert any("batch was fixed to 1" in s for s in made.decided)
        assert load_task(made.task).signature.inputs[0].shape == (-1, 4)

    def test_one_that_insists_is_refused(self, tmp_path: Path) -> None:
        source = onnx_model(tmp_path / "m.onnx", fixed=4, reshape=True)
        np.savez(tmp_path / "m.npz", inputs=np.ones((20, 4), np.float32), targets=np.arange(20) % 2)
        with pytest.raises(InvalidInput, match="insist") as refused:
            scaffold.new(source, out=tmp_path / "mine.onnx")
        assert "Export it again" in refused.value.remedy

    def test_one_that_insists_on_single_items_keeps_them(self, tmp_path: Path) -> None:
        source = onnx_model(tmp_path / "m.onnx", fixed=1, reshape=True)
        np.savez(tmp_path / "m.npz", inputs=np.ones((20, 4), np.float32), targets=np.arange(20) % 2)
        made = scaffold.new(source, out=tmp_path / "mine.onnx")
        assert any("batch stays 1" in s for s in made.decided)
        assert load_task(made.task).signature.inputs[0].shape == (1, 4)

    def test_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="no data to judge"):
            scaffold.new(onnx_model(tmp_path / "m.onnx", fixed=None), out=tmp_path / "n.onnx")


def test_nothing_is_replaced_unasked(arrays: Path) -> None:
    scaffold.new(arrays)
    with pytest.raises(Conflict, match="exists") as refused:
        scaffold.new(arrays)
    assert "--force" in refused.value.remedy
    scaffold.new(arrays, force=True)


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nothing at"):
        scaffold.new(tmp_path / "gone")
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(InvalidInput, match="no source of a task"):
        scaffold.new(tmp_path / "a.pdf")


@given(st.text(max_size=20))
def test_names_are_safe(name: str) -> None:
    found = scaffold.safe_name(name)
    assert found.isidentifier() and write.class_name(found).isidentifier()


def test_splits_are_stable() -> None:
    keys = [f"item {i}" for i in range(100)]
    classes = np.arange(100) % 4
    first = stable_split(keys, classes)
    assert all(first[classes == c].sum() == 5 for c in range(4))
    again = stable_split(keys[::-1], classes[::-1])[::-1]
    np.testing.assert_array_equal(first, again)
