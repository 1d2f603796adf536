"""``widebatch doctor --chaos``: real runs, disturbed at random, held to an undisturbed one."""
