"""The method: opponents, pairs and the loss, as pure functions without store or model."""

# Advice for a run that becomes unstable; training and the report give it.
REMEDIES = (
    "fewer steps, a lower learning rate, or KL to the base added on top (alpha below 1 with a larger beta) may help"
)
