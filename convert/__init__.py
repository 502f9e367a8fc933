"""From the formats of other programs to those of this one."""
