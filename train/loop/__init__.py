"""The training loop: steps, validation, health, time limits, and what is written while it runs."""
