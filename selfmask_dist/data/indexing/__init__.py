"""Tars to samples: what lies where in a shard, with which label, and what of it cannot be used."""
