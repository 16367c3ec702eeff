"""Which tokens of one prompt each tier keeps: as numbers, a picture and a page."""
