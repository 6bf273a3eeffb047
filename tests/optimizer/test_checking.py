"""`shoal task check`: what is fine stays fine, and every mistake is named with its remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal_optimizer import checking
from shoal_optimizer.checking import CheckReport
from shoal_optimizer.declared import declared_files, imported_modules, local_modules
from shoal_protos.errors import InvalidInput

TASK = """
import numpy as np
import torch
from torch import nn
from shoal_optimizer import Task, TensorSpec

X = np.random.default_rng(0).normal(0, 1, (240, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def network():
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]))
        model[0].bias.zero_()
    return model


class Mine(Task):
    input = TensorSpec("row", "FP32", (-1, 4))
    output_kind = "logits"
    labels = ("low", "high")
    files = ()

    def model(self):
        return network()

    def training(self):
        return X[:160], Y[:160]

    def evaluation(self):
        return X[160:], Y[160:]
"""


Write = Callable[[str], Path]


def changed(write_task: Write, *changes: tuple[str, str], more: str = "") -> CheckReport:
    """The report of the task with texts replaced and methods added."""
    text = TASK
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return checking.check(write_task(text + more))


def found(report: CheckReport, name: str, state: str = "failed") -> str:
    """What one question found, with its remedy; the question must be in that state."""
    texts = [f"{i.found} {i.remedy}" for i in report.items if i.name == name and i.state == state]
    assert texts, report.items
    assert all(i.remedy for i in report.items if i.state in ("failed", "warning"))
    return " ".join(texts)


def test_a_good_task(write_task: Write) -> None:
    steps: list[str] = []
    report = checking.check(write_task(TASK), progress=steps.append)
    assert report.ok and {i.state for i in report.items} == {"ok"}, report.items
    names = [i.name for i in report.items]
    assert names == [
        "files", "imports", "declarations", "data", "targets", "preprocess", "model", "metric", "training",
        "export", "time",
    ]  # fmt: skip
    assert steps == ["files", "importing", "data", "model", "metric", "export"]
    facts = report.to_json()["facts"]
    assert facts["metric"]["value"] == 1.0 and facts["metric"]["constant"] < 0.8
    assert all(0 <= low < high for low, high in facts["minutes"].values())
    assert facts["export"]["parity_max"] < 1e-4


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no task file"):
        checking.check(tmp_path / "gone.py")


class TestFiles:
    def test_a_module_beside_the_task(self, write_task: Write, tmp_path: Path) -> None:
        (tmp_path / "helper.py").write_text("import deeper\nWIDTH = 4\n")
        (tmp_path / "deeper.py").write_text("")
        report = changed(write_task, ("import numpy as np", "import numpy as np\nimport helper"))
        text = found(report, "imports")
        assert 'Add "helper.py"' in text and 'Add "deeper.py"' in text and not report.ok

    def test_data_from_elsewhere(self, write_task: Write, tmp_path: Path) -> None:
        elsewhere = tmp_path / "far" / "x.npy"
        elsewhere.parent.mkdir()
        np.save(elsewhere, np.ones(3))
        old = elsewhere.stat().st_mtime - 100
        os.utime(elsewhere, (old, old))
        report = changed(write_task, ("return X[160:], Y", f"np.load({str(elsewhere)!r}); return X[160:], Y"))
        assert "x.npy, which would not travel" in found(report, "reads")

    def test_a_missing_data_file(self, write_task: Write) -> None:
        report = changed(write_task, ("files = ()", 'files = ("gone.npz",)'))
        assert "'gone.npz', which is missing" in found(report, "files")

    def test_files_must_be_plain(self, write_task: Write) -> None:
        report = changed(write_task, ("files = ()", "files = tuple('a')"))
        assert "plain list" in found(report, "files")

    def test_packages_that_workers_may_lack(self, write_task: Write) -> None:
        report = changed(write_task, ("import numpy as np", "import numpy as np\nimport sklearn"))
        assert report.ok and "sklearn" in found(report, "imports", "warning")
        report = changed(write_task, ("import numpy as np", "import numpy as np\nimport shoalfoo_none"))
        assert "not installed here" in found(report, "imports")
        assert "Importing" in found(report, "declarations") and found(report, "export", "skipped")


class TestData:
    def test_nan(self, write_task: Write) -> None:
        report = changed(write_task, ("Y = (X", "X[200, 1] = np.nan\nY = (X"))
        assert "NaN" in found(report, "data") and found(report, "model", "skipped")

    def test_range(self, write_task: Write) -> None:
        report = changed(write_task, ('"FP32", (-1, 4))', '"FP32", (-1, 4), "", 0, 1)'))
        assert "outside 'row' [0, 1]" in found(report, "data")
        report = changed(write_task, ('"FP32", (-1, 4))', '"FP32", (-1, 4), "", -500, 500)'))
        assert "scaling belongs into preprocess()" in found(report, "data", "warning")

    def test_targets_out_of_range(self, write_task: Write) -> None:
        report = changed(write_task, (".astype(np.int64)", ".astype(np.int64) * 2"))
        assert "Targets go from 0 to 2, there are 2 labels" in found(report, "targets")

    def test_a_class_that_never_appears(self, write_task: Write) -> None:
        report = changed(
            write_task,
            ('("low", "high")', '("low", "high", "odd")'),
            ("nn.Linear(4, 2)", "nn.Linear(4, 3)"),
            ("[1.0, 0, 0, 0]]", "[1.0, 0, 0, 0], [0, 0, 0, 0]]"),
        )
        text = found(report, "targets", "warning")
        assert "odd never appears in evaluation()" in text and "training()" in text and report.ok

    def test_one_class_only(self, write_task: Write) -> None:
        assert "Only 'low' is ever right" in found(
            changed(write_task, ("X[:, 0] > 0", "X[:, 0] > 99")), "targets"
        )

    def test_items_that_train_and_judge(self, write_task: Write) -> None:
        report = changed(write_task, ("X[:160], Y[:160]", "X, Y"))
        assert "80 of 80 items that judge" in found(report, "data", "warning")

    def test_endless_data_take_seconds(self, write_task: Write) -> None:
        more = """
    def calibration(self):
        while True:
            yield from zip(X, Y)
