"""``widebatch doctor``: what would go wrong in a run, found out before it."""
