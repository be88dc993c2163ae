"""The folder of a run: its one writer and its one reader."""
