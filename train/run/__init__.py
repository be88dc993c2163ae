"""The folder of a run: its one writer, its one reader, and whether it holds the same run."""
