"""Studies: many runs planned from one file, run to their end, and reported side by side."""
