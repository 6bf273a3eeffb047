"""What `shoal` can do: one row a command, so that help and completion import none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """`module` holds `app` (a noun with verbs) or the function named `function` (an everyday verb)."""

    name: str
    module: str
    help: str
    function: str = ""


SECTIONS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
    (
        "Every day",
        (
            Entry("up", "up", "Start the controller and its worker on this machine.", "up"),
            Entry("status", "status", "What needs me now? Exit code 1 when something does.", "status"),
            Entry("open", "status", "Open the dashboard in the browser.", "open_dashboard"),
            Entry(
                "demo",
                "demo",
                "Play the whole story on this machine, with real agents and real data.",
                "demo",
            ),
            Entry(
                "optimize", "optimize", "Compress and convert a model here, without a controller.", "optimize"
            ),
        ),
    ),
    (
        "The fleet",
        (
            Entry("device", "device", "Joined machines: list, get, label, revoke."),
            Entry("token", "token", "Join tokens: create, list, revoke."),
            Entry("event", "event", "Every change of state, in order: list."),
        ),
    ),
    (
        "Models",
        (
            Entry("task", "task", "Your model as a file that Shoal takes: new, check."),
            Entry("model", "model", "Pushed models and their versions: list, get, push."),
            Entry("variant", "variant", "What optimizations made of a version: list, get."),
            Entry("release", "release", "Variants per class, ready to roll out: list, get, create."),
            Entry("optimization", "optimization", "Searches: start, list, get, cancel, report."),
        ),
    ),
    (
        "Serving",
        (
            Entry("endpoint", "endpoint", "Names that applications call: create, list, get, update."),
            Entry("rollout", "rollout", "Moves in waves: create, list, get, pause, resume, abort, promote."),
            Entry("finding", "finding", "What monitoring saw: list, get, dismiss."),
            Entry("story", "story", "The loop so far, one paragraph a step.", "story"),
        ),
    ),
    (
        "Set-up",
        (
            Entry("controller", "controller", "This machine's controller: init, wheels add."),
            Entry("context", "contexts", "Which controller to talk to: list, add, use, remove."),
        ),
    ),
)

ENTRIES = {entry.name: entry for _title, entries in SECTIONS for entry in entries}


def overview() -> str:
    """The text of `shoal --help`."""
    lines = [
        "Usage: shoal [OPTIONS] COMMAND [ARGS]...",
        "",
        "Keeps a fleet of edge devices running the best model each of them can run.",
    ]
    width = max(len(name) for name in ENTRIES)
    for title, entries in SECTIONS:
        lines += ["", f"{title}:"]
        lines += [f"  {entry.name:<{width}}  {entry.help}" for entry in entries]
    lines += [
        "",
        "Options, before the command:",
        "  --url URL            Controller to talk to [SHOAL_URL].",
        "  --token-file FILE    File with the token; - reads it from standard input [SHOAL_TOKEN].",
        "  --context NAME       A context of ~/.config/shoal/config.toml.",
        "  --home DIR           Data directory of this machine's controller [SHOAL_HOME].",
        "  --no-color           Plain output [NO_COLOR].",
        "  --debug              Show the trace of an error.",
        "  --version            Show the version.",
        "  --install-completion, --show-completion   Complete commands in this shell.",
        "",
        "Examples:",
        "  shoal up",
        "  shoal model push examples/digits.py --serve --wait",
        "  shoal rollout get r-0002 -w",
        "",
        "`shoal COMMAND --help` says more. Exit codes: docs/cli.md.",
    ]
    return "\n".join(lines)
