"""What the model is shown when: the share of every kind of batch, by step.

The bundled checkpoint was trained with these shares in one run that was stopped and continued. Short answers counted
more from step 4200 only, reasoning about pictures went over every cell from step 4800, and the rates fell to zero at
step 9560 and again, from two fifths of the peak, at step 13600: a new run gives a like checkpoint, not the same one.
"""

WARMUP = 200

# From this step on, so many parts of the mixture; what is learnt makes room for what is not.
PHASES: dict[int, dict[str, float]] = {
    0: {
        "arithmetic": 4,
        "recall_short": 4,
        "recall_long": 1,
        "tools": 1,
        "continuation": 1,
        "picture": 5,
        "pictures": 1,
        "clip": 1,
    },
    2600: {
        "arithmetic": 4,
        "recall_short": 2,
        "recall_long": 2,
        "tools": 1,
        "continuation": 1,
        "picture": 6,
        "pictures": 3,
        "clip": 3,
    },
    4200: {
        "arithmetic": 5,
        "recall_short": 1.5,
        "recall_long": 1,
        "tools": 0.8,
        "continuation": 0.5,
        "picture": 8,
        "pictures": 5,
        "clip": 3,
    },
    4800: {
        "arithmetic": 5,
        "recall_short": 1.5,
        "recall_long": 1.5,
        "tools": 1.5,
        "continuation": 0.8,
        "picture": 5,
        "pictures": 3,
        "clip": 3,
        "drill": 5,
        "drills": 2,
    },
    5400: {
        "arithmetic": 8,
        "recall_short": 2,
        "recall_long": 1,
        "tools": 1.2,
        "continuation": 0.6,
        "picture": 7,
        "pictures": 2.5,
        "clip": 2.5,
        "drill": 3,
        "drills": 1,
    },
    6400: {
        "arithmetic": 6,
        "recall_short": 2.5,
        "recall_long": 2,
        "tools": 2,
        "continuation": 1,
        "picture": 7,
        "pictures": 3,
        "clip": 3,
        "drill": 3,
        "drills": 1,
    },
    8600: {
        "arithmetic": 3,
        "recall_short": 5,
        "recall_long": 4,
        "tools": 1,
        "continuation": 1.5,
        "picture": 6,
        "pictures": 2,
        "clip": 4,
        "drill": 0.5,
    },
    9560: {
        "arithmetic": 2,
        "recall_short": 1.5,
        "recall_long": 2,
        "recall_names": 4,
        "tools": 1,
        "continuation": 1.2,
        "picture": 2.5,
        "pictures": 1.5,
        "counted": 4,
        "clip": 4,
        "changing": 3,
    },
}
KINDS = tuple(sorted({kind for phase in PHASES.values() for kind in phase}))


def weights_at(step: int) -> list[float]:
    """The probability of each of KINDS at `step`."""
    phase = PHASES[max(start for start in PHASES if start <= step)]
    total = sum(phase.values())
    return [phase.get(kind, 0.0) / total for kind in KINDS]
