"""A device under load: parameters, physics, sensors."""
