"""Generation: the engine knows ids and nothing else; sampling picks the next one."""
