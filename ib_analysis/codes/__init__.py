"""How much do stored codes hold? What tiers store, its rates, and the Gaussian bottleneck of single heads."""
