"""What each rank holds and how it computes with it.

Tensor, sequence and context parallelism, the sharded regularizer, and the pipeline stage that they make up.
"""
