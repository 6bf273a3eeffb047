from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent import processor, profile
from shoal_agent.profile import class_of
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import profile_pb2


def cpuinfo(*cores: str, key: str = "flags") -> str:
    return "\n\n".join(
        f"processor\t: {n}\nmodel name\t: Test CPU\n{key}\t\t: {c}" for n, c in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (cpuinfo("fpu avx2 avx512f avx512_vnni"), ["avx2", "avx512_vnni", "avx512f"]),
        (cpuinfo("avx2 avx_vnni amx_int8 amx_tile"), ["amx_int8", "amx_tile", "avx2", "avx_vnni"]),
        (cpuinfo("fp asimd asimddp i8mm sve", key="Features"), ["dotprod", "i8mm", "neon", "sve"]),
        (cpuinfo("asimd asimddp", "asimd", key="Features"), ["neon"]),  # only what every core has
        ("", []),
    ],
)
def test_isa_features(text: str, features: list[str]) -> None:
    assert processor.isa_features(text) == features


def auxiliary(**values: int) -> bytes:
    kinds = {"hwcap": 16, "hwcap2": 26, "pagesz": 6}
    entries = [(kinds[name], value) for name, value in values.items()]
    return b"".join(struct.pack("<QQ", *entry) for entry in [*entries, (0, 0)])


@pytest.mark.parametrize(
    ("vector", "features"),
    [
        (auxiliary(pagesz=4096, hwcap=0x887), ["neon"]),  # Raspberry Pi 4
        (auxiliary(hwcap=0x100FFF), ["dotprod", "neon"]),  # Raspberry Pi 5
        (auxiliary(hwcap=0xECFFFFFB, hwcap2=0x7F877FFF), ["dotprod", "i8mm", "neon", "sve", "sve2"]),
        (auxiliary(hwcap=0x100FFF)[:21], ["dotprod", "neon"]),  # cut off
        (b"", []),
    ],
)
def test_features_from_the_auxiliary_vector(vector: bytes, features: list[str], tmp_path: Path) -> None:
    put(tmp_path, "proc/cpuinfo", cpuinfo("avx2 avx512f"))  # the machine below an emulator
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/auxv").write_bytes(vector)
    assert processor.features("aarch64", tmp_path) == features


@given(st.binary())
def test_any_auxiliary_vector_is_read(vector: bytes) -> None:
    assert set(processor.auxiliary_features(vector)) <= {"neon", "dotprod", "i8mm", "sve", "sve2"}


def test_a_32_bit_system_on_a_64_bit_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert processor.architecture() == "aarch64"
    monkeypatch.setattr("struct.calcsize", lambda _: 4)
    assert processor.architecture() == "armv7l"


def test_an_emulated_machine_has_nothing_of_the_machine_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    put(tmp_path, "proc/cpuinfo", "vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t: avx2\n")
    put(tmp_path, "proc/device-tree/model", "Raspberry Pi 5\0")
    put(tmp_path, "sys/class/drm/card0/device/vendor", "0x8086\n")
    measured = profile.measure(["onnxruntime"], tmp_path)
    assert measured.emulated and measured.cpu_model == "emulated on EPYC"
    assert not measured.hardware_part and not measured.accelerators and not measured.isa_features
    put(tmp_path, "proc/cpuinfo", "CPU implementer\t: 0x41\nFeatures\t: fp asimd asimddp\n")
    measured = profile.measure(["onnxruntime"], tmp_path)
    assert not measured.emulated and measured.hardware_part == "Raspberry Pi 5"
    assert list(measured.isa_features) == ["dotprod", "neon"]


def make(architecture: str, *isa: str, cores: int = 2, runtimes: tuple[str, ...] = (), gpu: str = "") -> str:
    value = profile_pb2.Profile(
        architecture=architecture,
        isa_features=isa,
        cores=cores,
        runtimes=[profile_pb2.Runtime(name=name, version="1") for name in runtimes],
    )
    if gpu:
        value.accelerators.add(vendor=gpu, kind="gpu", name="marketing name")
    return class_of(value)


def test_classes() -> None:
    isa = ("avx2", "avx512f", "avx512vl", "avx512bw", "avx512_vnni")
    both = ("openvino", "onnxruntime")
    assert make("x86_64", *isa, runtimes=both) == "x86_64.avx512vnni.2c+onnxruntime+openvino"
    assert make("x86_64", *isa, "amx_tile", "amx_int8", cores=8) == "x86_64.amx.8c"
    assert make("x86_64", "avx2", "avx_vnni") == "x86_64.avxvnni.2c"
    assert make("x86_64", "avx2") == "x86_64.avx2.2c"
    assert make("x86_64") == "x86_64.base.2c"
    assert make("aarch64", "neon", "dotprod", cores=4, gpu="nvidia") == "aarch64.dotprod.4c.nvidia-gpu"
    assert make("aarch64", "neon", "dotprod", "i8mm", "sve") == "aarch64.i8mm.2c"
    assert make("riscv64", cores=0) == "riscv64.base.1c"


