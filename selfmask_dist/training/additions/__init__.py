"""What is added to frozen networks and trained in place of their weights: peft's methods by their names."""
