"""Fetching: where files come from, over what transport, and the cache that keeps them."""
