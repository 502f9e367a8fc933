"""How arrays are laid out over a mesh: a table from logical to mesh axes, and what follows."""
