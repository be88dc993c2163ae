"""Studies: plan many runs in one file, train them all, and report them side by side."""
