"""Which model? Loading one, its cache's shape, and what tells it from others."""
