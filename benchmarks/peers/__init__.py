"""The engines that `benchmarks/peers.py` compares."""
