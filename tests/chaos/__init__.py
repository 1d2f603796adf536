"""Real runs, disturbed at random, held to an undisturbed one."""
