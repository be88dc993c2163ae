"""The processes of a run: which rank each is, where they meet, and how long they live."""