def test_class_ignores_versions_memory_and_names() -> None:
    one = profile_pb2.Profile(architecture="x86_64", cores=2, memory_bytes=1, cpu_model="a", os="x")
    two = profile_pb2.Profile(architecture="x86_64", cores=2, memory_bytes=2, cpu_model="b", os="y")
    one.runtimes.add(name="onnxruntime", version="1.20")
    two.runtimes.add(name="onnxruntime", version="1.32")
    assert class_of(one) == class_of(two)


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_limits_of_the_control_group(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal:       8000000 kB\n")
    put(tmp_path, "proc/self/cgroup", "0::/box/inner\n")
    assert profile.usable_memory(tmp_path) == 8_000_000 * 1024
    put(tmp_path, "sys/fs/cgroup/box/memory.max", "1000000\n")
    put(tmp_path, "sys/fs/cgroup/box/inner/memory.max", "max\n")
    assert profile.usable_memory(tmp_path) == 1_000_000
    put(tmp_path, "sys/fs/cgroup/box/cpu.max", "100000 100000\n")
    assert profile.usable_cores(tmp_path) == 1


def test_limits_of_the_older_control_groups(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "4:memory:/m\n1:cpu,cpuacct:/c\n0::/\n")
    put(tmp_path, "sys/fs/cgroup/memory/m/memory.limit_in_bytes", "5000\n")
    put(tmp_path, "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us", "50000\n")
    put(tmp_path, "sys/fs/cgroup/cpu/c/cpu.cfs_period_us", "100000\n")
    assert profile.usable_memory(tmp_path) == 5000
    assert profile.usable_cores(tmp_path) == 1


def test_accelerators_by_the_drivers_files(tmp_path: Path) -> None:
    assert profile.accelerators(tmp_path) == []
    put(
        tmp_path, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  x"
    )
    put(tmp_path, "proc/driver/nvidia/gpus/0000/information", "Model: \t\t Orin\nIRQ: 1\n")
    put(tmp_path, "sys/class/drm/card0/device/vendor", "0x8086\n")
    put(tmp_path, "sys/class/drm/card1/device/vendor", "0x1002\n")
    put(tmp_path, "sys/class/accel/accel0/device/vendor", "0x8086\n")
    found = [(item.vendor, item.kind, item.driver_version) for item in profile.accelerators(tmp_path)]
    assert found == [("nvidia", "gpu", "550.54.14"), ("intel", "gpu", ""), ("intel", "npu", "")]


def test_emulation_shows_in_cpuinfo() -> None:
    assert processor.is_emulated("aarch64", "vendor_id\t: GenuineIntel\n")
    assert processor.is_emulated("x86_64", "model name\t: QEMU TCG CPU version 2.5+\n")
    assert not processor.is_emulated("x86_64", "vendor_id\t: GenuineIntel\nmodel name\t: Test\n")


def test_this_machine(tmp_path: Path) -> None:
    measured = profile.measure(["onnxruntime"])
    assert measured.architecture and measured.cores >= 1 and measured.memory_bytes > 0 and measured.os
    assert [item.name for item in measured.runtimes] == ["onnxruntime"]
    assert "CPUExecutionProvider" in measured.runtimes[0].providers
    assert class_of(measured).endswith("+onnxruntime")


def test_unknown_runtime_says_what_to_install() -> None:
    with pytest.raises(InvalidInput, match=r"pip install 'shoal\[tensorflow\]'"):
        profile.measure(["tensorflow"])


def test_cache_holds_for_boot_and_versions_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ask(names: Iterable[str], prefix: str | None) -> dict[str, list[str]]:
        asked.append(1)
        return {name: [] for name in names}

    monkeypatch.setattr(profile, "_ask_providers", ask)
    cache = tmp_path / "profile.json"
    first = profile.measure_cached(cache)
    assert profile.measure_cached(cache) == first and len(asked) == 1
    monkeypatch.setattr(profile, "boot_id", lambda: "another boot")
    profile.measure_cached(cache)
    assert len(asked) == 2
    cache.write_text("damaged")
    assert profile.measure_cached(cache).architecture == first.architecture
    assert json.loads(cache.read_text())["key"]


def test_runtime_that_cannot_be_imported_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.devnull)
    monkeypatch.setitem(profile._RUNTIMES, "onnxruntime", (("onnxruntime",), "__import__('no_such_module')"))  # type: ignore[index]
    assert profile.installed_runtimes(["onnxruntime"]) == []
