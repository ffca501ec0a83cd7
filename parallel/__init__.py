"""Many devices: meshes, rule tables, and what makes one rank's module out of a model that knows of no other rank."""
