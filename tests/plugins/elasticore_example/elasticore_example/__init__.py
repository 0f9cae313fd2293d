"""A backend and a pattern for elasticore, as small as they can be."""
