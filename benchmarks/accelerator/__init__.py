"""What `accelerator.py` measures: its parts, each a module; rows of results; and the table."""
