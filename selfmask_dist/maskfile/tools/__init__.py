"""What is done with mask files: arithmetic, comparison, pictures, import, export, and smaller networks."""
