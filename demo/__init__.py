"""A whole run of the three programs on real pictures: `make demo`."""
