"""Files and addresses: from an address to a path, JSON from outside, and files that only this project writes."""
