"""How a process of a run ends after an error: what is said, to whom, and how soon."""
