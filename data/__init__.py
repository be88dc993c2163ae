"""Text to tokens to batches: preparation, sharded storage and an exactly resumable stream."""
