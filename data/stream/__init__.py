"""Read shards as micro-batches: the order of samples, mixtures of datasets, and a stream that resumes exactly."""
