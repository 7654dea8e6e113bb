"""Which architectures masks can go on."""
