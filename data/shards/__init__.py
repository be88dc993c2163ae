"""What a prepared dataset consists of: manifest, tokenizer, shards, and the digests that everything read is checked
against.
"""
