"""Attack runs at random, and count what survived, what was named and what was lost."""
