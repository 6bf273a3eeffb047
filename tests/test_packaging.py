"""What the distribution promises about its extras and its imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP_DRY_RUN = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
WEB_STACK = {"fastapi", "starlette", "sqlalchemy", "alembic", "jinja2", "pydantic", "httpx"}


@pytest.mark.slow
def test_an_agent_brings_neither_torch_nor_the_web_stack(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    subprocess.run(
        [*PIP_DRY_RUN, f"--report={report}", f"{ROOT}[agent,onnxruntime]"],
        check=True,
        timeout=170,
    )
    names = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert {"shoal", "grpcio", "onnxruntime", "numpy"} <= names
    assert "torch" not in names
    assert not names & WEB_STACK


def blocked(modules: list[str], statement: str) -> subprocess.CompletedProcess[str]:
    """Runs a statement in a fresh interpreter in which the modules cannot be imported."""
    code = f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n{statement}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("modules", "statement"),
    [
        (
            ["torch", "fastapi", "sqlalchemy", "onnx", "pydantic"],
            "import shoal_agent.supervisor, shoal_agent.cli",
        ),
        (["numpy", "uvicorn", "onnxruntime", "openvino"], "import shoal_agent.supervisor, shoal_agent.cli"),
        (["torch", "onnx", "openvino"], "import shoal_agent.serving.main"),
        (["torch", "onnxruntime", "openvino"], "import shoal_controller.app, shoal_controller.api"),
        (["torch", "fastapi", "sqlalchemy"], "import shoal_controller.cli.main"),
        (["torch"], "import shoal_optimizer, shoal_optimizer.objective, shoal_optimizer.jobspec"),
    ],
)
def test_rooms_import_without_what_they_must_not_need(modules: list[str], statement: str) -> None:
    done = blocked(modules, statement)
    assert done.returncode == 0, done.stderr


def test_no_committed_file_names_a_package_index_or_a_path_of_this_machine() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    pattern = re.compile(
        "|".join(["py" + r"pi\.org", "python" + r"hosted\.org", "registry.npm" + r"js", str(ROOT)])
    )
    offenders = []
    for name in filter(None, tracked.decode().split("\0")):
        path = ROOT / name
        if "/vendor/" in name or not path.is_file() or path.stat().st_size > 2_000_000:
            continue
        if pattern.search(path.read_text(encoding="utf-8", errors="ignore")):
            offenders.append(name)
    assert not offenders


def test_the_lock_has_no_local_versions_and_no_addresses() -> None:
    for line in (ROOT / "requirements" / "lock.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.]+", line), line
