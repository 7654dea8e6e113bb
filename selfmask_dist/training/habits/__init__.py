"""How a supervised run trains beyond its loss: averages, rates by layer, what is kept and when it ends."""
