"""From shards to micro-batches: the order of samples, mixtures, and a stream that resumes exactly."""
