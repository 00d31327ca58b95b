"""What do we report? The demonstration, the information plane, tables of heads and of objectives."""
