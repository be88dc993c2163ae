"""What a model costs: FLOPs, parameters, step time."""
