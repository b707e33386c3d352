"""Images with coordinates, from files and from a rendered world."""
