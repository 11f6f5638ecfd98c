"""Reading what trained models do, and why."""
