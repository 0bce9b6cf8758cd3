"""Paged attention: `reference` is the definition; the others compute the same, faster, on one kind of device."""
