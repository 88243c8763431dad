"""The method: opponents, pairs and the loss, as pure functions without store or model."""

# Advice for a run that becomes unstable; training and the report give it.
REMEDIES = (
    "fewer steps, a lower learning rate, or KL to the base added on top (alpha below 1 with a larger beta) may help"
)

# Rewards that differ by less than the error of float32 sums are ties: a sequence's score depends in its last bits on
# the other sequences of its batch.
TIE_NATS = 1e-3


def win(margin: float) -> float:
    """Return 1 where a human answer's reward is above the opponent's, 0 where below, 1/2 for a tie. margin: nats."""
    return 0.5 if abs(margin) <= TIE_NATS else float(margin > 0)
