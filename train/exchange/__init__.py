"""Models that leave for other libraries, and the names that those give to our parameters."""
