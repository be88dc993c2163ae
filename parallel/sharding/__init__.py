"""What each rank holds and how it computes with it: tensor, sequence and context parallelism, the sharded regularizer,
the stage.
"""
