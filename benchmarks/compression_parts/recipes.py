"""What each row does: fixed in advance, by a study of sizes and latencies on random weights.

The study (AVX-512 with VNNI, one thread, ratios to ONNX Runtime fp32 of the ResNet-18 shape): all blocks
with an identity shortcut removed and 37.5 % of the channels left is 2 % of the bytes and 14x in int8; the
deep narrow net of the same bytes is 9x, since below 100 us each operator costs its call.
"""

from __future__ import annotations

from shoal_optimizer.recipe import Recipe, Step

EPOCH = {"epochs": 1, "learning_rate": 3e-3, "batch": 64, "alpha": 0.9, "temperature": 4.0}
RECOVERY = Step("distillation", EPOCH)  # one epoch towards the original
INT8 = Step("quantization", {"samples": 384, "method": "minmax"})

WEIGHTS = Step(
    "weight_pruning",
    {"sparsity": 0.9, "epochs": 1, "ramp": 0.6, "learning_rate": 1e-3, "batch": 64, "alpha": 0.9},
)
CHANNELS = Step("channel_pruning", {"ratio": 0.625, "round_to": 8})
STUDENT = Step("distillation", EPOCH | {"student": "inherited", "width": 0.25})
NO_BLOCKS = Step("architecture", {"depth": 0.0})

ROWS: dict[str, dict[str, Recipe]] = {
    "resnet18": {
        "weight_pruning": Recipe((WEIGHTS,), "weight_pruning"),
        "channel_pruning": Recipe((CHANNELS, RECOVERY), "channel_pruning"),
        "int8": Recipe((INT8,), "int8"),
        "distillation": Recipe((STUDENT,), "distillation"),
        "combined": Recipe((NO_BLOCKS, RECOVERY, CHANNELS, RECOVERY, INT8), "combined"),
    },
    "wide": {
        "combined": Recipe(
            (
                Step("channel_pruning", {"ratio": 0.4, "round_to": 8}),
                RECOVERY,
                Step("channel_pruning", {"ratio": 0.4, "round_to": 8}),
                RECOVERY,
                INT8,
            ),
            "combined",
        ),
    },
    "mobilenet": {
        "weight_pruning": Recipe((WEIGHTS,), "weight_pruning"),
        "channel_pruning": Recipe(
            (Step("channel_pruning", {"ratio": 0.375, "round_to": 8}), RECOVERY), "channel_pruning"
        ),
        "int8": Recipe((INT8,), "int8"),
    },
}

# Architecture search: from the space that the product derives of the original, networks with at most this
# share of its parameters; so many of them, spread over latency, are trained for one epoch.
SEARCH_SHARE = 0.08
SEARCH_CANDIDATES = 5
SEARCH_KEEPS = 0.99  # of the original's validation accuracy: the fastest that does is taken

QUICK_RATE = 3e-4  # batch norms are folded into the ready networks: more breaks them


def quick_rows(steps: int) -> dict[str, Recipe]:
    """All six rows for the ready networks, training capped at `steps` a recovery."""
    capped = EPOCH | {"steps": steps, "learning_rate": QUICK_RATE}
    recovery = Step("distillation", capped)
    channels = Step("channel_pruning", {"ratio": 0.5, "round_to": 8})
    student = Step("distillation", capped | {"student": "inherited", "width": 0.5})
    weights = Step("weight_pruning", dict(WEIGHTS.params) | {"sparsity": 0.8, "learning_rate": QUICK_RATE})
    narrow = Step("architecture", {"width": 0.5})
    return {
        "weight_pruning": Recipe((weights,), "weight_pruning"),
        "channel_pruning": Recipe((channels, recovery), "channel_pruning"),
        "int8": Recipe((INT8,), "int8"),
        "distillation": Recipe((student,), "distillation"),
        "architecture_search": Recipe((narrow, recovery), "architecture_search"),
        "combined": Recipe((channels, recovery, INT8), "combined"),
    }
