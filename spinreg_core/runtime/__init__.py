"""The process of a stage, and the ranks that share it.

A rank that hangs ends its job in one of two ways. In a collective, the timeout of `distributed` raises. During
transfers or when suspended, `rank_watch` notices. Then `failures` picks the rank at fault and words its message,
`supervision` ends processes with their parent, `main` captures their stacks, and `torchrun` starts and reaps the ranks.
"""