"""
        body = "def evaluation(self):\n        while 1:\n            yield from zip(X, Y)\n\n    def b(self):"
        report = changed(write_task, ("def evaluation(self):", body), more=more)
        assert "the first 512 judge" in found_text(report, "data")


def found_text(report: CheckReport, name: str) -> str:
    return " ".join(i.found for i in report.items if i.name == name)


class TestModel:
    def test_randomness(self, write_task: Write) -> None:
        noisy = "nn.Linear(4, 2), Noise()"
        layer = "class Noise(nn.Module):\n    def forward(self, x):\n        return nn.Dropout()(x)\n\n\n"
        report = changed(write_task, ("nn.Linear(4, 2)", noisy), ("def network", layer + "def network"))
        assert "training=self.training" in found(report, "model")

    def test_statistics_over_the_batch(self, write_task: Write) -> None:
        layer = "class Norm(nn.Module):\n    def forward(self, x):\n        return x - x.mean(0)\n\n\n"
        report = changed(
            write_task, ("nn.Linear(4, 2)", "nn.Linear(4, 2), Norm()"), ("def network", layer + "def network")
        )
        assert "depends on what else is in its batch" in found(report, "model")

    def test_nan_answers(self, write_task: Write) -> None:
        report = changed(write_task, ("model[0].bias.zero_()", "model[0].bias.fill_(float('nan'))"))
        assert "NaN" in found(report, "model") and found(report, "metric", "skipped")

    def test_logits_and_labels_differ(self, write_task: Write) -> None:
        report = changed(write_task, ('("low", "high")', '("low", "high", "odd")'))
        assert "2 logits, the task has 3 labels" in found(report, "model")

    def test_weights_of_another_network(self, write_task: Write) -> None:
        report = changed(
            write_task,
            (
                "return network()",
                "m = network(); m.load_state_dict(nn.Sequential(nn.Linear(5, 2)).state_dict()); return m",
            ),
        )
        text = found(report, "model")
        assert "weights are of another network" in text and "0.weight" in text

    def test_unscaled_inputs(self, write_task: Write) -> None:
        report = changed(write_task, ("Y = (X", "X *= 100\nY = (X"))
        assert "not scaled" in found(report, "preprocess", "warning")

    def test_preprocess_that_drops_items(self, write_task: Write) -> None:
        more = "\n    def preprocess(self):\n        return Half()\n"
        layer = "class Half(nn.Module):\n    def forward(self, x):\n        return x[::2]\n\n\n"
        report = changed(write_task, ("def network", layer + "def network"), more=more)
        assert "makes 8 items of 16" in found(report, "preprocess")


class TestMetric:
    def metric(self, write_task: Write, body: str) -> CheckReport:
        return changed(write_task, more=f"\n    def metric(self, outputs, targets):\n        return {body}\n")

    def test_lower_is_better(self, write_task: Write) -> None:
        report = self.metric(write_task, "(outputs.argmax(1) != targets).mean()")
        assert "lower for perfect answers" in found(report, "metric")

    def test_constant(self, write_task: Write) -> None:
        assert "whatever the answers are" in found(self.metric(write_task, "0.5"), "metric")

    def test_no_number(self, write_task: Write) -> None:
        assert "finite number" in found(self.metric(write_task, "None"), "metric")

    def test_no_better_than_one_answer(self, write_task: Write) -> None:
        report = changed(write_task, ("[-1.0, 0, 0, 0], [1.0, 0", "[1.0, 0, 0, 0], [-1.0, 0"))
        assert "no better than always" in found(report, "metric", "warning") and report.ok


class TestExport:
    def layer(self, write_task: Write, body: str) -> CheckReport:
        text = f"class Odd(nn.Module):\n    def forward(self, x):\n        {body}\n\n\n"
        return changed(
            write_task, ("nn.Linear(4, 2)", "nn.Linear(4, 2), Odd()"), ("def network", text + "def network")
        )

    def test_an_operation_without_a_form_names_the_layer(self, write_task: Write) -> None:
        text = found(self.layer(write_task, "return x + 0 * torch.special.bessel_j0(x)"), "export")
        assert "bessel_j0" in text and "1 (Odd)" in text

    def test_control_flow_names_the_line(self, write_task: Write) -> None:
        text = found(self.layer(write_task, "return x if x.sum() > -1e9 else -x"), "export")
        assert "written.py, line" in text and "x.sum()" in text and "torch.where" in text


class TestOnnxTask:
    def test_it_is_checked_too(self, tmp_path: Path) -> None:
        from tests.optimizer.test_scaffold import onnx_model

        path = onnx_model(tmp_path / "m.onnx", fixed=None)
        x = np.random.default_rng(0).normal(0, 1, (80, 4)).astype(np.float32)
        np.savez(tmp_path / "m.npz", inputs=x, targets=np.arange(80) % 2)
        report = checking.check(path)
        assert report.ok, report.items
        assert "no better than always" in found(report, "metric", "warning")

    def test_a_batch_of_one_stays(self, tmp_path: Path) -> None:
        from tests.optimizer.test_scaffold import onnx_model

        path = onnx_model(tmp_path / "m.onnx", fixed=1)
        x = np.random.default_rng(0).normal(0, 1, (80, 4)).astype(np.float32)
        np.savez(tmp_path / "m.npz", inputs=x, targets=np.arange(80) % 2)
        report = checking.check(path)
        assert report.ok, report.items
        assert "batches of one" in found(report, "export", "ok")

    def test_a_larger_fixed_batch(self, tmp_path: Path) -> None:
        from tests.optimizer.test_scaffold import onnx_model

        path = onnx_model(tmp_path / "m.onnx", fixed=8, reshape=True)
        np.savez(tmp_path / "m.npz", inputs=np.ones((9, 4), np.float32), targets=np.arange(9) % 2)
        assert "fixed batch of 8" in found(checking.check(path), "declarations")


def test_without_torch(write_task: Write) -> None:
    """Said with the install line, not with a traceback."""
    path = write_task(TASK)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from shoal_optimizer import checking\nfrom pathlib import Path\n"
        f"r = checking.check(Path({str(path)!r}))\n"
        "print([(i.name, i.found, i.remedy) for i in r.items if i.state == 'failed'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout and "pip install" in done.stdout


def test_what_a_file_says(tmp_path: Path) -> None:
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\n\ndef x():\n    import h\n"
    assert imported_modules(source, "t.py") == ["a", "c", "d", "h"]
    assert declared_files("class T:\n    files: tuple = ('a',)\n", "t.py") == ["a"]
    (tmp_path / "t.py").write_text("import pack, gone")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("import other")
    (tmp_path / "other.py").write_text("import t")
    assert {p.name for p in local_modules(tmp_path / "t.py")} == {"pack", "other.py"}
