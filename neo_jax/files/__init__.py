"""Files of any kind: local and in buckets, compressed, locked, written in one piece."""
