"""Training a stage: DeepSpeed's engine, the pipeline, compiled blocks, CUDA graphs, and what a step measures."""
