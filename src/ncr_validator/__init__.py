"""The bundled validator: judges a zipped 3D package over HTTP, by the contract of an outside validator."""
