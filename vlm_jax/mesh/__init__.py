"""Devices: where arrays lie on a mesh, what compiled programs exchange, what chips can do."""
