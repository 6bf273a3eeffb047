"""The story: one real model goes round the whole loop. Every step has a deadline and keeps a promise."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shoal_controller.api import schemas
from shoal_controller.cli.packing import locate, travelling
from shoal_controller.demo import cast, evidence, figures, timing, worsening
from shoal_controller.demo.applications import Applications, Feed
from shoal_controller.demo.narrator import Narrator
from shoal_controller.demo.scene import DEADLINES, IDLE_S, Plan, Scene
from shoal_controller.demo.stage import BrokenPromise, Stage
from shoal_protos.errors import InvalidInput

OBJECTIVE = "accuracy>=0.95, latency_p95<=20ms; minimise size"


class Story(Scene):
    """Tells the story on a stage, chapter by chapter."""

    # ------------------------------------------------------------------ the whole of it

    def tell(self) -> None:
        """Plays every chapter. Raises BrokenPromise at the first promise that does not hold."""
        self.name = self.plan.task.stem
        self.controller_and_agents()
        self.original()
        self.plain_variants()
        self.optimization()
        self.first_rollout()
        before = self.before()
        during, finding = self.the_world_changes()
        after = self.second_rollout(finding)
        self.settle_accounts(before, during, after)

    def close(self) -> None:
        if self.applications is not None:
            self.applications.close()
        if self.relay is not None:
            self.relay.close()

    # ------------------------------------------------------------------ chapters

    def controller_and_agents(self) -> None:
        with self.narrator.chapter("A controller, and three agents that join it"):
            self.client = cast.start_controller(self.stage)
            self.narrator.note(f"dashboard  {self.client.url}/")
            token = cast.make_token(self.stage)
            self.relay, by_relay = cast.through_relay(self.stage, token)
            settings = {
                name: cast.join(self.stage, name, runtimes, by_relay if name == "hall" else token)
                for name, runtimes in cast.AGENTS.items()
            }
            for name in cast.AGENTS:
                self.agents.append(cast.start_agent(self.stage, self.client, name, settings[name]))
            for agent in self.agents:
                self.narrator.note(
                    f"{agent.name:<9} {agent.profile_class}  heard after {agent.start_s:.1f} s"
                )
        slowest = max(agent.start_s for agent in self.agents)
        self.figures["agent_start_s"] = figures.figure(slowest, "s", n=len(self.agents))

    def begin_training(self) -> None:
        """Copies the task with its files and runs it: `python TASK` trains and writes the weights."""
        folder = self.stage.root / "task"
        folder.mkdir()
        self.task_file = Path(shutil.copy(self.plan.task, folder))
        for name in travelling(self.plan.task):
            copy_into(locate(self.plan.task.parent, name), folder / name)
        self.known = set(folder.iterdir())
        command = [sys.executable, self.task_file.name]
        self.training = self.stage.start("training", command, cwd=folder, ends=True)

    def original(self) -> None:
        with self.narrator.chapter(f"Train the original of {self.plan.task.name}"):
            self.begin_training()
            self.stage.finish(self.training, "the original is trained", DEADLINES["train"])
            made = set(self.task_file.parent.iterdir()) - self.known
            self.extra = sorted(path.name for path in made if path.is_file())
            for line in self.training.tail(3).splitlines():
                self.narrator.note(line)
            self.load_task()

    def load_task(self) -> None:
        """Loads the task here too: its held-out data are the traffic, its original is what is compared."""
        from shoal_optimizer.task import load_task

        self.task = load_task(self.task_file)
        held = self.task.data("holdout")
        if held is None:
            raise InvalidInput(
                f"{self.plan.task.name} has no holdout().",
                "Return inputs that Shoal never sees; the demo sends them as traffic.",
            )
        half = len(held) // 2
        self.field_data, self.test = held.take(slice(0, half)), held.take(slice(half, None))
        self.tensor = self.task.signature.inputs[0]
        self.output = self.task.signature.outputs[0].name
        if self.task.signature.output_kind != "logits":
            raise InvalidInput("The demo tells its story with a classifier.", "Give it a task with logits.")

    def plain_variants(self) -> None:
        with self.narrator.chapter("Push it; plain variants serve first, nobody waits for a search"):
            pushed = time.monotonic()
            extra = [part for name in self.extra for part in ("--with", name)]
            promise = "the push is taken"
            self.stage.shoal(promise, "model", "push", str(self.task_file), "--name", self.name, *extra)
            self.stage.shoal(
                "the endpoint is created",
                *("endpoint", "create", self.name, "--model", self.name, "--objective", OBJECTIVE),
                *("--sampling-share", "1", "--settle", "2s", "--yes"),
            )
            self.narrator.note(f"objective  {OBJECTIVE}")
            self.narrator.note(
                "sampling is ON for this endpoint: labelled inputs may leave the devices", "yellow"
            )
            self.stage.wait(
                "every class serves a proved plain variant",
                self.all_serve,
                DEADLINES["plain"],
                explain=self.where,
            )
            first = time.monotonic() - pushed
            baseline = self.client.version(self.name, 1).baseline
            if baseline is not None and baseline.value is not None:
                self.narrator.note(f"original   {baseline.value:.4f} right on {baseline.n} evaluation items")
            for device, placement in self.placements():
                self.narrator.note(f"{device.name:<9} serves {placement.variant} after its own probe")
        self.figures["first_variant_s"] = figures.figure(first, "s")
        self.applications = Applications(
            [agent.address for agent in self.agents],
            self.name,
            self.tensor,
            self.output,
            Feed(self.field_data.inputs, self.field_data.targets),
        )
        self.stage.wait("the first rollout ends well", self.promoted, DEADLINES["rollout"])

    def promoted(self) -> bool | None:
        found = self.client.rollouts()
        return True if found and all(rollout.state == "promoted" for rollout in found) else None

    def optimization(self) -> None:
        with self.narrator.chapter("Search for better variants, class by class, with trials on the devices"):
            assert self.applications is not None
            self.applications.pause(True)
            began = time.monotonic() + 2 * cast.TELEMETRY_S  # the last window with traffic is sent
            started = self.stage.shoal(
                "the search is queued",
                *("optimization", "start", self.name, "--endpoint", self.name),
                *("--minutes", str(self.plan.minutes)),
            ).strip()
            self.narrator.note(f"{started}  {self.client.url}/optimizations/{started}")
            ended = self.follow(started, "the search finds variants", DEADLINES["optimize"])
            self.measure_idle(began)
            self.applications.pause(False)
            self.release = ended.release
            self.show_front(ended)

    def measure_idle(self, began: float) -> None:
        """Bytes of one agent's connection while it only waited, heartbeats included: before the search's
        first trial, or, when that came too soon, after the search."""
        assert self.relay is not None
        idle = self.relay.quietest(began, self.first_trial(), IDLE_S)
        if idle is None:
            began = time.monotonic()
            time.sleep(IDLE_S + 0.1)
            idle = self.relay.quietest(began, time.monotonic(), IDLE_S)
        assert idle is not None
        self.figures["idle_bytes_per_s"] = figures.figure(idle, "B/s")
        self.narrator.note(
            f"idle       {idle:.0f} B/s on the wire of {self.agents[0].name}, both ways, TLS and all"
        )

    def first_trial(self) -> float:
        """When the first trial was asked for, on this process's monotonic clock; now without any."""
        asked = [event.time_ms for event in self.client.events(kind="trial")]
        now = time.monotonic()
        return now - (time.time() - min(asked) / 1000) if asked else now

    def first_rollout(self) -> None:
        with self.narrator.chapter("Roll the chosen variants out, one device first"):
            rollout = self.start_rollout("the rollout starts", self.release, "1,100%")
            self.watch_rollout(rollout, "the first rollout is promoted")
            for device, placement in self.placements():
                self.narrator.note(f"{device.name:<9} serves {placement.variant}")

    def before(self) -> evidence.Rights:
        with self.narrator.chapter("Send the test items through tritonclient to every agent"):
            found = self.ask_all(self.test.inputs, "before")
            original = self.task.predict(self.task.original, self.test.inputs)
            own = evidence.rights([original], self.test.targets)
            drop = 100 * (own.share - found.share)
            low, high = evidence.resampled([own, found], lambda a, b: 100 * (a - b))
            self.figures["accuracy_drop_points"] = figures.figure(drop, "points", (low, high), found.n)
            self.narrator.note(f"original   {own.text()}")
            self.narrator.note(f"deployed   {found.text()}  on {len(self.agents)} agents")
            self.compare()
        return found

    def compare(self) -> None:
        """Speed and size of what was deployed against the original and its plain fp32 form."""
        assert self.applications is not None
        self.applications.pause(True)
        device, placement = next(
            (d, p)
            for d, p in self.placements()
            if "onnxruntime" in d.profile_class and "openvino" not in d.profile_class
        )
        agent = next(agent for agent in self.agents if agent.device == device.id)
        one = np.ascontiguousarray(self.test.inputs[:1])
        with timing.load(agent.directory / "store", placement.serving) as instance:
            medians = timing.interleaved(
                {
                    "original": timing.eager(self.task, one),
                    "deployed": timing.deployed(instance, {self.tensor.name: one}),
                }
            )
        self.applications.pause(False)
        ratios = [a / b for a, b in zip(medians["original"], medians["deployed"], strict=True)]
        speed = float(np.median(ratios))
        self.figures["speedup_over_pytorch"] = figures.figure(
            speed, "ratio", figures.median_interval(ratios), len(ratios)
        )
        variants = {variant.bundle: variant for variant in self.client.variants(self.name)}
        chosen = variants[placement.serving]
        plain = next(
            v for v in variants.values() if v.plain and v.target == "onnxruntime" and v.precision == "fp32"
        )
        ratio = chosen.wire_bytes / plain.wire_bytes
        self.figures["size_ratio"] = figures.figure(ratio, "ratio")
        self.narrator.note(
            f"{chosen.name}: {speed:.1f} times as fast as PyTorch, {100 * ratio:.1f} % of the size "
            f"({chosen.wire_bytes:,} of {plain.wire_bytes:,} compressed bytes)"
        )

    def the_world_changes(self) -> tuple[evidence.Rights, schemas.Finding]:
        with self.narrator.chapter("The world changes: less contrast, more noise"):
            assert self.applications is not None
            low, high = worsening.value_range(self.tensor, self.field_data.inputs)
            severity, fall = worsening.choose(self.local_fall(low, high))
            self.narrator.note(f"{severity}: costs {fall:.0f} points on field items that are no test items")
            worse = worsening.worsen(self.field_data.inputs, severity, low, high)
            self.worse_test = worsening.worsen(
                self.test.inputs, severity, low, high, worsening.NOISE_SEED + 1
            )
            self.applications.feed = Feed(worse, self.field_data.targets, labelled=True)
            finding = self.stage.wait("drift is found", self.drift, DEADLINES["finding"])
            self.narrator.note(f"{finding.id}  {finding.sentence}", "yellow")
            acting = self.stage.wait(
                "the loop acts on it", lambda: self.acting(finding.id), DEADLINES["finding"]
            )
            self.narrator.note(f"loop       {acting.action.get('sentence', '')}")
            during = self.ask_all(self.worse_test, "during")
            self.narrator.note(f"deployed   {during.text()}  on the test items, changed the same way", "red")
        return during, acting

    def second_rollout(self, finding: schemas.Finding) -> evidence.Rights:
        with self.narrator.chapter("Adapt the original to the field, distil, quantize, roll out again"):
            job = str(finding.action.get("optimization") or "")
            if job:
                self.follow(job, "the adaptation ends well", DEADLINES["adapt"])
            rollout = self.stage.wait(
                "the loop rolls out", lambda: self.rollout_of(finding.id), DEADLINES["rollout"]
            )
            self.watch_rollout(rollout, "the second rollout is promoted")
            assert self.applications is not None
            posted = self.applications.labels_posted
            self.narrator.note(f"labels     {posted} posted so far, for a tenth of the requests")
            return self.ask_all(self.worse_test, "after")

    def settle_accounts(
        self, before: evidence.Rights, during: evidence.Rights, after: evidence.Rights
    ) -> None:
        share = evidence.recovered(before.share, during.share, after.share)
        interval = evidence.resampled([before, during, after], evidence.recovered)
        for name, found in (("before", before), ("during", during), ("after", after)):
            self.figures[f"accuracy_{name}"] = figures.figure(found.share, "share", found.interval, found.n)
        self.figures["recovered_share"] = figures.figure(share, "share", interval, after.n)
        rss = [cast.supervisor_rss_mb(agent) for agent in self.agents]
        self.figures["supervisor_rss_mb"] = figures.figure(max(rss), "MB", n=len(rss))
        self.figures["story_s"] = figures.figure(self.narrator.elapsed, "s")
        self.narrator.console.print()
        for name, found, style in (
            ("before", before, "green"),
            ("during", during, "red"),
            ("after", after, "green"),
        ):
            self.narrator.bar(name, found.share, found.text(), style)
        self.narrator.console.print()
        self.narrator.note(f"{100 * share:.0f} % of what the change cost came back.", "bold")
        if share <= 0:
            raise BrokenPromise("the loop regains accuracy", f"The recovered share is {share:.2f}.")


def copy_into(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def play(plan: Plan, narrator: Narrator, linger: Callable[[Stage], None] | None) -> dict[str, Any]:
    """Tells the story and returns its figures' document; `linger` keeps the stage up afterwards."""
    with Stage(plan.root, plan.keep) as stage:
        story = Story(plan, stage, narrator)
        try:
            story.tell()
            document = figures.document(story.figures)
            if plan.json is not None:
                plan.json.write_text(json.dumps(document, indent=2) + "\n")
            if linger is not None:
                linger(stage)
            return document
        finally:
            story.close()


def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="shoal-demo-"))
