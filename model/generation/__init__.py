"""Generation: tokens drawn one after the other, with a cache of keys and values."""
