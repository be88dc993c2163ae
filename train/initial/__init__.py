"""Where a new run's weights come from if not from the seed: another model, converted to this run's architecture."""
