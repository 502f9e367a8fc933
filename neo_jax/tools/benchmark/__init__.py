"""How fast a model runs on the devices that are here, next to what these can do."""
