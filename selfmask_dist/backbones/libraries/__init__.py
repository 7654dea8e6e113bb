"""One network in several libraries: what its parameters are called in each, and how they are cut."""
