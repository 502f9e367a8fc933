"""Parameter trees in, parameter trees out: adapters of low rank, whole numbers of 8 bits."""
