"""How fast a run is, and where its time goes: `fabric` between nodes, `profile` within steps."""
