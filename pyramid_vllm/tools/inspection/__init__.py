"""Which tokens of one prompt each tier keeps: as numbers and a page."""
