"""A finished run as a whole model: what it keeps beside its mask (`keep`), and how that is read again."""
