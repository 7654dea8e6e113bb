"""Words and file habits that every other package shares. Imports nothing of the project."""
