"""The files of a prepared dataset: manifest, tokenizer, shards, and the digests that verify them."""
