"""Statistics of a study: tests over seeds, sweeps of a key, and hypotheses written down before the runs."""
