"""Second networks: one adapter for each kind, whatever method asks."""
