"""How fast a model runs on the devices that are here, beside what these can do."""
