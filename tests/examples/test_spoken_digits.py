"""The spoken digit example: on tiny subsets always, on everything among the slow tests."""

from __future__ import annotations

import io
import subprocess
import sys
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal_agent import sounds
from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import InvalidInput

DATA = "fsdd_8k.npz"


def module_of(task: Task) -> Any:
    return sys.modules[type(task).__module__]


@pytest.fixture
def quick(
    example: Callable[[str], Path], with_data: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> Task:
    with_data(DATA)
    monkeypatch.setenv("SHOAL_QUICK", "1")
    return load_task(example("spoken_digits.py"))


@pytest.mark.usefixtures("without_data")
def test_missing_recordings_are_refused_with_both_ways(example: Callable[[str], Path]) -> None:
    path = example("spoken_digits.py")
    with pytest.raises(InvalidInput, match=r"spoken_digits\.py --download.*SHOAL_DATA"):
        load_task(path).data("training")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--download" in done.stderr and "SHOAL_DATA" in done.stderr and "Traceback" not in done.stderr


def test_a_tiny_subset_trains_and_exports_the_same(quick: Task) -> None:
    assert {part: len(quick.required(part)) for part in ("training", "evaluation", "holdout")} == {
        "training": 240,
        "evaluation": 240,
        "holdout": 240,
    }
    value = evaluate_model(quick, quick.original).value
    assert value > 0.2  # a few steps: well over one of ten by chance
    assert quick.signature.sample_rate == 8000
    for runtime in ("onnxruntime", "openvino"):
        exported = targets.find(runtime).export(quick.original, quick)
        assert evaluate_exported(quick, exported).value == pytest.approx(value, abs=0.01)


def test_the_spectrogram_is_a_fourier_transform(quick: Task) -> None:
    module = module_of(quick)
    samples = torch.randint(-9000, 9000, (2, 8000), dtype=torch.int16)
    found = module.LogMel()(samples)
    assert found.shape == (2, 1, 32, 99)
    sound = samples.float() / 32768
    sound = sound / (sound.square().mean(1, keepdim=True).sqrt() + 1e-4)
    window = torch.hann_window(160)
    power = torch.stft(sound, 160, 80, window=window, center=False, return_complex=True).abs().square()
    wanted = 0.25 * torch.log(module.mel_bands().float() @ power + 1e-2)
    torch.testing.assert_close(found[:, 0], wanted, rtol=1e-3, atol=1e-3)


def test_every_band_hears_something_and_silence_is_a_number(quick: Task) -> None:
    module = module_of(quick)
    assert (module.mel_bands().sum(1) > 0).all()
    assert torch.isfinite(module.LogMel()(torch.zeros(1, 8000, dtype=torch.int16))).all()


def test_wav_files_are_what_evaluation_hears(quick: Task, tmp_path: Path) -> None:
    module = module_of(quick)
    module.write_sounds(tmp_path / "sounds")
    files = sorted(path.stem for path in (tmp_path / "sounds").iterdir())
    assert files == sorted(quick.labels)
    heard = sounds.decode(tmp_path / "sounds" / "seven.wav", quick.signature)
    assert heard.shape == (8000,) and heard.dtype == np.int16
    with wave.open(str(tmp_path / "sounds" / "seven.wav")) as recorded:
        samples = np.frombuffer(recorded.readframes(recorded.getnframes()), "<i2").astype(int)
    assert np.abs(heard[: len(samples)] - samples[:8000]).max() <= 1  # full scale is mapped, not copied
    assert np.abs(heard[len(samples) :]).max(initial=0) <= 1


def test_the_public_archive_is_packed_as_it_is_published(
    example: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    with zipfile.ZipFile(folder / "master.zip", "w") as archive:
        for digit, speaker, take in ((7, "theo", 0), (0, "george", 12), (7, "george", 0)):
            stream = io.BytesIO()
            with wave.open(stream, "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(8000)
                sound.writeframes(np.full(2000 + digit, 100 * digit, "<i2").tobytes())
            archive.writestr(
                f"free-spoken-digit-dataset-master/recordings/{digit}_{speaker}_{take}.wav", stream.getvalue()
            )
        archive.writestr("free-spoken-digit-dataset-master/README.md", "text")
    monkeypatch.setenv("SHOAL_DATA", str(folder))
    module = module_of(load_task(example("spoken_digits.py")))
    module.DATA.ensure(tmp_path, download=True)
    assert module.stored()["speakers"].tolist() == ["george", "theo"]
    samples, digits = module.split("holdout")
    assert digits.tolist() == [7, 7] and samples.shape == (2, 8000)
    assert samples[0, 2006] == 700 and samples[0, 2007] == 0
    assert module.split("training")[1].tolist() == [0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_spoken_digits_from_scratch(
    example: Callable[[str], Path], with_data: Callable[[str], None], local_class: ClassSpec
) -> None:
    with_data(DATA)
    task = load_task(example("spoken_digits.py"))
    assert evaluate_model(task, task.original, task.required("holdout")).value >= 0.95
    for runtime in ("onnxruntime", "openvino"):
        plain = targets.find(runtime).export(task.original, task, class_spec=local_class)
        assert evaluate_exported(task, plain).value >= 0.96
