"""What a run decides by instance retrieval: its record, the state that is kept, and the learning rate."""
