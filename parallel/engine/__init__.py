"""Training of one stage: the engine, the pipeline, compiled blocks, CUDA graphs, and what a step measures."""
