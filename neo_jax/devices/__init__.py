"""The machine: its chips, their memory and links, the processes that share them."""
