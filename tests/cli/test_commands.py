"""Each command against an API: forms of output, changes that ask, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal_controller.api import schemas
from shoal_controller.cli import catalogue, output
from tests.cli.conftest import Api, Shoal, device, optimization, problem, rollout, version


def devices(*items: schemas.Device) -> schemas.Page[schemas.Device]:
    return schemas.Page[schemas.Device](items=list(items), total=len(items))


class TestForms:
    def test_piped_lists_are_tab_separated_with_names(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/devices", devices(device(), device("hall", status="offline", p95_ms=None)))
        lines = shoal("device", "list").out.splitlines()
        assert lines[0].split("\t")[:4] == ["name", "id", "status", "profile_class"]
        assert lines[1].split("\t")[0] == "kitchen"
        assert lines[2].split("\t")[2] == "offline"
        assert "2027-01-15T08:00:00Z" in lines[1]

    def test_json_is_the_api_object(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/devices", devices(device()))
        page = json.loads(shoal("device", "list", "--json").out)
        assert page == devices(device()).model_dump(mode="json")
        schemas.Page[schemas.Device].model_validate(page)

    def test_json_keeps_fields_of_a_newer_controller(self, api: Api, shoal: Shoal) -> None:
        newer = {**rollout().model_dump(mode="json"), "mood": "calm"}
        newer["waves"][0]["colour"] = "blue"
        api.answer("GET", "/rollouts/r-0002", newer)
        answer = json.loads(shoal("rollout", "get", "r-0002", "--json").out)
        assert answer["mood"] == "calm"
        assert answer["waves"][0]["colour"] == "blue"

    def test_names_only(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/devices", devices(device(), device("hall")))
        assert shoal("device", "list", "-o", "name").out == "kitchen\nhall\n"

    def test_columns(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/devices", devices(device()))
        assert shoal("device", "list", "--columns", "name,p95_ms").out == "name\tp95_ms\nkitchen\t0.41\n"
        wrong = shoal("device", "list", "--columns", "nome")
        assert wrong.code == 2
        assert "Columns: name" in wrong.err

    def test_filter_goes_to_the_controller(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/devices", devices())
        shoal("device", "list", "-l", "status:degraded class:aarch64*")
        assert api.calls[-1].query["filter"] == "status:degraded class:aarch64*"

    def test_big_fleets_are_fetched_page_by_page(self, api: Api, shoal: Shoal) -> None:
        everything = [device(f"n{i}") for i in range(2500)]

        def window(call: object) -> schemas.Page[schemas.Device]:
            start = int(call.query["offset"])  # type: ignore[attr-defined]
            return schemas.Page[schemas.Device](
                items=everything[start : start + 1000], total=2500, offset=start
            )

        api.answer("GET", "/devices", window)
        assert len(shoal("device", "list", "-o", "name").out.splitlines()) == 2500

    def test_table_of_a_terminal(self, api: Api, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "120")
        api.answer("GET", "/devices", devices(device()))
        out = shoal("device", "list", "-o", "table").out
        assert "kitchen" in out
        assert "0.41 ms" in out
        assert "\t" not in out

    def test_values_stay_on_their_line(self) -> None:
        column = output.Column("note", lambda item: item)
        assert output.plain(column, "a\tb\nc") == "a b c"


class TestWatching:
    def test_a_rollout_that_ends_well(self, api: Api, shoal: Shoal) -> None:
        states = iter([rollout(), rollout(), rollout("promoted", sentence="Done.")])
        api.answer("GET", "/rollouts/r-0002", lambda _call: next(states))
        done = shoal("rollout", "get", "r-0002", "-w")
        assert done.code == 0
        lines = done.out.splitlines()
        assert len(lines) == 2  # a line a change, not a line a look
        assert lines[-1].startswith("r-0002 promoted")

    def test_a_rollout_that_was_stopped(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/rollouts/r-0002", rollout("rolled_back"))
        assert shoal("rollout", "get", "r-0002", "-w").code == 5

    def test_json_is_one_object_a_line(self, api: Api, shoal: Shoal) -> None:
        states = iter([rollout(), rollout("promoted")])
        api.answer("GET", "/rollouts/r-0002", lambda _call: next(states))
        lines = shoal("rollout", "get", "r-0002", "-w", "--json").out.splitlines()
        assert [json.loads(line)["state"] for line in lines] == ["running", "promoted"]

    def test_timeout(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/optimizations/o-0003", optimization())
        done = shoal("optimization", "get", "o-0003", "-w", "--timeout", "10ms")
        assert done.code == 6
        assert "still going" in done.err

    def test_a_failed_optimization(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/optimizations/o-0003", optimization("failed", error="No memory."))
        assert shoal("optimization", "get", "o-0003", "-w").code == 1


class TestTrees:
    def test_rollout(self, api: Api, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "100")
        api.answer("GET", "/rollouts/r-0002", rollout())
        out = shoal("rollout", "get", "r-0002", "-o", "table").out
        assert "r-0002  digits  v1 → v2  ◐ running" in out
        assert "✔ first" in out
        assert "latency_p95 -11.8 % [-14.9, -8.7]" in out
        assert "2/4" in out

    def test_optimization(self, api: Api, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "100")
        choice = {"choice": {"x86_64": {"sentence": "int8 is smallest"}}}
        api.answer("GET", "/optimizations/o-0003", optimization(result=choice))
        out = shoal("optimization", "get", "o-0003", "-o", "table").out
        assert "✔ analyse" in out
        assert "◐ distil" in out
        assert "40 %" in out
        assert "x86_64: int8 is smallest" in out


class TestChanges:
    def test_without_a_terminal_a_change_needs_yes(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/rollouts/r-0002", rollout())
        done = shoal("rollout", "abort", "r-0002")
        assert done.code == 2
        assert "3 devices go back to v1" in done.err
        assert "--yes" in done.err
        assert all(call.method == "GET" for call in api.calls)

    def test_yes_does_it_and_passes_the_reason(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/rollouts/r-0002", rollout())
        api.answer("POST", "/rollouts/r-0002/abort", rollout("aborted"))
        assert shoal("rollout", "abort", "r-0002", "--yes", "--reason", "wrong").code == 0
        assert json.loads(api.calls[-1].body) == {"reason": "wrong"}

    def test_dry_run_changes_nothing(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/devices/kitchen", detail())
        done = shoal("device", "revoke", "kitchen", "--dry-run")
        assert done.code == 0
        assert "Nothing was changed" in done.err
        assert all(call.method == "GET" for call in api.calls)

    def test_a_rollout_says_its_plan_first(self, api: Api, shoal: Shoal) -> None:
        api.answer("POST", "/rollouts", rollout())
        done = shoal("rollout", "create", "digits", "--waves", "1,100%", "--yes")
        assert done.code == 0
        assert done.out == "r-0002\n"
        assert "from v1 to v2 on 5 devices in 2 wave(s)" in done.err
        planned, started = (json.loads(call.body) for call in api.calls)
        assert planned["dry_run"] is True
        assert started == {**planned, "dry_run": False}
        assert started["waves"] == ["1", "100%"]

    def test_labels(self, api: Api, shoal: Shoal) -> None:
        api.answer("GET", "/devices/kitchen", detail())
        api.answer("PATCH", "/devices/d-kitchen", device())
        assert shoal("device", "label", "kitchen", "room=2", "site-").code == 0
        assert json.loads(api.calls[-1].body) == {"labels": {"room": "2", "site": ""}}
        assert shoal("device", "label", "kitchen", "nonsense").code == 2

    def test_endpoint_update_sends_only_what_was_given(self, api: Api, shoal: Shoal) -> None:
        endpoint = {
            "id": "e-0001", "name": "digits", "project": "default", "model": "digits", "objective": "x",
            "filter": "", "signature": {}, "settings": {}, "assignment": "", "release": "", "version": 1,
            "choice": {}, "devices": 3, "created_ms": 1,
        }  # fmt: skip
        api.answer("GET", "/endpoints/digits", endpoint)
        api.answer("PATCH", "/endpoints/digits", endpoint)
        assert shoal("endpoint", "update", "digits", "--sampling-share", "0.5", "--yes").code == 0
        assert json.loads(api.calls[-1].body) == {"sampling_share": 0.5}


class TestTokens:
    CREATED = schemas.TokenCreated(
        id="j-0001",
        uses=10,
        uses_left=10,
        created_ms=1,
        expires_ms=2,
        revoked=False,
        labels={},
        token="secret",
    )

    def test_the_token_is_all_that_stdout_gets(self, api: Api, shoal: Shoal) -> None:
        api.answer("POST", "/tokens", self.CREATED)
        done = shoal("token", "create", "--join", "--uses", "10", "--ttl", "1h")
        assert done.out == "secret\n"
        assert "secret" not in done.err
        assert json.loads(api.calls[-1].body) == {"uses": 10, "ttl_s": 3600, "labels": {}}

    def test_a_file_is_closed_to_others(self, api: Api, shoal: Shoal, tmp_path: Path) -> None:
        api.answer("POST", "/tokens", self.CREATED)
        path = tmp_path / "token"
        path.touch(mode=0o644)
        assert shoal("token", "create", "--join", "--out", str(path)).out == ""
        assert path.read_text() == "secret\n"
        assert path.stat().st_mode & 0o777 == 0o600


class TestPush:
    def test_it_sends_a_tar_and_waits(self, api: Api, shoal: Shoal, tmp_path: Path) -> None:
        (tmp_path / "signs.py").write_text('class Signs:\n    files = ["signs.npz"]\n')
        (tmp_path / "signs.npz").write_bytes(b"data")
        api.answer(
            "POST", "/models/signs/versions", version("ingesting", model="signs", optimization="o-0001")
        )
        api.answer("GET", "/optimizations/o-0001", optimization("done"))
        api.answer("GET", "/models/signs/versions/1", version(model="signs"))
        done = shoal("model", "push", str(tmp_path / "signs.py"), "--wait", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["state"] == "ready"
        body = next(call.body for call in api.calls if call.method == "POST")
        assert b'name="source"; filename="signs.tar"' in body
        assert b"signs.npz" in body

    def test_a_version_that_failed(self, api: Api, shoal: Shoal, tmp_path: Path) -> None:
        (tmp_path / "signs.py").write_text("")
        failed = version("failed", error="Signs.model() raised ValueError.")
        api.answer("POST", "/models/signs/versions", failed)
        api.answer("GET", "/models/digits/versions/1", failed)
        done = shoal("model", "push", str(tmp_path / "signs.py"), "--wait")
        assert done.code == 1
        assert "Signs.model() raised" in done.err
        assert "Mend the task file" in done.err


class TestExitCodes:
    @pytest.mark.parametrize(
        ("status", "code", "expected"),
        [
            (404, "not_found", 2),
            (422, "invalid", 2),
            (403, "denied", 3),
            (409, "conflict", 1),
            (503, "unavailable", 4),
        ],
    )
    def test_what_the_controller_refuses(
        self, api: Api, shoal: Shoal, status: int, code: str, expected: int
    ) -> None:
        api.answer("GET", "/rollouts/x", (status, problem(status, code, "No.", "Do that.")))
        done = shoal("rollout", "get", "x")
        assert done.code == expected
        assert done.err == "Error: No.\n  -> Do that.\n  request req-7\n"
        assert done.out == ""

    def test_nobody_answers(self, api: Api, shoal: Shoal) -> None:
        done = shoal("--url", "http://127.0.0.1:9", "device", "list")
        assert done.code == 4
        assert "http://127.0.0.1:9" in done.err
        assert "shoal up" in done.err

    def test_wrong_lines(self, api: Api, shoal: Shoal) -> None:
        assert shoal("rollot").code == 2
        assert "Did you mean 'rollout'" in shoal("rollot").err
        assert shoal("device", "list", "--nonsense").code == 2
        assert shoal("--url", "nonsense", "device", "list").code == 2

    def test_status_is_1_when_it_needs_a_person(self, api: Api, shoal: Shoal) -> None:
        status = schemas.Status(
            fleet="lab", version="0.1.0", devices={"healthy": 3}, findings_open=0, rollouts_running=0,
            optimizations_running=0, endpoints=[], sentence="All well.", next_step="", needs_attention=False,
        )  # fmt: skip
        api.answer("GET", "/status", status)
        assert shoal("status").code == 0
        api.answer("GET", "/status", status.model_copy(update={"needs_attention": True, "findings_open": 1}))
        assert shoal("status").code == 1

    def test_debug_shows_the_trace(self, api: Api, shoal: Shoal) -> None:
        assert "Traceback" in shoal("--debug", "rollout", "get", "nothing").err


class TestHelp:
    @pytest.mark.parametrize("name", [name for name in catalogue.ENTRIES if name not in ("optimize", "demo")])
    def test_every_command_has_help(self, shoal: Shoal, name: str) -> None:
        done = shoal(name, "--help")
        assert done.code == 0
        assert "Usage" in done.out

    def test_the_overview_names_every_command_and_imports_none(self) -> None:
        done = heavy_modules("--help")
        assert done.stderr.strip() == "[]"
        for name in catalogue.ENTRIES:
            assert f"  {name}" in done.stdout

    def test_clients_never_import_the_server(self, api: Api) -> None:
        api.answer("GET", "/rollouts", [])
        loaded = set(json.loads(heavy_modules("rollout", "list").stderr.replace("'", '"')))
        assert loaded <= {"httpx", "pydantic", "rich"}

    def test_help_is_quick(self) -> None:
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "shoal_controller.cli.main", "--help"], check=True, capture_output=True
        )
        assert time.monotonic() - started < 2.5  # ten times the promise

    def test_version(self, shoal: Shoal) -> None:
        assert shoal("--version").out.startswith("shoal 0.")


def detail() -> schemas.DeviceDetail:
    return schemas.DeviceDetail(
        **device().model_dump(),
        profile={},
        system={},
        generation=4,
        reported_generation=4,
        windows=[],
        events=[],
    )


def heavy_modules(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line in a fresh interpreter and lists on stderr which large libraries it loaded."""
    code = (
        "import sys\n"
        "from shoal_controller.cli.main import main\n"
        f"main({list(arguments)!r})\n"
        "heavy = 'httpx fastapi pydantic sqlalchemy uvicorn rich torch numpy grpc'.split()\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
